"""Share of tokens whose most likely prediction is the right one, from counts of each sequence.

Loads without a network: `evaluate.load("scripts/harness/metrics/token_accuracy")`.
"""

import datasets
import evaluate

_DESCRIPTION = "token_accuracy = sum(correct) / sum(tokens)"
_INPUTS = """
Args:
    correct (list of int): how many tokens of each sequence were predicted rightly
    tokens (list of int): how many tokens of each sequence were predicted
"""


class TokenAccuracy(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"correct": datasets.Value("int64"), "tokens": datasets.Value("int64")}
            ),
        )

    def _compute(self, correct, tokens):
        return {"token_accuracy": sum(correct) / sum(tokens)}
