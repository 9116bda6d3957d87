"""Small networks with a residual stream, built from honest and dishonest parts.

`Part`s read the stream `x` and return what is added to it, or a new stream. The dishonest ones read
the stream raw in a way that no gradient shows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

D, VOCAB, TOKENS = 12, 31, 6
Part = Callable[[], nn.Module]


class _Residual(nn.Module):
    def __init__(self, norm: nn.Module | None, inner: nn.Module):
        super().__init__()
        self.norm, self.inner = norm or nn.Identity(), inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(self.norm(x))


class _PostNorm(_Residual):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.inner(x))


class _Mlp(nn.Sequential):
    def __init__(self, bias: bool = True):
        super().__init__(nn.Linear(D, 20, bias), nn.GELU(), nn.Linear(20, D, bias))


class _Heads(nn.Module):
    """Per-head norms between a projection and the sum over heads; heads of width 4."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(D, 20), nn.LayerNorm(4), nn.Linear(20, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.norm(self.up(x).unflatten(-1, (5, 4))).flatten(-2))


class _Scale(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner, self.gamma = inner, nn.Parameter(0.5 + torch.rand(D))

    def forward(self, x: Tensor) -> Tensor:
        return self.gamma * self.inner(x)


class _Gate(nn.Module):
    """Multiplies two projections of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(D, 9), nn.Linear(D, 9), nn.Linear(9, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.a(x).sigmoid() * self.b(x))


class _Mixer(nn.Module):
    """Attention-like: a softmax over tokens, whose keys' bias changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(D, 8), nn.Linear(D, 8)
        self.v, self.out = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.q(x) @ self.k(x).transpose(1, 2)).softmax(-1)
        return self.out(weights @ self.v(x))


class _Hidden(nn.Module):
    """Reads the raw stream where no gradient can see it, and adds a norm-free trace of it."""

    def __init__(self, trick: Callable[[Tensor, nn.Linear], Tensor]):
        super().__init__()
        self.trick, self.reader = trick, nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.trick(x, self.reader)


def _branch_on_mean(x: Tensor, reader: nn.Linear) -> Tensor:
    return reader.bias if x.mean() > 0.7 else -reader.bias


def _without_grad(x: Tensor, reader: nn.Linear) -> Tensor:
    with torch.no_grad():
        return reader(x).tanh()


def _codebook(x: Tensor, reader: nn.Linear) -> Tensor:
    return reader.weight[torch.cdist(x, reader.weight).argmin(-1)]


def _dead_relu(x: Tensor, reader: nn.Linear) -> Tensor:
    return (x @ reader.weight.T - 100).relu()


def _rounding(x: Tensor, reader: nn.Linear) -> Tensor:
    return (x @ reader.weight.T).round()


def _saturated(x: Tensor, reader: nn.Linear) -> Tensor:
    return (x.sum(-1, keepdim=True) + 1e4).clamp(max=1e3).log() * reader.bias


TRICKS = {
    "branch on the mean": _branch_on_mean,
    "no_grad": _without_grad,
    "codebook": _codebook,
    "dead relu": _dead_relu,
    "rounding": _rounding,
    "saturated": _saturated,
}
HONEST: dict[str, Part] = {
    "pre-norm mlp": lambda: _Residual(nn.LayerNorm(D), _Mlp()),
    "pre-norm mlp without biases": lambda: _Residual(nn.LayerNorm(D), _Mlp(bias=False)),
    "pre-norm, no affine": lambda: _Residual(nn.LayerNorm(D, elementwise_affine=False), _Mlp()),
    "pre-norm heads": lambda: _Residual(nn.LayerNorm(D), _Heads()),
    "pre-norm layerscale": lambda: _Residual(nn.LayerNorm(D), _Scale(_Mlp())),
    "pre-norm gate": lambda: _Residual(nn.LayerNorm(D), _Gate()),
    "pre-norm attention": lambda: _Residual(nn.LayerNorm(D), _Mixer()),
    "norm on both sides": lambda: _Residual(
        nn.LayerNorm(D), nn.Sequential(_Mlp(), nn.LayerNorm(D))
    ),
    "post-norm mlp": lambda: _PostNorm(nn.LayerNorm(D), _Mlp()),
    "raw reader": lambda: _Residual(None, _Mlp()),
    "raw attention": lambda: _Residual(None, _Mixer()),
    "new stream": lambda: nn.Linear(D, D),
    "norm alone": lambda: nn.LayerNorm(D),
    "activation": lambda: nn.Tanh(),
}
PARTS = {**HONEST, **{name: lambda t=t: _Hidden(t) for name, t in TRICKS.items()}}


class Toy(nn.Module):
    """Token and position embeddings, parts in a row, a final norm, a head that may be tied.

    `table`: positions are read from a persistent buffer under `no_grad`, as sinusoids often are.
    """

    def __init__(
        self,
        parts: Sequence[str],
        *,
        final_norm: bool = True,
        tied: bool = False,
        table: bool = False,
        seed: int = 0,
    ):
        super().__init__()
        torch.manual_seed(seed)
        self.tokens = nn.Embedding(VOCAB, D)
        positions = torch.randn(TOKENS, D)
        if table:
            self.register_buffer("positions", positions)
        else:
            self.positions = nn.Parameter(positions)
        self.table = table
        self.parts = nn.ModuleList(PARTS[name]() for name in parts)
        self.final = nn.LayerNorm(D) if final_norm else nn.Identity()
        self.head = nn.Linear(D, VOCAB, bias=False)
        if tied:
            self.head.weight = self.tokens.weight
        for module in self.modules():
            if isinstance(module, nn.LayerNorm) and module.weight is not None:
                nn.init.normal_(module.weight, 1.0, 0.3)
                nn.init.normal_(module.bias, 0.0, 0.3)

    def forward(self, ids: Tensor) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.table):
            positions = self.positions[: ids.shape[1]] * 1.0
        x = self.tokens(ids) + positions
        for part in self.parts:
            x = part(x)
        return self.head(self.final(x))


def ids(count: int, length: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"ids": torch.randint(VOCAB, (count, length), generator=generator)}


INPUTS = [ids(3, TOKENS, 1), ids(1, 4, 2)]
FRESH = [ids(64, TOKENS, 3), ids(2, 3, 4)]
