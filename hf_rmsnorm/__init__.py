"""hf_rmsnorm: LayerNorm to RMSNorm or pRMSNorm in any Hugging Face model.

>>> from torch import nn
>>> from hf_rmsnorm import patch_model
>>> model = patch_model(nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4)), strategy="direct")
"""

from importlib import import_module
from typing import Any

from . import functional as functional
from ._transformers import connect
from .errors import PatchError as PatchError
from .errors import VerificationError as VerificationError
from .modules import PartialRMSNorm as PartialRMSNorm
from .modules import RMSNorm as RMSNorm
from .patching import PatchPlan as PatchPlan
from .patching import PatchReport as PatchReport
from .patching import Site as Site
from .patching import apply_plan as apply_plan
from .patching import fit_plan as fit_plan
from .patching import fold_shard as fold_shard
from .patching import patch_model as patch_model
from .patching import patch_report as patch_report
from .patching import plan_patch as plan_patch
from .patching import unpatch_model as unpatch_model

__version__ = "0.1.0"

connect()


__all__ = [
    "PartialRMSNorm",
    "PatchError",
    "PatchPlan",
    "PatchReport",
    "RMSNorm",
    "Site",
    "VerificationError",
    "__version__",
    "apply_plan",
    "fit_plan",
    "fold_shard",
    "from_pretrained",
    "functional",
    "hub",
    "patch_model",
    "patch_report",
    "plan_patch",
    "unpatch_model",
]

# Which need transformers, as the rest does not.
_LAZY = {"from_pretrained": ".hub.loading", "hub": ".hub"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(_LAZY[name], __name__)
    return module if name == "hub" else getattr(module, name)


def __dir__() -> list[str]:
    return __all__
