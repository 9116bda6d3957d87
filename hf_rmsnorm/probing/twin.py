"""A thin twin: the model with a few of its repeated layers, sharing their weights, to probe.

Which layers repeat is told by structure alone: children of one list, of equal classes, shapes and
settings. Of those with the same kinds of layers before and after them the twin has one, which
stands for all; what is found on the twin is written out for every layer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from .copies import copy_without_hooks
from .facts import Absorb, Center, Fold, LayerScale, ProbeResult, Widen

FEWEST = 4  # layers of a stack that is worth cutting
_SIMPLE = (bool, int, float, str, type(None), tuple)

Rename = Callable[[str], str]


@dataclass(frozen=True)
class Cut:
    """A stack of layers of which the twin has a few.

    Attributes:
        path: of the module whose numbered children they are.
        kept: the numbers of the layers that the twin has, as 0, 1, 2 ...
        stands_for: for each of these, the numbers of the layers it stands for.
    """

    path: str
    kept: tuple[int, ...]
    stands_for: tuple[tuple[int, ...], ...]

    @property
    def total(self) -> int:
        return sum(map(len, self.stands_for))


@dataclass(frozen=True)
class Twin:
    """A thin twin and what its layers stand for."""

    model: nn.Module
    cuts: tuple[Cut, ...]

    def __str__(self) -> str:
        return ", ".join(
            f"{len(cut.kept)} of {cut.total} layers of {cut.path}" for cut in self.cuts
        )

    def _split(self, name: str) -> tuple[Cut, int] | None:
        for cut in self.cuts:
            if name.startswith(f"{cut.path}."):
                number = name[len(cut.path) + 1 :].partition(".")[0]
                if number.isdigit():
                    return cut, int(number)
        return None

    @property
    def depth(self) -> float:
        """How many times as many layers the model has, in the stack that was cut most."""
        return max(cut.total / len(cut.kept) for cut in self.cuts)

    def stands_in(self, name: str) -> bool:
        """Whether `name` is in a layer of a stack that was cut."""
        return self._split(name) is not None

    def renamings(self, name: str) -> list[Rename]:
        """For each layer that the one with `name` stands for: what its names are in the model.

        Other layers of the same stack keep their distance; those of other stacks are the layers
        that the twin has.
        """
        here = self._split(name)
        if here is None:
            return [self._renaming(None, 0)]
        cut, i = here
        return [self._renaming(cut, j - i) for j in cut.stands_for[i]]

    def _renaming(self, mine: Cut | None, shift: int) -> Rename:
        def rename(text: str) -> str:
            for cut in self.cuts:

                def number(found: re.Match[str], cut: Cut = cut) -> str:
                    i = int(found[2])
                    return f"{found[1]}{i + shift if cut is mine else cut.kept[i]}"

                path = re.escape(cut.path)
                text = re.sub(rf"(?<![\w.])({path}\.)(\d+)(?!\w)", number, text)
            return text

        return rename

    def names(self, name: str) -> list[str]:
        """The names in the model that a name in the twin stands for."""
        return [rename(name) for rename in self.renamings(name)]

    def _others(self, base: str, rename: Rename, name: str) -> list[str]:
        """What `name` is where `base` is renamed by `rename`: the neighbour in the same stack; of
        another stack, or seen from outside, all that it stands for."""
        mine, its = self._split(base), self._split(name)
        same = mine is not None and its is not None and mine[0] is its[0]
        return [rename(name)] if its is None or same else self.names(name)

    def write_out(self, result: ProbeResult) -> ProbeResult:
        """What a probe of the twin found, for all layers of the model."""

        def each(names: Collection[str]) -> tuple[str, ...]:
            return tuple(full for name in names for full in self.names(name))

        fixed = self._renaming(None, 0)  # for what is said of one place that serves all layers
        lone = self._lone(result.centers)
        served = {name for center in lone for name in center.serves}

        def reasons(found: dict[str, str]) -> dict[str, str]:
            return {
                rename(name): (fixed if name in served else rename)(why)
                for name, why in found.items()
                for rename in self.renamings(name)
            }

        return replace(
            result,
            exact=reasons(result.exact),
            kept=reasons(result.kept),
            leftover={self.renamings(n)[0](n): mean for n, mean in result.leftover.items()},
            folds=tuple(full for fold in result.folds for full in self._fold(fold)),
            centers=tuple(
                full for center in result.centers for full in self._center(center, center in lone)
            ),
            layerscales=tuple(full for s in result.layerscales for full in self._scale(s)),
            absorbs=tuple(full for absorb in result.absorbs for full in self._absorb(absorb)),
            widens=tuple(full for widen in result.widens for full in self._widen(widen)),
            assumed=each(result.assumed),
            uncalled=each(result.uncalled),
            unproven=reasons(result.unproven),
            unreached=each(result.unreached),
            moved=result.moved,
        )

    def _fold(self, fold: Fold) -> Iterator[Fold]:
        for rename in self.renamings(fold.parameter):
            aliases = tuple(map(rename, fold.aliases))
            yield replace(fold, parameter=rename(fold.parameter), aliases=aliases)

    def _lone(self, centers: Sequence[Center]) -> list[Center]:
        """The centres of which there is one for all layers, not one in each."""
        modules = {center.module for center in centers}
        patterns = [re.sub(r"\d+", "#", module) for module in modules]
        return [
            center
            for center in centers
            if len(self.renamings(center.module)) == 1
            and patterns.count(re.sub(r"\d+", "#", center.module)) == 1
        ]

    def _center(self, center: Center, lone: bool) -> Iterator[Center]:
        for rename in self.renamings(center.module):
            serves = (
                full for n in center.serves for full in (self.names(n) if lone else [rename(n)])
            )
            yield replace(center, module=rename(center.module), serves=tuple(dict.fromkeys(serves)))

    def _scale(self, scale: LayerScale) -> Iterator[LayerScale]:
        for rename in self.renamings(scale.parameter):
            writers = tuple((rename(name), axis) for name, axis in scale.writers)
            yield LayerScale(rename(scale.parameter), writers)

    def _absorb(self, absorb: Absorb) -> Iterator[Absorb]:
        for rename in self.renamings(absorb.bias):
            readers = tuple(
                (weight, axis, bias)
                for w, axis, b in absorb.readers
                for weight, bias in zip(
                    self._others(absorb.bias, rename, w),
                    self._others(absorb.bias, rename, b),
                    strict=True,
                )
            )
            yield Absorb(rename(absorb.bias), readers)

    def _widen(self, widen: Widen) -> Iterator[Widen]:
        for rename in self.renamings(widen.up):
            norm, up, down = map(rename, (widen.norm, widen.up, widen.down))
            yield replace(widen, norm=norm, up=up, down=down)


def find_cuts(model: nn.Module, norms: Collection[str]) -> tuple[Cut, ...]:
    """The stacks of `model` that can be thinner: with norms in them, and enough layers alike."""
    found: list[Cut] = []
    for path, module in model.named_modules():
        inside = any(_is_below(path, cut.path) for cut in found)
        if inside or not path or not isinstance(module, (nn.ModuleList, nn.Sequential)):
            continue
        if len(module) < FEWEST:
            continue
        layers = list(module._modules.values())
        own = [f"{path}.{i}." for i in range(len(layers))]
        if None in layers or len({id(layer) for layer in layers}) < len(layers):
            continue  # a layer that is used twice
        if not all(any(norm.startswith(start) for norm in norms) for start in own):
            continue
        if cut := _cut(path, layers):
            found.append(cut)
    return tuple(found)


def _is_below(path: str, other: str) -> bool:
    return path.startswith(f"{other}.")


def _cut(path: str, layers: Sequence[nn.Module]) -> Cut | None:
    kinds = _kinds(layers)
    places: dict[Any, list[int]] = {}  # alike, with the same kinds before and after them
    for i, kind in enumerate(kinds):
        around = frozenset(kinds[:i]), frozenset(kinds[i + 1 :])
        places.setdefault((kind, *around), []).append(i)
    if len(places) == len(layers):
        return None
    stands = {alike[0]: tuple(alike) for alike in places.values()}
    kept = tuple(sorted(stands))
    return Cut(path, kept, tuple(stands[i] for i in kept))


def _kinds(layers: Sequence[nn.Module]) -> list[str]:
    """What tells layers of different kinds apart: classes, shapes and settings, but for those that
    are another in each layer, as its number is."""
    found = [dict(_settings(layer)) for layer in layers]
    counts = {
        key: len({repr(settings.get(key)) for settings in found})
        for key in {key for settings in found for key in settings}
    }
    plain = [key for key, count in counts.items() if 1 < count < len(layers)]
    shapes = [
        (
            [(name, type(module)) for name, module in layer.named_modules()],
            [(n, t.shape, t.dtype) for n, t in layer.state_dict(keep_vars=True).items()],
        )
        for layer in layers
    ]
    return [
        repr((shape, [settings.get(key) for key in sorted(plain)]))
        for shape, settings in zip(shapes, found, strict=True)
    ]


def _settings(layer: nn.Module) -> Iterator[tuple[str, Any]]:
    for path, module in layer.named_modules():
        yield f"{path}()", (len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, value in vars(module).items():
            if isinstance(value, _SIMPLE) and not name.startswith("_") and name != "training":
                yield f"{path}.{name}", value


def thin_twin(model: nn.Module, cuts: Sequence[Cut]) -> Twin:
    """The twin with these stacks cut. It shares the tensors of `model`: it is only to be read."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        memo[id(tensor)] = tensor
    for cut in cuts:
        for i, layer in enumerate(model.get_submodule(cut.path).children()):
            if i not in cut.kept:
                memo[id(layer)] = nn.Identity()
    thin = copy_without_hooks(model, memo)
    for cut in cuts:
        stack = thin.get_submodule(cut.path)
        layers = list(stack._modules.values())
        stack._modules.clear()
        stack._modules.update({str(t): layers[i] for t, i in enumerate(cut.kept)})
    return Twin(thin, tuple(cuts))


def shorten_configs(twin: Twin) -> None:
    """Say in the twin's configs, and in the modules around its stacks, how many layers there are:
    numbers that were those of the layers, and lists with an entry for each."""
    holders: list[dict[str, Any]] = []
    for module in twin.model.modules():
        config = getattr(module, "config", None)
        holders += [vars(c) for c in _configs(config)]
    for cut in twin.cuts:
        parent = cut.path.rpartition(".")[0]
        around = [vars(twin.model.get_submodule(parent))]
        for state in (*holders, *around):
            for name, value in list(state.items()):
                if "layer" in name and type(value) is int and value == cut.total:
                    state[name] = len(cut.kept)
                elif isinstance(value, (list, tuple)) and len(value) == cut.total:
                    state[name] = type(value)(value[i] for i in cut.kept)


def _configs(config: Any) -> Iterator[Any]:
    if hasattr(config, "__dict__"):
        yield config
        for value in vars(config).values():
            if hasattr(value, "model_type"):
                yield from _configs(value)
