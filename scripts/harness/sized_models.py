"""Models with random weights, built from their configs at any size, and a batch for each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

Batch = dict[str, Tensor]


class Sizes(NamedTuple):
    width: int
    layers: int
    length: int  # tokens per sequence
    batch: int
    vocabulary: int

    @property
    def heads(self) -> int:
        return max(1, self.width // 64)


# as published, but for the Llama, which has fewer layers so that several fit into one GPU
FULL = {
    "gpt2": Sizes(768, 12, 1024, 8, 50257),
    "bert": Sizes(768, 12, 512, 16, 30522),
    "vit": Sizes(768, 12, 197, 64, 0),
    "whisper": Sizes(768, 12, 448, 4, 51865),
    "llama": Sizes(2048, 12, 1024, 4, 32000),
}


def build(name: str, sizes: Sizes) -> tuple[nn.Module, Batch]:
    """The model, in float32 on the CPU, and one batch with labels."""
    torch.manual_seed(0)
    model, batch = BUILDERS[name](sizes)
    with torch.no_grad():  # as after training: weights with a mean, norms with gain and bias
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model, batch


def _tokens(sizes: Sizes) -> Tensor:
    return torch.randint(5, sizes.vocabulary, (sizes.batch, sizes.length))


def _gpt2(sizes: Sizes) -> tuple[nn.Module, Batch]:
    config = transformers.GPT2Config(
        n_embd=sizes.width,
        n_layer=sizes.layers,
        n_head=sizes.heads,
        vocab_size=sizes.vocabulary,
        n_positions=sizes.length,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    tokens = _tokens(sizes)
    return transformers.GPT2LMHeadModel(config), {"input_ids": tokens, "labels": tokens}


def _bert(sizes: Sizes) -> tuple[nn.Module, Batch]:
    config = transformers.BertConfig(
        hidden_size=sizes.width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        intermediate_size=4 * sizes.width,
        vocab_size=sizes.vocabulary,
        max_position_embeddings=sizes.length,
    )
    tokens = _tokens(sizes)
    return transformers.BertForMaskedLM(config), {"input_ids": tokens, "labels": tokens}


def _vit(sizes: Sizes) -> tuple[nn.Module, Batch]:
    config: Any = transformers.ViTConfig(
        hidden_size=sizes.width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        intermediate_size=4 * sizes.width,
    )
    config.num_labels = 10
    pixels = torch.randn(sizes.batch, 3, config.image_size, config.image_size)
    labels = torch.randint(0, 10, (sizes.batch,))
    model = transformers.ViTForImageClassification(config)
    return model, {"pixel_values": pixels, "labels": labels}


def _whisper(sizes: Sizes) -> tuple[nn.Module, Batch]:
    frames = 1500 if sizes == FULL["whisper"] else sizes.length
    config = transformers.WhisperConfig(
        d_model=sizes.width,
        encoder_layers=sizes.layers,
        decoder_layers=sizes.layers,
        encoder_attention_heads=sizes.heads,
        decoder_attention_heads=sizes.heads,
        encoder_ffn_dim=4 * sizes.width,
        decoder_ffn_dim=4 * sizes.width,
        vocab_size=sizes.vocabulary,
        max_source_positions=frames,
        max_target_positions=sizes.length,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        decoder_start_token_id=1,
        use_cache=False,
    )
    tokens = _tokens(sizes)
    features = torch.randn(sizes.batch, config.num_mel_bins, 2 * frames)
    batch = {"input_features": features, "decoder_input_ids": tokens, "labels": tokens}
    return transformers.WhisperForConditionalGeneration(config), batch


def _llama(sizes: Sizes) -> tuple[nn.Module, Batch]:
    config = transformers.LlamaConfig(
        hidden_size=sizes.width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=max(1, sizes.heads // 4),
        intermediate_size=4 * sizes.width,
        vocab_size=sizes.vocabulary,
        max_position_embeddings=sizes.length,
        use_cache=False,
    )
    tokens = _tokens(sizes)
    return transformers.LlamaForCausalLM(config), {"input_ids": tokens, "labels": tokens}


Builder = Callable[[Sizes], tuple[nn.Module, Batch]]
BUILDERS: dict[str, Builder] = {
    "gpt2": _gpt2,
    "bert": _bert,
    "vit": _vit,
    "whisper": _whisper,
    "llama": _llama,
}
