from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_rmsnorm.probing import Center, Fold, fold_tensor, scale_tensor


@given(
    before=st.lists(st.integers(1, 4), max_size=2),
    outer=st.integers(1, 3),
    size=st.integers(2, 6),
    inner=st.integers(1, 3),
    after=st.lists(st.integers(1, 4), max_size=2),
)
def test_fold_centres_every_block_and_nothing_else(before, outer, size, inner, after):
    x = torch.randn(*before, outer * size * inner, *after, dtype=torch.float64)
    fold = Fold("w", len(before), size, inner)
    y = fold_tensor(x, fold)
    assert y.shape == x.shape
    view = (*before, outer, size, inner, *after)
    torch.testing.assert_close(
        y.view(view).mean(len(before) + 1), torch.zeros(*before, outer, inner, *after).double()
    )
    moved = (x - y).view(view)
    torch.testing.assert_close(moved, moved.narrow(len(before) + 1, 0, 1).expand(view))
    torch.testing.assert_close(fold_tensor(y, fold), y)


def test_fold_leaves_unlisted_blocks_alone():
    x = torch.randn(3 * 4, 5)
    y = fold_tensor(x, Fold("w", 0, 4, blocks=((0, 0), (2, 0))))
    assert torch.equal(y[4:8], x[4:8])
    assert y.unflatten(0, (3, 4)).mean(1)[[0, 2]].abs().max() < 1e-6


def test_fold_rounds_once():
    """bfloat16 arithmetic would leave a mean of the size of its rounding errors per entry."""
    x = (torch.randn(64, 768) + 100).bfloat16()
    y = fold_tensor(x, Fold("w", 1, 768))
    exact = x.double() - x.double().mean(1, keepdim=True)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, exact.bfloat16())


def test_scale_broadcasts_along_its_axis():
    weight, scale = torch.randn(4, 3, 2), torch.randn(3, 1, 1)
    torch.testing.assert_close(scale_tensor(weight, scale, 1), weight * scale.view(1, 3, 1))


@pytest.mark.parametrize(
    "fact",
    [Fold("w", 1, 8, 2, ((0, 1), (1, 0)), ("tied",)), Center("a.b", "output", "key", -1, ("n",))],
)
def test_facts_are_json(fact):
    assert json.loads(json.dumps(asdict(fact))) == json.loads(json.dumps(asdict(fact)))
    assert type(fact)(**asdict(fact)) == fact
