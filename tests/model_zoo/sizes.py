"""The sizes of the zoo's models, all different, and how configs spell them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

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


def model(model_class: str, config_class: str, **settings: Any) -> Callable[[], nn.Module]:
    """A builder of this Transformers model with these config settings."""

    def build() -> nn.Module:
        settings_class = getattr(transformers, config_class)
        torch.manual_seed(3)
        return getattr(transformers, model_class)(settings_class(**settings))

    return build


Builders = dict[str, Callable[[], nn.Module]]
