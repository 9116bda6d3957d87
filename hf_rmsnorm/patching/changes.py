"""Changes to the modules and tensors of a model that can be taken back, bitwise."""

from __future__ import annotations

import ctypes
import enum
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PatchError
from ..probing.facts import extended


class _Absent(enum.Enum):
    """Stands for an attribute that was not there; an enum so that it survives pickling."""

    ABSENT = enum.auto()


@dataclass
class ModuleChange:
    """What one module was before.

    Each change is noted before it is made, and taking it back does nothing where it was not made,
    so that a patch can be undone wherever it was interrupted, and an undo begun again.
    """

    name: str
    original_class: type
    attributes: dict[str, Any] = field(default_factory=dict)
    parameters: list[str] = field(default_factory=list)  # empty slots that were added
    grown: dict[str, tuple[int, int]] = field(default_factory=dict)  # -> (axis, length before)
    hooks: list[Callable[..., Any]] = field(default_factory=list)
    new_class: type | None = None  # what it became


@dataclass
class Changes:
    """Everything done to one model so far, in order. Names are relative to that model."""

    modules: list[ModuleChange] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)  # originals, on the CPU
    written: dict[str, bytes] = field(default_factory=dict)  # fingerprints of what replaced them
    moved: dict[str, float] = field(default_factory=dict)  # how far from the originals, relatively
    replaced: dict[str, nn.Parameter] = field(default_factory=dict)  # until the patch is done
    guards: list[Callable[..., Any]] = field(default_factory=list)
    forgotten: bool = False  # the originals, to have their memory

    def open(self, model: nn.Module, name: str) -> tuple[nn.Module, ModuleChange]:
        """The module called `name`, and a new entry to note its changes in."""
        module = model.get_submodule(name)
        change = ModuleChange(name, type(module))
        self.modules.append(change)
        return module, change

    def write(self, model: nn.Module, name: str, value: Tensor) -> None:
        """Overwrite a parameter or buffer in place: optimizers and ties keep their object."""
        tensor = get_tensor(model, name)
        if name not in self.tensors:
            self.tensors[name] = tensor.detach().to("cpu", copy=True)
        self.moved[name] = _distance(tensor.detach(), value)
        _overwrite(tensor, value)
        self.written[name] = _fingerprint(tensor)

    def watch_loading(self, model: nn.Module) -> None:
        """Have `load_state_dict` of the model, and of each part of it, refuse the weights that were
        overwritten there: before any is loaded, so in every module above them."""
        paths = {p: None for name in self.tensors for p in _above(name)}  # in order
        for path in paths:
            guard = _RefuseOriginals(self, path)
            self.guards.append(guard)
            model.get_submodule(path).register_load_state_dict_pre_hook(guard)

    def refuse_originals(self, path: str, state_dict: Mapping[str, Any], prefix: str) -> None:
        """`PatchError` if `state_dict`, of the module at `path`, has one of the originals."""
        start = path + "." if path else ""
        for name, original in self.tensors.items():
            given = prefix + name.removeprefix(start)
            if name.startswith(start) and _same_values(
                state_dict.get(given), original, self.moved[name]
            ):
                raise PatchError(
                    f"{given} in the state dict is that of the unpatched model, which the "
                    "patch has folded: with it the patched model would compute something else. "
                    "Load such weights before patch_model, or call unpatch_model first"
                )

    def extend(self, model: nn.Module, name: str, axis: int) -> None:
        """Make a parameter one longer along `axis`, with zeros: a new `nn.Parameter`."""
        owner, _, attribute = name.rpartition(".")
        module, change = self.open(model, owner)
        old = module._parameters[attribute]
        assert old is not None
        change.grown[attribute] = (axis, old.shape[axis])
        self.replaced[name] = old
        module._parameters[attribute] = nn.Parameter(extended(old, axis), old.requires_grad)

    def settle(self) -> None:
        """The patch is done: what was kept in case that it fails can go."""
        self.replaced.clear()

    def forget(self) -> None:
        """Let the originals go: nothing can be undone from here on."""
        self.forgotten = bool(self.tensors)
        self.tensors.clear()

    def touched_since(self, model: nn.Module) -> list[str]:
        """Names of overwritten tensors that hold neither what was written nor, as where an undo was
        interrupted, their original."""
        return [
            name
            for name, written in self.written.items()
            if _fingerprint(tensor := get_tensor(model, name)) != written
            and not _holds(tensor, self.tensors.get(name))
        ]

    def replaced_since(self, model: nn.Module) -> list[str]:
        """Names of changed modules in whose place there is another one now."""
        return [
            change.name
            for change in self.modules
            if not isinstance(
                model.get_submodule(change.name), change.new_class or change.original_class
            )
        ]

    def undo(self, model: nn.Module) -> None:
        """Take everything back, in the reverse order; again does no harm."""
        noted = [*self.guards, *(hook for change in self.modules for hook in change.hooks)]
        for module in model.modules():
            _remove_hooks(module, noted)
        for change in reversed(self.modules):
            module = model.get_submodule(change.name)
            module.__class__ = change.original_class
            for name, value in change.attributes.items():
                if value is _Absent.ABSENT:
                    module.__dict__.pop(name, None)
                else:
                    module.__dict__[name] = value
            _call_own_forward(module, change)
            for name in change.parameters:
                module._parameters.pop(name, None)
            for name, (axis, length) in change.grown.items():
                now = module._parameters[name]
                assert now is not None
                if now.shape[axis] > length:
                    short = now.detach().narrow(axis, 0, length).clone()
                    module._parameters[name] = nn.Parameter(short, now.requires_grad)
        for name, parameter in self.replaced.items():
            owner, _, attribute = name.rpartition(".")
            model.get_submodule(owner)._parameters[attribute] = parameter
        for name, original in self.tensors.items():
            tensor = get_tensor(model, name)
            _overwrite(tensor, _cut(original, tensor))
        self.modules.clear()
        self.tensors.clear()
        self.written.clear()
        self.moved.clear()


