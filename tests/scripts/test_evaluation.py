"""Metrics against numbers computed by hand."""

from __future__ import annotations

import math
import types

import evaluate
import pytest
import torch
from accelerate import Accelerator
from harness.evaluation import METRICS, count_targets, evaluate_model, next_token_nll
from torch import nn
from torch.utils.data import DataLoader


def test_perplexity_weighs_every_token_once() -> None:
    metric = evaluate.load(str(METRICS / "perplexity"), keep_in_memory=True)
    metric.add_batch(nll=[math.log(2) * 3], tokens=[3])
    metric.add_batch(nll=[math.log(8)], tokens=[1])
    assert metric.compute() == {
        "loss": pytest.approx(math.log(2) * 6 / 4),
        "perplexity": pytest.approx(2**1.5),
    }


def test_perplexity_of_a_hopeless_model_is_infinite() -> None:
    metric = evaluate.load(str(METRICS / "perplexity"), keep_in_memory=True)
    assert metric.compute(nll=[2000.0], tokens=[1])["perplexity"] == math.inf


def test_token_accuracy() -> None:
    metric = evaluate.load(str(METRICS / "token_accuracy"), keep_in_memory=True)
    metric.add_batch(correct=[3, 0], tokens=[4, 1])
    metric.add_batch(correct=[1], tokens=[3])
    assert metric.compute() == {"token_accuracy": 4 / 8}


def test_next_token_nll_shifts_and_ignores() -> None:
    logits = torch.log(torch.tensor([[[0.7, 0.3], [0.4, 0.6], [0.5, 0.5]]]))
    labels = torch.tensor([[1, 1, 0]])
    expected = -torch.log(torch.tensor([[0.3, 0.4]]))
    torch.testing.assert_close(next_token_nll(logits, labels), expected)
    masked = torch.tensor([[1, -100, 0]])
    assert next_token_nll(logits, masked)[0, 0] == 0
    assert count_targets(masked).tolist() == [1]


class Table(nn.Module):
    """Predicts the next token from the current one through a fixed table of probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.log(torch.tensor([[0.5, 0.5], [0.9, 0.1]])))

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> types.SimpleNamespace:
        assert not self.training
        return types.SimpleNamespace(logits=self.table[input_ids])


def test_evaluate_model_over_uneven_batches() -> None:
    sequences = [[0, 1, 0], [1, 1, 0], [1, 0, 1]]
    rows = [{"input_ids": torch.tensor(s), "labels": torch.tensor(s)} for s in sequences]
    accelerator = Accelerator(cpu=True)
    loader = accelerator.prepare(DataLoader(rows, batch_size=2))  # the last batch holds one
    model = Table()
    found = evaluate_model(accelerator, model, loader)
    probabilities = [0.5, 0.9, 0.1, 0.9, 0.9, 0.5]
    loss = -math.fsum(map(math.log, probabilities)) / 6
    # ties at 0.5 go to token 0: 0->1 wrong, 1->0 right | 1->1 wrong, 1->0 right | 1->0 right, wrong
    assert found == {
        "loss": pytest.approx(loss),
        "perplexity": pytest.approx(math.exp(loss)),
        "token_accuracy": 0.5,
    }
    assert model.training, "evaluation leaves the mode as it was"
