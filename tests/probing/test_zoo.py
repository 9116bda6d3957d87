"""Over the zoo: as many norms exact as the study found, and exact means equal."""

from __future__ import annotations

import math

import pytest
import torch
from conversion import convert
from expected import EXPECTED
from model_zoo import ZOO, build, inputs_for

from hf_rmsnorm.probing import plain_copy, probe, relative_change, rounding_gap, run_outputs
from hf_rmsnorm.recipes import NormSpec, find_norms

FRESH = ((3, 11), (1, 7))
# Their own code computes part of the forward in float32, whatever dtype the model has.
FLOAT32_INSIDE = {"cohere", "cohere-qk", "cohere2", "deberta", "olmo"}
# Their own forward fails, or gives NaN, in float64.
NO_FLOAT64 = {"canine", "fsmt", "prophetnet", "xglm"}


def test_every_model_has_an_expectation():
    assert set(EXPECTED) == set(ZOO)


@pytest.mark.parametrize("name", ZOO)
def test_exact_means_equal(name: str) -> None:
    model = build(name)
    norms = {n: s for n, s in find_norms(model).items() if isinstance(s, NormSpec)}
    result = probe(model, norms, inputs_for(name, model))

    via = sum(len(center.serves) for center in result.centers)
    found = (len(result.exact) - via, len(result.centers), via, len(result.kept))
    assert found == EXPECTED[name]
    assert set(result.exact) | set(result.kept) == {
        n for n, s in norms.items() if s.kind == "layernorm"
    }
    assert result.dtype == ("float32" if name in NO_FLOAT64 else "float64")

    fresh = inputs_for(name, model, FRESH, seed=50)
    if name not in NO_FLOAT64:
        before = run_outputs(plain_copy(model, torch.float64), fresh)
        after = run_outputs(plain_copy(convert(model, norms, result), torch.float64), fresh)
        assert relative_change(before, after) < (1e-6 if name in FLOAT32_INSIDE else 1e-9)
    before = run_outputs(plain_copy(model, torch.float32), fresh)
    after = run_outputs(plain_copy(convert(model, norms, result), torch.float32), fresh)
    gap = rounding_gap(model, fresh) or 1e-6
    assert math.isfinite(gap)
    assert relative_change(before, after) <= 5 * gap