def _remove_hooks(module: nn.Module, noted: Iterable[Callable[..., Any]]) -> None:
    """By the hooks, not by the handles that registering them gives back, maybe too late."""
    ours = set(map(id, noted))
    for kind in ("_forward_hooks", "_forward_pre_hooks", "_load_state_dict_pre_hooks"):
        hooks = getattr(module, kind)
        for key in [key for key, hook in hooks.items() if id(getattr(hook, "hook", hook)) in ours]:
            for table in (hooks, getattr(module, f"{kind}_with_kwargs", {})):
                table.pop(key, None)


def _call_own_forward(module: nn.Module, change: ModuleChange) -> None:
    """Hooks of accelerate that came after the patch call the `forward` that they found there."""
    for name in ("forward", "_old_forward"):
        kept = module.__dict__.get(name)
        new: Any = change.new_class
        if new is not None and getattr(kept, "__func__", None) is new.forward:
            original: Any = change.original_class
            module.__dict__[name] = MethodType(original.forward, module)


def _cut(original: Tensor, like: Tensor) -> Tensor:
    """What was there before it was made longer, if `like` is not."""
    return original[tuple(slice(length) for length in like.shape)]


def _holds(tensor: Tensor, original: Tensor | None) -> bool:
    data = tensor.detach()
    if original is None or type(data) is not Tensor or data.is_meta or data.ndim != original.ndim:
        return False
    short = _cut(original, data)
    return data.dtype == short.dtype and _fingerprint(data) == _fingerprint(short)


class _RefuseOriginals:
    """A hook; a class, so that a patched model can be pickled."""

    def __init__(self, changes: Changes, path: str):
        self.changes, self.path = changes, path

    def __call__(
        self, module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any
    ) -> None:
        self.changes.refuse_originals(self.path, state_dict, prefix)


def _above(name: str) -> Iterator[str]:
    """The paths of the modules that hold the tensor called `name`, from the outermost to its own:
    `""`, `"h"`, `"h.0"` for `h.0.weight`."""
    parts = name.split(".")
    return (".".join(parts[:i]) for i in range(len(parts)))


def _overwrite(tensor: Tensor, value: Tensor) -> None:
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        tensor.copy_(value)


def _distance(old: Tensor, new: Tensor) -> float:
    """Of `new` from `old`, relative to the size of `old`."""
    wide = torch.promote_types(old.dtype, torch.float32)
    new, old = new.to(wide), old.to(wide)
    return float((new - old).norm() / old.norm())  # of zeros that stay zeros: nan


def _same_values(given: Any, original: Tensor, moved: float) -> bool:
    """Whether `given` is `original`, in its own dtype, and that tells it from what is `moved` away:
    entries further apart than eps never round to the same."""
    data = given.detach() if isinstance(given, Tensor) else None
    if type(data) is not Tensor or data.is_meta or data.shape != original.shape:
        return False
    if not data.is_floating_point() or not moved > torch.finfo(data.dtype).eps:
        return False
    for there, here in ((data.flatten()[:64], original.flatten()[:64]), (data, original)):
        if not torch.equal(there.to("cpu"), here.to(data.dtype)):
            return False
    return True


def _fingerprint(tensor: Tensor) -> bytes:
    data = tensor.detach()
    if type(data) is not Tensor or data.is_meta:  # sharded, quantised or offloaded: no memory here
        return b""
    data = data.to("cpu").contiguous()
    size = data.numel() * data.element_size()
    return hashlib.blake2b((ctypes.c_char * size).from_address(data.data_ptr())).digest()


def get_tensor(model: nn.Module, name: str) -> Tensor:
    """The parameter or buffer called `name`."""
    owner, _, attribute = name.rpartition(".")
    return getattr(model.get_submodule(owner), attribute)


def become(module: nn.Module, new_class: type, change: ModuleChange) -> None:
    """Change the class of an existing module, and see to it that the new `forward` is called."""
    own = module.__dict__
    if "forward" in own and "_hf_hook" not in own:
        # left by another library (Liger, kernels): it would hide ours
        change.attributes["forward"] = own["forward"]
        del own["forward"]
    module.__class__ = change.new_class = new_class
    if "_old_forward" in own:  # the one that accelerate's hook calls
        set_attribute(module, change, "_old_forward", MethodType(new_class.forward, module))  # type: ignore[attr-defined]


def set_attribute(module: nn.Module, change: ModuleChange, name: str, value: object) -> None:
    """Set an attribute past `nn.Module.__setattr__`, noting what was there."""
    change.attributes.setdefault(name, module.__dict__.get(name, _Absent.ABSENT))
    module.__dict__[name] = value


def add_empty_parameters(module: nn.Module, change: ModuleChange, *names: str) -> None:
    for name in names:
        if not hasattr(module, name):
            change.parameters.append(name)
            module.register_parameter(name, None)
