"""Checks of how the norms behave on a GPU, beyond the numbers of one call.

Each raises Wrong, or whatever went wrong; Skipped where this machine cannot tell.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import hf_rmsnorm
from harness.gpu_launching import ROWS, batch_invariant, deterministic, graph, step, tensors
from harness.kernel_grid import VARIANTS, Finding, Wrong, case, norm_truth
from hf_rmsnorm import RMSNorm, functional


class Skipped(Exception):
    """This machine cannot tell; the message says why."""


def no_rows() -> None:
    for shape in ((0, 64), (3, 0, 64)):
        x, r = torch.randn(2, *shape, device="cuda")
        w, b = torch.randn(2, 64, device="cuda")
        y, dx, dw, db = norm_truth.run(functional.rms_norm, [x, w, b], [torch.randn_like(x)])
        if y.shape != x.shape or dx.shape != x.shape or dw.any() or db.any():
            raise Wrong(f"{shape}: wrong shapes, or gradients from nothing")
        both = functional.add_rms_norm(x, r, w)
        if [t.shape for t in both] != [x.shape, x.shape]:
            raise Wrong(f"{shape}: add_rms_norm returned other shapes")


def infinities_and_nans() -> None:
    for hidden in (40, 768, 8192, 65536):
        x = torch.randn(5, hidden, device="cuda")
        x[1, 3], x[2, -1], x[3, 0] = float("inf"), float("-inf"), float("nan")
        x[4] = 0.0
        w = torch.randn(hidden, device="cuda")
        got = functional.rms_norm(x, w, eps=0.0)
        settings: dict[str, Any] = {"eps": 0.0, "k": hidden, "offset": 0.0, "casting": "gemma"}
        expected = norm_truth.eager_norm(x, w, None, **settings)
        torch.testing.assert_close(got, expected, equal_nan=True)


def roundings_are_where_the_casting_puts_them() -> None:
    """A missing rounding only makes results more accurate; so compare bits, not errors."""
    for dtype in (torch.bfloat16, torch.float16):
        x, _, w, *_ = tensors(ROWS, 768, dtype)
        settings: dict[str, Any] = {"eps": 1e-5, "k": 768, "offset": 0.0}
        for casting in ("gemma", "llama"):
            expected = norm_truth.eager_norm(x, w, None, casting=casting, **settings)
            got = functional.rms_norm(x, w, casting=casting)  # type: ignore[arg-type]
            same = (got == expected).double().mean().item()
            if not same > 0.99:
                raise Wrong(f"{casting}, {dtype}: only {same:.2%} of the bits are PyTorch's")


def nothing_waits_for_the_gpu() -> None:
    for hidden in (768, 16384):
        inputs = tensors(ROWS, hidden)
        step(*inputs)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(*inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def second_gradient() -> None:
    x, w, b = (torch.randn(*n, device="cuda", dtype=torch.float64) for n in ((3, 5), (5,), (5,)))
    leaves = [t.requires_grad_() for t in (x, w, b)]
    torch.autograd.gradgradcheck(lambda *t: functional.rms_norm(*t, p=0.5), leaves)


def _compiled(body: functional.CompiledBody, *, dynamic: bool = False) -> Finding:
    torch._dynamo.reset()
    functional.set_compiled_body(body)
    alone = torch.compile(functional.rms_norm, fullgraph=True, dynamic=dynamic)
    add = torch.compile(functional.add_rms_norm, fullgraph=True, dynamic=dynamic)
    x, r, w, b, *cotangents = tensors(129, 768)
    worst = Finding()
    for inputs, count, function in (([x, w, b], 1, alone), ([x, r, w, b], 2, add)):
        got = norm_truth.run(function, inputs, cotangents[:count])
        expected = norm_truth.run(_eager(count), inputs, cotangents[:count])
        truth = norm_truth.run(_eager(count, true=True), inputs, cotangents[:count], torch.float64)
        summed = x if count == 1 else x.double() + r.double()
        sizes = norm_truth.sizes_of_terms(summed, w, b, cotangents[0], eps=1e-5, k=768, offset=0.0)
        names = ["y", "dx", "dweight", "dbias"]
        names = names if count == 1 else ["y", "summed", "dx", "dresidual", "dweight", "dbias"]
        for name, a, e, t in zip(names, got, expected, truth, strict=True):
            # a compiler may keep the sum in float32, one rounding of bfloat16 away
            close = norm_truth.closeness(a, e, t, terms=sizes[name], unit=2.0**-9)
            worst = max(worst, Finding(name, *close), key=lambda finding: finding.share)
    if not worst.share <= 1.0:
        raise Wrong(f"{worst.what}: error {worst.error:.2e}, limit {worst.limit:.2e}")
    return worst


def _eager(outputs: int, *, true: bool = False) -> Callable[..., Any]:
    settings: dict[str, Any] = {"eps": 1e-5, "k": 768, "offset": 0.0}

    def norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        if true:
            return norm_truth.true_norm(x, w, b, **settings)
        return norm_truth.eager_norm(x, w, b, casting="gemma", **settings)

    return norm if outputs == 1 else lambda x, r, w, b: (norm(x + r, w, b), x + r)


def compiled_to_our_kernels() -> Finding:
    return _compiled("kernel")


def compiled_to_our_kernels_for_any_shape() -> Finding:
    return _compiled("kernel", dynamic=True)


def compiled_to_inductors() -> Finding:
    return _compiled("torch")


def autocast() -> None:
    """By default as nn.LayerNorm; the other outputs have their dtype and are rounded once."""
    ours, theirs = RMSNorm(768, device="cuda"), nn.LayerNorm(768, device="cuda")
    half, single = torch.bfloat16, torch.float32
    for given, output, wanted in (
        *((half, "float32", single), (half, "input", half), (half, "autocast", half)),
        *((single, "float32", single), (single, "input", single), (single, "autocast", half)),
    ):
        x = torch.randn(9, 768, device="cuda").to(given)
        ours.autocast_output = output  # type: ignore[assignment]
        with torch.autocast("cuda", half):
            got, expected = ours(x), theirs(x)
        if got.dtype != wanted or (output == "float32" and got.dtype != expected.dtype):
            raise Wrong(f"{output} of {given}: {got.dtype}; nn.LayerNorm gives {expected.dtype}")
        exact = norm_truth.true_norm(x.double(), None, None, eps=1e-5, k=768, offset=0.0)
        rounding = torch.finfo(wanted).eps * exact.abs().max().item()
        torch.testing.assert_close(got.double(), exact, rtol=0.0, atol=rounding)


def gpt2_patched_trains_and_goes_back() -> None:
    from harness.sized_models import Sizes, build

    model, batch = build("gpt2", Sizes(128, 3, 33, 5, 211))
    model = model.cuda().eval()
    batch = {name: t.cuda() for name, t in batch.items()}
    ids = batch["input_ids"]
    torch.use_deterministic_algorithms(False)  # PyTorch has no such cumsum
    with torch.no_grad():
        before = model(ids).logits
    state = copy.deepcopy(model.state_dict())
    hf_rmsnorm.patch_model(model)
    verdicts = {site.verdict for site in hf_rmsnorm.patch_report(model).sites}
    if verdicts != {"exact"}:
        raise Wrong(f"verdicts are {verdicts}, not exact alone")
    with torch.no_grad():
        after = model(ids).logits
    moved = ((after - before).abs().max() / before.abs().max()).item()
    if not moved <= 2e-5:
        raise Wrong(f"an exact patch moved the outputs by {moved:.1e}")
    model.train()
    with torch.autocast("cuda", torch.bfloat16):
        loss = model(**batch).loss
    loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is None or not parameter.grad.isfinite().all():
            raise Wrong(f"{name} has no finite gradient under autocast")
    hf_rmsnorm.unpatch_model(model)
    for name, value in model.state_dict().items():
        if not torch.equal(value, state[name]):
            raise Wrong(f"unpatch_model left {name} changed")


def more_than_2_31_elements() -> None:
    """Sums of rows are held against float64; of rows only those around the limits."""
    hidden = 4096
    rows = 2**31 // hidden + 3
    _needs(10 * rows * hidden)  # x, y, dy and dx, and some for the truth
    x, dy = (_random(rows, hidden) for _ in range(2))
    w, b = torch.randn(2, hidden, device="cuda")
    leaves = [t.requires_grad_() for t in (x, w, b)]
    y = functional.rms_norm(*leaves)
    dx, dw, db = torch.autograd.grad(y, leaves, dy)
    y = y.detach()
    chosen = torch.tensor([0, 1, rows // 2, rows - 4, rows - 3, rows - 2, rows - 1], device="cuda")
    inputs, some = [x.detach()[chosen], w.detach(), b.detach()], [dy[chosen]]
    settings: dict[str, Any] = {"eps": 1e-5, "k": hidden, "offset": 0.0}
    exact = norm_truth.run(
        lambda *t: norm_truth.true_norm(*t, **settings), inputs, some, torch.float64
    )
    for name, got, true in (("y", y[chosen], exact[0]), ("dx", dx[chosen], exact[1])):
        error = ((got.double() - true).abs().max() / true.abs().max()).item()
        if not error <= 2.0**-8:
            raise Wrong(f"{name} is off by {error:.1e} of the largest value")
    true_dw, true_db = torch.zeros(2, hidden, dtype=torch.float64, device="cuda")
    for start in range(0, rows, 2**13):
        part = slice(start, start + 2**13)
        wide, wide_dy = x.detach()[part].double(), dy[part].double()
        true_dw += (wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * wide_dy).sum(0)
        true_db += wide_dy.sum(0)
    for name, got, true in (("dweight", dw, true_dw), ("dbias", db, true_db)):
        error = ((got.double() - true).abs().max() / true.abs().max()).item()
        if not error <= 1e-4:
            raise Wrong(f"{name} is off by {error:.1e} of the largest value")


def rows_2_30_elements_apart() -> None:
    hidden, stride = 768, 2**30
    _needs(4 * stride * 2)
    buffer = torch.empty(3 * stride + hidden, dtype=torch.bfloat16, device="cuda")
    x = buffer.as_strided((4, hidden), (stride, 1))
    x.copy_(torch.randn(4, hidden))
    inputs = tensors(4, hidden)
    expected = step(x.contiguous(), *inputs[1:])
    got = step(x, *inputs[1:])
    for index in (0, 1, 4, 5):  # y, dx, and add_rms_norm's y and sum
        torch.testing.assert_close(got[index], expected[index])


def _needs(size: int) -> None:
    free = torch.cuda.mem_get_info()[0]
    if free < size + 2**30:
        raise Skipped(f"takes {size / 2**30:.0f} GiB, {free / 2**30:.0f} are free")


def _random(rows: int, hidden: int) -> Tensor:
    return torch.randn(rows, hidden, dtype=torch.bfloat16, device="cuda")


def every_layout() -> Finding:
    variants = [VARIANTS["add"]._replace(layout=layout) for layout in ("strided", "transposed")]
    return max((case(257, 768, torch.bfloat16, v, "cuda") for v in variants), key=lambda f: f.share)


def in_clusters(hidden: int) -> Finding:
    """What HF_RMSNORM_CLUSTERS=1 asks for: numbers, repeats, neighbours, graphs."""
    from hf_rmsnorm.ops import triton_clusters

    name, device = "HF_RMSNORM_CLUSTERS", torch.device("cuda", torch.cuda.current_device())
    lacks = triton_clusters.what_lacks(device)
    if lacks:
        raise Skipped(lacks)
    before = os.environ.get(name)
    os.environ[name] = "1"
    triton_clusters.clusters_work.cache_clear()
    try:
        if not triton_clusters.clusters_work(device):
            raise Skipped(f"not used, as tried: {triton_clusters.what_fails(device)}")
        found = [
            case(rows, hidden, dtype, VARIANTS[variant], "cuda")
            for rows, dtype in ((1, torch.bfloat16), (ROWS, torch.bfloat16), (ROWS, torch.float32))
            for variant in ("bias", "add, p, offset, unaligned", "add, frozen")
        ]
        for function in (deterministic, batch_invariant, graph):
            function(hidden)
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before
        triton_clusters.clusters_work.cache_clear()
    return max(found, key=lambda finding: finding.share)


SINGLE: tuple[Callable, ...] = (
    no_rows,
    infinities_and_nans,
    roundings_are_where_the_casting_puts_them,
    nothing_waits_for_the_gpu,
    second_gradient,
    every_layout,
    autocast,
    compiled_to_our_kernels,
    compiled_to_our_kernels_for_any_shape,
    compiled_to_inductors,
    gpt2_patched_trains_and_goes_back,
)
LARGE: tuple[Callable, ...] = (more_than_2_31_elements, rows_2_30_elements_apart)
# the reference does these, or Inductor
WITHOUT_KERNELS = ("no rows", "second gradient", "compiled to inductors")
