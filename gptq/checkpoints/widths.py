"""How settings tell which layers have other bits or groups than the most: GPTQModel's `dynamic`.

Each key is "+:" and a regular expression that is matched from the beginning of a layer's full name;
its value holds the settings in which those layers differ. "-:" names layers that are not packed.
Source: https://github.com/ModelCloud/GPTQModel (docs of QuantizeConfig.dynamic)
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

from gptq.checkpoints.layouts import PackedLayer
from gptq.checkpoints.settings import Settings
from gptq.models import ModelSpec

# vLLM and SGLang look for layers that they fuse under a name of their own.
_FUSED = {("q_proj", "k_proj", "v_proj"): "qkv_proj", ("gate_proj", "up_proj"): "gate_up_proj"}


class Alike(NamedTuple):
    """Layers of one width."""

    bits: int
    group_size: int
    pattern: str
    """A regular expression of their full names, and of those under which vLLM fuses them."""


def most_common(layers: Iterable[PackedLayer]) -> tuple[int, int]:
    """The bits and the group size that most weights have. Raises ValueError without layers."""
    weights: Counter[tuple[int, int]] = Counter()
    for layer in layers:
        weights[layer.bits, layer.group_size] += layer.inputs * layer.outputs
    return max(weights, key=lambda width: weights[width])


def are_mixed(layers: Iterable[PackedLayer]) -> bool:
    """Whether layers have unlike bits or group sizes."""
    return len({(layer.bits, layer.group_size) for layer in layers}) > 1


def describe(settings: Settings, layers: Iterable[PackedLayer], spec: ModelSpec) -> Settings:
    """The same settings, with the bits, the group size and the exceptions that the layers have.

    Rules of `dynamic` for layers that are not packed stay.
    """
    inner = [layer for layer in layers if layer.name.startswith(f"{spec.blocks}.")]
    if not inner:
        return settings
    base = most_common(inner)
    stated = settings.dynamic if isinstance(settings.dynamic, Mapping) else {}
    kept = {rule: value for rule, value in stated.items() if str(rule).startswith("-:")}
    rules = {
        f"+:{alike.pattern}": {"bits": alike.bits, "group_size": alike.group_size}
        for alike in patterns(inner, spec)
        if (alike.bits, alike.group_size) != base
    }
    return replace(settings, bits=base[0], group_size=base[1], dynamic={**kept, **rules} or None)


def patterns(layers: Iterable[PackedLayer], spec: ModelSpec) -> Iterator[Alike]:
    """The layers of all blocks by their width: for each group of a block one pattern a width."""
    widths = {layer.name: (layer.bits, layer.group_size) for layer in layers}
    prefix = f"{spec.blocks}."
    blocks = sorted({int(name.removeprefix(prefix).split(".")[0]) for name in widths})
    for group in spec.groups:
        indices: dict[tuple[tuple[int, int], tuple[str, ...]], list[int]] = defaultdict(list)
        for index in blocks:
            members: dict[tuple[int, int], list[str]] = defaultdict(list)
            for name in group.layers:
                full = f"{spec.block(index)}.{name}"
                if full in widths:
                    members[widths[full]].append(name)
            for width, inner in members.items():
                indices[width, tuple(inner)].append(index)
        for (width, names), numbers in indices.items():
            which = r"\d+" if numbers == blocks else _any_of(map(str, numbers))
            yield Alike(*width, rf"^{re.escape(prefix)}{which}\.{_names(names)}$")


# GPTQModel's exceptions for some layers, and AutoRound's. The layers' own shapes tell them too.
_EXCEPTIONS = ("dynamic", "extra_config")


def has_exceptions(settings: Mapping[str, object]) -> bool:
    """Whether settings declare other bits or groups for some layers."""
    return any(settings.get(key) for key in _EXCEPTIONS)


def declared_group_sizes(
    settings: Mapping[str, object], names: Iterable[str]
) -> dict[str, int | None]:
    """The group size that a rule of an exception declares for each layer; None if none does.

    The first rule that fits counts. What is no rule is passed over: shapes tell what it does not.
    """
    rules = [
        (_compiled(str(rule).removeprefix("+:")), value.get("group_size"))
        for stated in map(settings.get, _EXCEPTIONS)
        for rule, value in (stated.items() if isinstance(stated, Mapping) else ())
        if isinstance(value, Mapping)
    ]

    def size_of(name: str) -> int | None:
        fitting = (size for rule, size in rules if rule is not None and rule.match(name))
        size = next(fitting, None)
        return size if type(size) is int else None

    return {name: size_of(name) for name in names}


def _compiled(pattern: str) -> re.Pattern[str] | None:
    try:
        return re.compile(pattern)
    except re.error:
        return None


def _names(names: tuple[str, ...]) -> str:
    """An expression for layers of one parent, and for what vLLM and SGLang fuse them to."""
    parent = names[0].rpartition(".")[0]
    last = tuple(name.removeprefix(f"{parent}.") for name in names)
    fused = [_FUSED[last]] if last in _FUSED else []
    return (re.escape(f"{parent}.") if parent else "") + _any_of([*map(re.escape, last), *fused])


def _any_of(choices: Iterable[str]) -> str:
    choices = list(choices)
    return choices[0] if len(choices) == 1 else f"({'|'.join(choices)})"
