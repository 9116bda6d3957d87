"""Whatever is called exact is exact: on networks nobody designed."""

from __future__ import annotations

import pytest
import torch
from conversion import convert
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import FRESH, HONEST, INPUTS, PARTS, TRICKS, Toy

from hf_rmsnorm.probing import plain_copy, probe, relative_change, run_outputs
from hf_rmsnorm.recipes import NormSpec, find_norms

PRE_NORM = sorted(name for name in HONEST if name.startswith("pre-norm"))


def norms_of(model: torch.nn.Module) -> dict[str, NormSpec]:
    return {n: s for n, s in find_norms(model).items() if isinstance(s, NormSpec)}


def change_on_fresh_inputs(model: torch.nn.Module, result) -> float:
    before = run_outputs(plain_copy(model, torch.float64), FRESH)
    after = run_outputs(convert(model, norms_of(model), result), FRESH)
    return relative_change(before, after)


networks = st.builds(
    Toy,
    st.lists(st.sampled_from(sorted(PARTS)), max_size=6),
    final_norm=st.booleans(),
    tied=st.booleans(),
    table=st.booleans(),
    seed=st.integers(0, 99),
)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(networks)
def test_exact_is_exact(model: Toy) -> None:
    result = probe(model, norms_of(model), INPUTS)
    assert change_on_fresh_inputs(model, result) < 1e-9


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(PRE_NORM), max_size=5), st.booleans(), st.booleans())
def test_pre_norm_networks_convert_whole(parts: list[str], tied: bool, table: bool) -> None:
    model = Toy(parts, tied=tied, table=table)
    result = probe(model, norms_of(model), INPUTS)
    if tied and not parts:
        assert set(result.kept) == {"final"}, "a centre serving one norm is a LayerNorm again"
    else:
        assert not result.kept
        assert len(result.centers) == int(tied)
    assert change_on_fresh_inputs(model, result) < 1e-9


@pytest.mark.parametrize("trick", TRICKS)
@pytest.mark.parametrize("tied", [False, True])
def test_hidden_readers_are_found(trick: str, tied: bool) -> None:
    """The stream before the reader must keep its mean; after it, nothing is read raw any more."""
    model = Toy(["pre-norm mlp", trick, "pre-norm mlp", "pre-norm attention"], tied=tied)
    result = probe(model, norms_of(model), INPUTS)
    assert "parts.0.norm" in result.kept
    assert change_on_fresh_inputs(model, result) < 1e-9
