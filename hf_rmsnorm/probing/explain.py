"""Why a norm is kept, in a user's words. Nothing is decided here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .symmetry import cotangent
from .workbench import Bench, norm_axis

# Nodes that pass a mean over features on: sums, and changes of shape.
_TRANSPARENT = (
    "Add",
    "Sub",
    "View",
    "UnsafeView",
    "ReshapeAlias",
    "Alias",
    "Clone",
    "Copy",
    "ToCopy",
    "Transpose",
    "Permute",
    "T",
    "Expand",
    "Squeeze",
    "Unsqueeze",
    "Slice",
    "Select",
    "Split",
    "SplitWithSizes",
    "Unbind",
    "Unfold",
    "Roll",
)


def _mean_ratio(x: Tensor, axis: int) -> float:
    rms = x.square().mean().sqrt().item() if x.numel() else 0.0
    return x.mean(axis).abs().max().item() / rms if rms else 0.0


def _kind(node: Any) -> str:
    return node.name().rstrip("0123456789").removesuffix("Backward")


class _Trace:
    """One forward pass: who made which tensor, who read it, and what came into each norm."""

    def __init__(self, bench: Bench):
        self.bench = bench
        self.makers: dict[Any, str] = {}  # graph node -> leaf module
        self.means: dict[str, float] = {}  # leaf module -> |mean| / rms of its output
        self.readers: dict[int, list[str]] = {}  # id of a tensor -> leaf modules
        self.inputs: dict[str, tuple[float, Tensor]] = {}  # norm -> its worst |mean| / rms, input
        self.keep: list[Any] = []

    def run(self) -> list[Tensor]:
        leaves = [(n, m) for n, m in self.bench.model.named_modules() if not any(m.children())]
        handles = [m.register_forward_hook(self._hook(name)) for name, m in leaves]
        try:
            with torch.enable_grad(), self.bench.watching(self._watch):
                return [x for held, _ in self.bench.run() for x in held.values()]
        finally:
            for handle in handles:
                handle.remove()

    def _watch(self, name: str, x: Tensor) -> None:
        mean = _mean_ratio(x.detach(), norm_axis(self.bench.norms[name], x))
        if name not in self.inputs or mean > self.inputs[name][0]:
            self.inputs[name] = mean, x

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self.keep.append((args, output))
            for x in args:
                if isinstance(x, Tensor):
                    self.readers.setdefault(id(x), []).append(name)
            y = output[0] if isinstance(output, tuple) else output
            if isinstance(y, Tensor) and y.grad_fn is not None and y.ndim > 0:
                self.makers.setdefault(y.grad_fn, name)
                axis = norm_axis(self.bench.norms[name], y) if name in self.bench.norms else -1
                self.means[name] = max(self.means.get(name, 0.0), _mean_ratio(y.detach(), axis))

        return hook

    def writers(self, x: Tensor) -> list[str]:
        """Leaf modules, or kinds of operation in `<>`, whose outputs are summed into `x`."""
        found: dict[str, None] = {}
        seen, stack = set(), [x.grad_fn]
        while stack:
            node = stack.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if node in self.makers:
                found[self.makers[node]] = None
                continue
            sources = [source for source, _ in node.next_functions]
            scaled = _kind(node) in ("Mul", "Div") and sources.count(None) == len(sources) - 1
            if scaled or _kind(node) in _TRANSPARENT:
                stack += sources
            elif "AccumulateGrad" not in _kind(node):
                found[f"<{_kind(node)}>"] = None
        return list(found)


def explain(bench: Bench, names: Sequence[str], means: Mapping[str, float]) -> dict[str, str]:
    """One line for each of the norms `names`, none of which is exact; `means` of those called."""
    reasons = dict.fromkeys(names, "the probe inputs never reach it")
    reasons.update({n: "its input is zero on the probe inputs" for n in names if n in means})
    names = [name for name in names if math.isfinite(means.get(name, math.inf))]
    if not names:
        return reasons
    leaves = bench.leaves()
    trace = _Trace(bench)
    try:
        for leaf in leaves.values():
            leaf.requires_grad_(True)
        outputs = trace.run()
        loss = cotangent(outputs, torch.Generator().manual_seed(6))
        inputs = {name: trace.inputs[name][1] for name in names}
        open_inputs = {name: x for name, x in inputs.items() if x.requires_grad}
        grads: dict[str, Tensor | None] = {}
        if loss is not None and open_inputs:
            found = torch.autograd.grad(loss, list(open_inputs.values()), allow_unused=True)
            grads = dict(zip(open_inputs, found, strict=True))
    finally:
        for leaf in leaves.values():
            leaf.requires_grad_(False)
    returned = {id(x) for x in outputs}
    for name in names:
        x, grad = inputs[name], grads.get(name)
        if grad is not None and _is_read_raw(bench, name, grad):
            others = [m for m in trace.readers[id(x)] if m not in bench.norms]
            reader = f"by {others[0]} " if others else ""
            reasons[name] = f"the stream it reads is also read {reader}without a norm"
            if id(x) in returned:
                reasons[name] = "the stream it reads is also an output of the model"
        else:
            reasons[name] = _writer_reason(bench, trace, trace.writers(x))
    return reasons


def _is_read_raw(bench: Bench, name: str, grad: Tensor) -> bool:
    axis = norm_axis(bench.norms[name], grad)
    norm = grad.norm().item() * grad.shape[axis] ** 0.5
    return norm > 0 and grad.sum(axis).norm().item() / norm > bench.tolerance.symmetry


def _writer_reason(bench: Bench, trace: _Trace, writers: list[str]) -> str:
    tol = bench.tolerance.mean
    guilty = [w for w in writers if trace.means.get(w, 1.0) > tol]
    if not guilty:
        return "its input does not come from weights that can be centred"
    for writer in guilty:
        if writer in bench.norms:
            return f"reads the output of another norm, {writer}"
    writer = guilty[0]
    if writer.startswith("<"):
        operation = writer.strip("<>")
        if operation == "Cat":
            return "normalises over a concatenation of other streams"
        return f"reads the result of an operation ({operation}) that cannot be centred"
    module = bench.model.get_submodule(writer)
    if any(True for _ in module.parameters(recurse=False)):
        return f"reads {writer}, whose weight cannot be centred (tied, or not a plain sum)"
    return f"reads the output of {writer} ({type(module).__name__}), which cannot be centred"
