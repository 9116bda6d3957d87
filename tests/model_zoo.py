"""Tiny random models of many architectures, every dimension a different size.

Distinct sizes, because a mask as wide as the hidden size looks like a weight. Random norm weights
and biases, because freshly initialised ones (1 and 0) make post-norm models look convertible.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from torch import nn

from hf_rmsnorm.probe_inputs import SHAPES, make_inputs

V, D, F, L, H, P = (
    97,
    24,
    56,
    3,
    3,
    41,
)  # vocabulary, hidden, feed-forward, layers, heads, positions

# The ways configs spell the same sizes.
BERT = {
    "vocab_size": V,
    "hidden_size": D,
    "num_hidden_layers": L,
    "num_attention_heads": H,
    "intermediate_size": F,
    "max_position_embeddings": P,
}
GPT2 = {"vocab_size": V, "n_positions": P, "n_embd": D, "n_layer": L, "n_head": H}
BART = {
    "vocab_size": V,
    "d_model": D,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": H,
    "decoder_attention_heads": H,
    "encoder_ffn_dim": F,
    "decoder_ffn_dim": F + 8,
    "max_position_embeddings": P,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
VIT = {
    "hidden_size": D,
    "num_hidden_layers": L,
    "num_attention_heads": H,
    "intermediate_size": F,
    "image_size": 20,
    "patch_size": 4,
}
UNTIED = {"tie_word_embeddings": False}
NO_PAD = {"pad_token_id": None}
CONV = {"conv_dim": (14, 18), "conv_stride": (3, 2), "conv_kernel": (5, 3)}
SPEECH = {
    "vocab_size": V,
    "hidden_size": D,
    "num_hidden_layers": L,
    "num_attention_heads": H,
    "intermediate_size": F,
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 6,
    "num_conv_pos_embedding_groups": 2,
    "pad_token_id": 1,
    **CONV,
}
STABLE = {"do_stable_layer_norm": True, "feat_extract_norm": "layer"}


def _randomise(model: nn.Module) -> None:
    """Give every vector parameter (norms, biases, LayerScale) values that no symmetry survives."""
    generator = torch.Generator().manual_seed(7)
    for module in model.modules():
        is_norm = "norm" in type(module).__name__.lower()
        for name, parameter in module.named_parameters(recurse=False):
            if is_norm or parameter.ndim <= 1 or parameter.numel() == max(parameter.shape):
                noise = torch.randn(parameter.shape, generator=generator)
                centre = 0.0 if "bias" in name else 1.0
                parameter.data.copy_(centre + 0.3 * noise)
            elif not parameter.any():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data.copy_(0.2 * noise)


def _model(model: str, config: str, **settings: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        config_class = getattr(transformers, config)
        torch.manual_seed(3)
        return getattr(transformers, model)(config_class(**settings))

    return build


def _llama_with_layernorm() -> nn.Module:
    model = _model("LlamaForCausalLM", "LlamaConfig", **BERT)()
    for path, module in list(model.named_modules()):
        for name, child in module.named_children():
            if type(child).__name__ == "LlamaRMSNorm":
                setattr(model.get_submodule(path), name, nn.LayerNorm(D, eps=1e-6))
    return model


ZOO: dict[str, Callable[[], nn.Module]] = {
    # decoders
    "gpt2": _model("GPT2LMHeadModel", "GPT2Config", **GPT2),
    "gpt2-untied": _model("GPT2LMHeadModel", "GPT2Config", **GPT2, **UNTIED),
    "openai-gpt": _model("OpenAIGPTLMHeadModel", "OpenAIGPTConfig", **GPT2),
    "gpt-neo": _model(
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        vocab_size=V,
        max_position_embeddings=P,
        hidden_size=D,
        num_layers=4,
        num_heads=H,
        intermediate_size=F,
        attention_types=[[["global", "local"], 2]],
        window_size=5,
    ),
    "gptj": _model("GPTJForCausalLM", "GPTJConfig", **GPT2, rotary_dim=4),
    "gpt-neox": _model("GPTNeoXForCausalLM", "GPTNeoXConfig", **BERT),
    "gpt-neox-seq": _model(
        "GPTNeoXForCausalLM", "GPTNeoXConfig", **BERT, use_parallel_residual=False
    ),
    "gpt-neox-japanese": _model(
        "GPTNeoXJapaneseForCausalLM",
        "GPTNeoXJapaneseConfig",
        vocab_size=V,
        hidden_size=D,
        num_hidden_layers=L,
        num_attention_heads=H,
        max_position_embeddings=P,
    ),
    "opt": _model(
        "OPTForCausalLM",
        "OPTConfig",
        vocab_size=V,
        hidden_size=D,
        num_hidden_layers=L,
        num_attention_heads=H,
        ffn_dim=F,
        max_position_embeddings=P,
        word_embed_proj_dim=D,
    ),
    "opt-350m": _model(
        "OPTForCausalLM",
        "OPTConfig",
        vocab_size=V,
        hidden_size=D,
        num_hidden_layers=L,
        num_attention_heads=H,
        ffn_dim=F,
        max_position_embeddings=P,
        word_embed_proj_dim=18,
        do_layer_norm_before=False,
    ),
    "opt-pre-proj": _model(
        "OPTForCausalLM",
        "OPTConfig",
        vocab_size=V,
        hidden_size=D,
        num_hidden_layers=L,
        num_attention_heads=H,
        ffn_dim=F,
        max_position_embeddings=P,
        word_embed_proj_dim=18,
    ),
    "bloom": _model(
        "BloomForCausalLM", "BloomConfig", vocab_size=V, hidden_size=D, n_layer=L, n_head=H
    ),
    "bloom-post": _model(
        "BloomForCausalLM",
        "BloomConfig",
        vocab_size=V,
        hidden_size=D,
        n_layer=L,
        n_head=H,
        apply_residual_connection_post_layernorm=True,
    ),
    "falcon-7b": _model(
        "FalconForCausalLM",
        "FalconConfig",
        vocab_size=V,
        hidden_size=D,
        num_hidden_layers=L,
        num_attention_heads=H,
        multi_query=True,
        parallel_attn=True,
        bias=False,
        alibi=False,
    ),
    "falcon-40b": _model(
        "FalconForCausalLM",
        "FalconConfig",
        vocab_size=V,
        hidden_size=32,
        num_hidden_layers=L,
        num_attention_heads=4,
        num_kv_heads=2,
        new_decoder_architecture=True,
        bias=False,
        alibi=False,
    ),
    "falcon-rw": _model(
        "FalconForCausalLM",
        "FalconConfig",
        vocab_size=V,
        hidden_size=D,
        num_hidden_layers=L,
        num_attention_heads=H,
        multi_query=False,
        parallel_attn=False,
        bias=True,
        alibi=True,
    ),
    "mpt": _model(
        "MptForCausalLM",
        "MptConfig",
        vocab_size=V,
        d_model=32,
        n_layers=L,
        n_heads=4,
        max_seq_len=P,
        expansion_ratio=2,
    ),
    "phi": _model("PhiForCausalLM", "PhiConfig", **BERT, **NO_PAD),
    "phi-qk": _model("PhiForCausalLM", "PhiConfig", **BERT, **NO_PAD, qk_layernorm=True),
    "stablelm": _model("StableLmForCausalLM", "StableLmConfig", **BERT, num_key_value_heads=H),
    "stablelm-qk": _model(
        "StableLmForCausalLM", "StableLmConfig", **BERT, num_key_value_heads=H, qk_layernorm=True
    ),
    "starcoder2": _model(
        "Starcoder2ForCausalLM", "Starcoder2Config", **BERT, num_key_value_heads=1
    ),
    "gpt-bigcode": _model("GPTBigCodeForCausalLM", "GPTBigCodeConfig", **GPT2),
    "codegen": _model(
        "CodeGenForCausalLM", "CodeGenConfig", **{**GPT2, "n_embd": 32, "n_head": 4}, rotary_dim=4
    ),
    "cohere": _model("CohereForCausalLM", "CohereConfig", **BERT, num_key_value_heads=1),
    "cohere-qk": _model(
        "CohereForCausalLM", "CohereConfig", **BERT, num_key_value_heads=1, use_qk_norm=True
    ),
    "cohere2": _model("Cohere2ForCausalLM", "Cohere2Config", **BERT, num_key_value_heads=1),
    "olmo": _model("OlmoForCausalLM", "OlmoConfig", **BERT),
    "nemotron": _model("NemotronForCausalLM", "NemotronConfig", **BERT, num_key_value_heads=1),
    "persimmon": _model("PersimmonForCausalLM", "PersimmonConfig", **BERT),
    "dbrx": _model(
        "DbrxForCausalLM",
        "DbrxConfig",
        vocab_size=V,
        d_model=D,
        n_heads=H,
        n_layers=2,
        max_seq_len=P,
        attn_config={"kv_n_heads": 1, "clip_qkv": 8.0, "rope_theta": 1e4},
        ffn_config={"ffn_hidden_size": F, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": D},
    ),
    "phimoe": _model(
        "PhimoeForCausalLM",
        "PhimoeConfig",
        **BERT,
        num_key_value_heads=1,
        num_local_experts=5,
        num_experts_per_tok=2,
    ),
    "xglm": _model(
        "XGLMForCausalLM",
        "XGLMConfig",
        vocab_size=V,
        max_position_embeddings=P,
        d_model=D,
        ffn_dim=F,
        num_layers=L,
        attention_heads=H,
    ),
    "biogpt": _model("BioGptForCausalLM", "BioGptConfig", **BERT),
    "ctrl": _model("CTRLLMHeadModel", "CTRLConfig", **GPT2, dff=F),
    "rwkv": _model(
        "RwkvForCausalLM",
        "RwkvConfig",
        vocab_size=V,
        hidden_size=D,
        num_hidden_layers=L,
        intermediate_size=F,
        context_length=P,
    ),
    "modernbert-decoder": _model(
        "ModernBertDecoderForCausalLM",
        "ModernBertDecoderConfig",
        **BERT,
        pad_token_id=1,
        local_attention=4,
    ),
    "musicgen-decoder": _model(
        "MusicgenForCausalLM",
        "MusicgenDecoderConfig",
        vocab_size=V,
        hidden_size=D,
        num_hidden_layers=2,
        num_attention_heads=H,
        ffn_dim=F,
        max_position_embeddings=P,
        num_codebooks=2,
        pad_token_id=V,
    ),
    "bark-semantic": _model(
        "BarkSemanticModel",
        "BarkSemanticConfig",
        input_vocab_size=V,
        output_vocab_size=V + 6,
        hidden_size=D,
        num_layers=2,
        num_heads=H,
        block_size=P,
    ),
    "trocr-decoder": _model(
        "TrOCRForCausalLM",
        "TrOCRConfig",
        vocab_size=V,
        d_model=D,
        decoder_layers=2,
        decoder_attention_heads=H,
        decoder_ffn_dim=F,
        max_position_embeddings=P,
    ),
    "decision-transformer": _model(
        "DecisionTransformerModel",
        "DecisionTransformerConfig",
        state_dim=5,
        act_dim=4,
        hidden_size=D,
        max_ep_len=50,
        n_positions=P,
        n_layer=2,
        n_head=H,
    ),
    "llama-with-layernorm": _llama_with_layernorm,
    # encoder-decoders
    "bart": _model("BartForConditionalGeneration", "BartConfig", **BART),
    "mbart": _model("MBartForConditionalGeneration", "MBartConfig", **BART),
    "pegasus": _model("PegasusForConditionalGeneration", "PegasusConfig", **BART),
    "m2m100": _model("M2M100ForConditionalGeneration", "M2M100Config", **BART),
    "marian": _model("MarianMTModel", "MarianConfig", **BART),
    "blenderbot": _model("BlenderbotForConditionalGeneration", "BlenderbotConfig", **BART),
    "nllb-moe": _model(
        "NllbMoeForConditionalGeneration",
        "NllbMoeConfig",
        **BART,
        num_experts=4,
        encoder_sparse_step=2,
        decoder_sparse_step=2,
        expert_capacity=64,
    ),
    "prophetnet": _model(
        "ProphetNetForConditionalGeneration",
        "ProphetNetConfig",
        vocab_size=V,
        hidden_size=D,
        encoder_ffn_dim=F,
        num_encoder_layers=2,
        num_encoder_attention_heads=H,
        decoder_ffn_dim=F + 8,
        num_decoder_layers=2,
        num_decoder_attention_heads=H,
        max_position_embeddings=P,
        ngram=2,
        num_buckets=6,
        relative_max_distance=10,
    ),
    "whisper": _model(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        **BART,
        num_mel_bins=10,
        max_source_positions=13,
        max_target_positions=P,
    ),
    "speech2text": _model(
        "Speech2TextForConditionalGeneration",
        "Speech2TextConfig",
        **{k: v for k, v in BART.items() if k != "max_position_embeddings"},
        max_source_positions=90,
        max_target_positions=P,
        input_feat_per_channel=10,
        input_channels=1,
        conv_channels=18,
    ),
    "moonshine": _model(
        "MoonshineForConditionalGeneration",
        "MoonshineConfig",
        vocab_size=V,
        hidden_size=D,
        intermediate_size=F,
        encoder_num_hidden_layers=2,
        decoder_num_hidden_layers=2,
        encoder_num_attention_heads=H,
        decoder_num_attention_heads=H,
        max_position_embeddings=P,
    ),
    # encoders
    "bert": _model("BertForMaskedLM", "BertConfig", **BERT),
    "bert-base": _model("BertModel", "BertConfig", **BERT),
    "roberta": _model("RobertaForMaskedLM", "RobertaConfig", **BERT),
    "roberta-prelayernorm": _model(
        "RobertaPreLayerNormForMaskedLM", "RobertaPreLayerNormConfig", **BERT
    ),
    "xlm-roberta-xl": _model("XLMRobertaXLForMaskedLM", "XLMRobertaXLConfig", **BERT),
    "megatron-bert": _model("MegatronBertForMaskedLM", "MegatronBertConfig", **BERT),
    "distilbert": _model(
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        vocab_size=V,
        dim=D,
        hidden_dim=F,
        n_layers=L,
        n_heads=H,
        max_position_embeddings=P,
    ),
    "electra": _model("ElectraForMaskedLM", "ElectraConfig", **BERT, embedding_size=D),
    "albert": _model("AlbertForMaskedLM", "AlbertConfig", **BERT, embedding_size=18),
    "deberta": _model(
        "DebertaForMaskedLM",
        "DebertaConfig",
        **BERT,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
    ),
    "deberta-v2": _model(
        "DebertaV2ForMaskedLM",
        "DebertaV2Config",
        **BERT,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        norm_rel_ebd="layer_norm",
        position_buckets=8,
        share_att_key=True,
    ),
    "modernbert": _model(
        "ModernBertForMaskedLM", "ModernBertConfig", **BERT, pad_token_id=1, local_attention=4
    ),
    "modernbert-base": _model(
        "ModernBertModel", "ModernBertConfig", **BERT, pad_token_id=1, local_attention=4
    ),
    "esm": _model(
        "EsmForMaskedLM", "EsmConfig", **BERT, pad_token_id=1, mask_token_id=4, token_dropout=True
    ),
    "esm-rotary": _model(
        "EsmForMaskedLM",
        "EsmConfig",
        **BERT,
        pad_token_id=1,
        mask_token_id=4,
        emb_layer_norm_before=True,
        position_embedding_type="rotary",
    ),
    "xlm": _model(
        "XLMWithLMHeadModel",
        "XLMConfig",
        vocab_size=V,
        emb_dim=D,
        n_layers=2,
        n_heads=H,
        max_position_embeddings=P,
    ),
    "mpnet": _model("MPNetForMaskedLM", "MPNetConfig", **BERT),
    "nystromformer": _model(
        "NystromformerForMaskedLM",
        "NystromformerConfig",
        **BERT,
        num_landmarks=4,
        segment_means_seq_len=4,
    ),
    "fnet": _model(
        "FNetForMaskedLM",
        "FNetConfig",
        vocab_size=V,
        hidden_size=D,
        num_hidden_layers=L,
        intermediate_size=F,
        max_position_embeddings=P,
    ),
    "canine": _model(
        "CanineModel",
        "CanineConfig",
        hidden_size=D,
        num_hidden_layers=2,
        num_attention_heads=H,
        intermediate_size=F,
        max_position_embeddings=P,
        num_hash_buckets=30,
        num_hash_functions=4,
        local_transformer_stride=8,
        downsampling_rate=3,
    ),
    "perceiver": _model(
        "PerceiverModel",
        "PerceiverConfig",
        d_model=30,
        d_latents=D,
        num_latents=7,
        num_self_attends_per_block=2,
        num_self_attention_heads=H,
        num_cross_attention_heads=H,
        num_blocks=1,
    ),
    "perceiver-mlm": _model(
        "PerceiverForMaskedLM",
        "PerceiverConfig",
        vocab_size=V,
        d_model=40,
        d_latents=D,
        num_latents=7,
        num_self_attends_per_block=2,
        num_self_attention_heads=H,
        num_cross_attention_heads=2,
        num_blocks=1,
        max_position_embeddings=P,
        qk_channels=18,
        v_channels=D,
    ),
    "layoutlm": _model("LayoutLMModel", "LayoutLMConfig", **BERT, max_2d_position_embeddings=50),
    "nomic-bert": _model("NomicBertModel", "NomicBertConfig", **BERT),
    "blip-text": _model("BlipTextModel", "BlipTextConfig", **BERT, encoder_hidden_size=D),
    # vision
    "vit": _model("ViTForImageClassification", "ViTConfig", **VIT, num_labels=5),
    "vit-base": _model("ViTModel", "ViTConfig", **VIT),
    "deit": _model("DeiTForImageClassification", "DeiTConfig", **VIT, num_labels=5),
    "beit": _model(
        "BeitForImageClassification",
        "BeitConfig",
        **VIT,
        vocab_size=V,
        num_labels=5,
        layer_scale_init_value=0.1,
        use_mean_pooling=True,
        use_relative_position_bias=True,
    ),
    "beit-mim": _model(
        "BeitForMaskedImageModeling",
        "BeitConfig",
        **VIT,
        vocab_size=V,
        layer_scale_init_value=0.1,
        use_mask_token=True,
    ),
    "dinov2": _model(
        "Dinov2Model", "Dinov2Config", **{k: v for k, v in VIT.items() if k != "intermediate_size"}
    ),
    "dinov2-swiglu": _model(
        "Dinov2WithRegistersModel",
        "Dinov2WithRegistersConfig",
        **{k: v for k, v in VIT.items() if k != "intermediate_size"},
        use_swiglu_ffn=True,
        num_register_tokens=2,
    ),
    "dinov3-vit": _model("DINOv3ViTModel", "DINOv3ViTConfig", **VIT, num_register_tokens=2),
    "ijepa": _model("IJepaModel", "IJepaConfig", **VIT),
    "vit-msn": _model("ViTMSNModel", "ViTMSNConfig", **VIT),
    "yolos": _model(
        "YolosForObjectDetection",
        "YolosConfig",
        **{**VIT, "image_size": [20, 24]},
        num_detection_tokens=5,
        num_labels=5,
    ),
    "vit-mae": _model(
        "ViTMAEForPreTraining",
        "ViTMAEConfig",
        **VIT,
        decoder_hidden_size=20,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=38,
    ),
    "videomae": _model(
        "VideoMAEForVideoClassification",
        "VideoMAEConfig",
        **VIT,
        num_frames=4,
        tubelet_size=2,
        num_labels=5,
    ),
    "timesformer": _model(
        "TimesformerForVideoClassification", "TimesformerConfig", **VIT, num_frames=4, num_labels=5
    ),
    "vivit": _model(
        "VivitForVideoClassification",
        "VivitConfig",
        **VIT,
        num_frames=4,
        tubelet_size=[2, 4, 4],
        num_labels=5,
    ),
    "swin": _model(
        "SwinForImageClassification",
        "SwinConfig",
        image_size=32,
        patch_size=2,
        embed_dim=12,
        depths=[2, 2],
        num_heads=[2, 3],
        window_size=4,
        num_labels=5,
    ),
    "swinv2": _model(
        "Swinv2ForImageClassification",
        "Swinv2Config",
        image_size=32,
        patch_size=2,
        embed_dim=12,
        depths=[2, 2],
        num_heads=[2, 3],
        window_size=4,
        num_labels=5,
    ),
    "convnext": _model(
        "ConvNextForImageClassification",
        "ConvNextConfig",
        hidden_sizes=[12, 20],
        depths=[2, 2],
        num_stages=2,
        image_size=32,
        num_labels=5,
        layer_scale_init_value=0.1,
    ),
    "segformer": _model(
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        num_encoder_blocks=2,
        depths=[2, 2],
        sr_ratios=[2, 1],
        hidden_sizes=[12, 20],
        num_attention_heads=[2, 4],
        patch_sizes=[5, 3],
        strides=[4, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=20,
        image_size=32,
        num_labels=5,
    ),
    "pvt": _model(
        "PvtForImageClassification",
        "PvtConfig",
        image_size=32,
        num_encoder_blocks=2,
        depths=[2, 2],
        sequence_reduction_ratios=[2, 1],
        hidden_sizes=[12, 20],
        num_attention_heads=[2, 4],
        patch_sizes=[4, 2],
        strides=[4, 2],
        mlp_ratios=[2, 2],
        num_labels=5,
    ),
    "cvt": _model(
        "CvtForImageClassification",
        "CvtConfig",
        patch_sizes=[7, 3],
        patch_stride=[4, 2],
        patch_padding=[2, 1],
        embed_dim=[12, 20],
        num_heads=[2, 4],
        depth=[1, 2],
        mlp_ratio=[2.0, 2.0],
        cls_token=[False, True],
        num_labels=5,
        attention_drop_rate=[0.0, 0.0],
        drop_rate=[0.0, 0.0],
        drop_path_rate=[0.0, 0.0],
        qkv_bias=[True, True],
        qkv_projection_method=["dw_bn", "dw_bn"],
        kernel_qkv=[3, 3],
        padding_kv=[1, 1],
        stride_kv=[2, 2],
        padding_q=[1, 1],
        stride_q=[1, 1],
    ),
    "focalnet": _model(
        "FocalNetForImageClassification",
        "FocalNetConfig",
        image_size=32,
        patch_size=4,
        embed_dim=12,
        depths=[2, 2],
        focal_levels=[2, 2],
        focal_windows=[3, 3],
        num_labels=5,
        hidden_sizes=[12, 20],
    ),
    "dpt": _model(
        "DPTForDepthEstimation",
        "DPTConfig",
        **{**VIT, "num_hidden_layers": 4, "image_size": 32, "patch_size": 16},
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[6, 8, 10, 14],
        fusion_hidden_size=12,
    ),
    "sam-vision": _model(
        "SamVisionModel",
        "SamVisionConfig",
        hidden_size=D,
        output_channels=18,
        num_hidden_layers=2,
        num_attention_heads=H,
        image_size=32,
        patch_size=4,
        window_size=3,
        mlp_dim=F,
        global_attn_indexes=[1],
    ),
    "siglip-vision": _model("SiglipVisionModel", "SiglipVisionConfig", **VIT),
    "clip-vision": _model("CLIPVisionModel", "CLIPVisionConfig", **VIT, projection_dim=18),
    # text of multimodal models, and multimodal models
    "clip-text": _model("CLIPTextModel", "CLIPTextConfig", **BERT, projection_dim=18),
    "clip": _model(
        "CLIPModel",
        "CLIPConfig",
        text_config={**BERT, "projection_dim": 18},
        vision_config={**VIT, "hidden_size": 30, "projection_dim": 18},
        projection_dim=18,
    ),
    "siglip": _model(
        "SiglipModel",
        "SiglipConfig",
        text_config={**BERT, "projection_size": 30},
        vision_config={**VIT, "hidden_size": 30},
    ),
    "vilt": _model(
        "ViltForImagesAndTextClassification",
        "ViltConfig",
        **{**BERT, **VIT},
        num_labels=5,
        num_images=1,
        modality_type_vocab_size=2,
    ),
    "llava-neox": _model(
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        text_config={"model_type": "gpt_neox", **BERT},
        vision_config={"model_type": "clip_vision_model", **VIT, "hidden_size": 30},
        image_token_index=90,
        image_seq_length=25,
    ),
    "blip": _model(
        "BlipForConditionalGeneration",
        "BlipConfig",
        text_config={**BERT, "encoder_hidden_size": 30},
        vision_config={**VIT, "hidden_size": 30},
    ),
    # audio
    "wav2vec2": _model("Wav2Vec2ForCTC", "Wav2Vec2Config", **SPEECH),
    "wav2vec2-stable": _model("Wav2Vec2ForCTC", "Wav2Vec2Config", **SPEECH, **STABLE),
    "hubert-stable": _model("HubertForCTC", "HubertConfig", **SPEECH, **STABLE),
    "hubert": _model("HubertForCTC", "HubertConfig", **SPEECH),
    "wavlm-stable": _model("WavLMForCTC", "WavLMConfig", **SPEECH, **STABLE),
    "wav2vec2-conformer": _model(
        "Wav2Vec2ConformerForCTC", "Wav2Vec2ConformerConfig", **{**SPEECH, "num_hidden_layers": 2}
    ),
    "wav2vec2-bert": _model(
        "Wav2Vec2BertForCTC",
        "Wav2Vec2BertConfig",
        vocab_size=V,
        hidden_size=D,
        num_hidden_layers=2,
        num_attention_heads=H,
        intermediate_size=F,
        feature_projection_input_dim=18,
    ),
    "ast": _model(
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
    "data2vec-audio": _model(
        "Data2VecAudioForCTC",
        "Data2VecAudioConfig",
        **{k: v for k, v in SPEECH.items() if not k.startswith("num_conv")},
        num_conv_pos_embeddings=2,
        num_conv_pos_embedding_groups=2,
        conv_pos_kernel_size=3,
    ),
}


def _perceiver(model: nn.Module, batch: int, tokens: int, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {"inputs": torch.randn(batch, tokens, 30, generator=generator)}


def _perceiver_mlm(model: nn.Module, batch: int, tokens: int, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {"inputs": torch.randint(6, V, (batch, P), generator=generator)}


def _ids(model: nn.Module, batch: int, tokens: int, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(3, V, (2 * batch, tokens + 7), generator=generator)}


def _decision(model: nn.Module, batch: int, tokens: int, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "states": torch.randn(batch, tokens, 5, generator=generator),
        "actions": torch.randn(batch, tokens, 4, generator=generator),
        "rewards": torch.randn(batch, tokens, 1, generator=generator),
        "returns_to_go": torch.randn(batch, tokens, 1, generator=generator),
        "timesteps": torch.arange(tokens).expand(batch, -1),
        "attention_mask": torch.ones(batch, tokens),
    }


# What cannot be guessed from a signature and a config.
_INPUTS: dict[str, Callable[[nn.Module, int, int, int], dict[str, Any]]] = {
    "canine": _ids,
    "decision-transformer": _decision,
    "musicgen-decoder": _ids,
    "perceiver": _perceiver,
    "perceiver-mlm": _perceiver_mlm,
}


def inputs_for(
    name: str, model: nn.Module, shapes: Sequence[tuple[int, int]] = SHAPES, seed: int = 0
) -> list[dict[str, Any]]:
    """Probe inputs: made by the package, except for the few models where users pass their own."""
    if name not in _INPUTS:
        return make_inputs(model, shapes, seed)
    return [_INPUTS[name](model, b, n, seed + i) for i, (b, n) in enumerate(shapes)]


def build(name: str) -> nn.Module:
    """The model in eval mode and float32, the same on every call."""
    model = ZOO[name]()
    _randomise(model)
    return model.eval()
