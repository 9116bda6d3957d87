"""Speech encoders."""

from __future__ import annotations

from .sizes import SPEECH, STABLE, Builders, D, F, H, L, P, V, model

AUDIO: Builders = {
    "wav2vec2": model("Wav2Vec2ForCTC", "Wav2Vec2Config", **SPEECH),
    "wav2vec2-stable": model("Wav2Vec2ForCTC", "Wav2Vec2Config", **SPEECH, **STABLE),
    "hubert-stable": model("HubertForCTC", "HubertConfig", **SPEECH, **STABLE),
    "hubert": model("HubertForCTC", "HubertConfig", **SPEECH),
    "wavlm-stable": model("WavLMForCTC", "WavLMConfig", **SPEECH, **STABLE),
    "wav2vec2-conformer": model(
        "Wav2Vec2ConformerForCTC", "Wav2Vec2ConformerConfig", **{**SPEECH, "num_hidden_layers": 2}
    ),
    "wav2vec2-bert": model(
        "Wav2Vec2BertForCTC",
        "Wav2Vec2BertConfig",
        vocab_size=V,
        hidden_size=D,
        num_hidden_layers=2,
        num_attention_heads=H,
        intermediate_size=F,
        feature_projection_input_dim=18,
    ),
    "ast": model(
        "ASTForAudioClassification",
        "ASTConfig",
        hidden_size=D,
        num_hidden_layers=L,
        num_attention_heads=H,
        intermediate_size=F,
        patch_size=4,
        frequency_stride=4,
        time_stride=4,
        max_length=26,
        num_mel_bins=14,
        num_labels=5,
    ),
    "data2vec-audio": model(
        "Data2VecAudioForCTC",
        "Data2VecAudioConfig",
        **{k: v for k, v in SPEECH.items() if not k.startswith("num_conv")},
        num_conv_pos_embeddings=2,
        num_conv_pos_embedding_groups=2,
        conv_pos_kernel_size=3,
    ),
    "unispeech": model("UniSpeechForCTC", "UniSpeechConfig", **SPEECH, **STABLE),
    "sew-d": model(
        "SEWDForCTC",
        "SEWDConfig",
        **SPEECH,
        squeeze_factor=2,
        position_buckets=8,
        max_position_embeddings=P,
    ),
}
