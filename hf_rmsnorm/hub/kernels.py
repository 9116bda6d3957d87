"""Our layers for Transformers' `use_kernels=True` and for `kernels.kernelize`.

    import hf_rmsnorm.hub.kernels

    hf_rmsnorm.hub.kernels.register()
    model = AutoModelForCausalLM.from_pretrained(path, use_kernels=True)

Nothing is downloaded: the layers come from this process. What they do to a norm is in
`hf_rmsnorm.layers`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from .. import layers

LAYER_NAMES = ("RMSNorm", "RMSNormBias", "PartialRMSNorm")
DEVICES = ("cuda", "rocm", "cpu")


@dataclass(frozen=True)
class Layer:
    """A repository as `kernels` wants it, for a layer of this process."""

    layer_name: str

    def load(self) -> type[nn.Module]:
        return getattr(layers, self.layer_name)

    def __str__(self) -> str:
        return f"hf_rmsnorm, layer {self.layer_name}"


def mapping(devices: Iterable[str] = DEVICES) -> dict[str, dict[Any, Any]]:
    """A kernel mapping of our layers, for `kernels.use_kernel_mapping`.

    The layers serve inference, training and `torch.compile`.

    Args:
        devices: device types out of cuda, rocm, xpu and cpu. xpu is left out by default, because
            `use_kernels=True` puts Transformers' own choice for it in our place; `kernelize` under
            `use_kernel_mapping` takes ours.

    Raises:
        ImportError: `kernels` is not installed.
        ValueError: another device type.
    """
    kernels = _kernels()
    # Transformers registers its own kernels for all CUDA and ROCm devices again and again; what
    # is registered for a range of them goes before that. Triton needs compute capability 8.0.
    known = {
        "cuda": kernels.Device("cuda", kernels.CUDAProperties(80, 100_000)),
        "rocm": kernels.Device("rocm", kernels.ROCMProperties(0, 100_000)),
        "xpu": kernels.Device("xpu"),
        "cpu": kernels.Device("cpu"),
    }
    chosen = [devices] if isinstance(devices, str) else list(devices)
    if unknown := [name for name in chosen if name not in known]:
        raise ValueError(f"no kernels for the device types {unknown}; there are {sorted(known)}")
    modes = kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE  # the others fall back to it
    return {name: {known[d]: {modes: Layer(name)} for d in chosen} for name in LAYER_NAMES}


def register(devices: Iterable[str] = DEVICES) -> None:
    """Register our layers with `kernels`, for every model that is kernelized from now on.

    Args, raises: as for `mapping`.
    """
    _kernels().register_kernel_mapping(mapping(devices))


def _kernels() -> Any:
    try:
        import kernels
    except ImportError as error:
        raise ImportError(
            "hf_rmsnorm.hub.kernels needs the package `kernels`: pip install kernels"
        ) from error
    return kernels
