"""Loss per token and perplexity, from the summed negative log-likelihood of each sequence.

Averaging the mean loss of batches would weigh short batches too much; here every token counts once.
Loads without a network: `evaluate.load("scripts/harness/metrics/perplexity")`.
"""

import math

import datasets
import evaluate

_DESCRIPTION = "loss = sum(nll) / sum(tokens), in nats per token; perplexity = exp(loss)"
_INPUTS = """
Args:
    nll (list of float): summed negative log-likelihood of each sequence, in nats
    tokens (list of int): how many tokens of each sequence were predicted
"""


class Perplexity(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"nll": datasets.Value("float64"), "tokens": datasets.Value("int64")}
            ),
        )

    def _compute(self, nll, tokens):
        loss = math.fsum(nll) / sum(tokens)
        return {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf}
