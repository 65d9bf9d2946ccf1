"""How settings tell which layers have other bits or groups than the most: GPTQModel's `dynamic`.

Each key is "+:" and a regular expression that is matched from the beginning of a layer's full name;
its value holds the settings in which those layers differ. "-:" names layers that are not packed.
Source: https://github.com/ModelCloud/GPTQModel (docs of QuantizeConfig.dynamic)
"""

import contextlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from gptq.checkpoints.layouts import PackedLayer
from gptq.checkpoints.settings import Settings
from gptq.models import ModelSpec

# vLLM and SGLang look for one rule of the layers that they fuse, by a name of their own.
_FUSED = {("q_proj", "k_proj", "v_proj"): "qkv_proj", ("gate_proj", "up_proj"): "gate_up_proj"}


def most_common(layers: Iterable[PackedLayer]) -> tuple[int, int]:
    """The bits and the group size that most weights have. Raises ValueError without layers."""
    weights: Counter[tuple[int, int]] = Counter()
    for layer in layers:
        weights[layer.bits, layer.group_size] += layer.inputs * layer.outputs
    return max(weights, key=lambda width: weights[width])


def describe(settings: Settings, layers: Iterable[PackedLayer], spec: ModelSpec) -> Settings:
    """The same settings, with the bits, the group size and the exceptions that the layers have.

    Rules of `dynamic` for layers that are not packed stay.
    """
    inner = [layer for layer in layers if layer.name.startswith(f"{spec.blocks}.")]
    if not inner:
        return settings
    bits, group_size = most_common(inner)
    stated = settings.dynamic if isinstance(settings.dynamic, Mapping) else {}
    kept = {rule: value for rule, value in stated.items() if str(rule).startswith("-:")}
    rules = {**kept, **dict(_rules(inner, (bits, group_size), spec))}
    return replace(settings, bits=bits, group_size=group_size, dynamic=rules or None)


def declared_group_size(settings: Mapping[str, object], name: str) -> int | None:
    """The group size that a rule of `dynamic` declares for a layer; None if none does.

    The first rule that fits counts. What is no rule is passed over: shapes tell what it does not.
    """
    rules = settings.get("dynamic")
    for rule, value in rules.items() if isinstance(rules, Mapping) else ():
        size = value.get("group_size") if isinstance(value, Mapping) else None
        with contextlib.suppress(re.error):
            if re.match(str(rule).removeprefix("+:"), name):
                return size if type(size) is int else None
    return None


def _rules(
    layers: list[PackedLayer], base: tuple[int, int], spec: ModelSpec
) -> Iterator[tuple[str, dict[str, int]]]:
    """A rule for each width of each group of a block's layers, but not for the width `base`."""
    widths = {layer.name: (layer.bits, layer.group_size) for layer in layers}
    blocks = sorted({int(name.removeprefix(f"{spec.blocks}.").split(".")[0]) for name in widths})
    for group in spec.groups:
        indices: dict[tuple, list[int]] = defaultdict(list)
        for index in blocks:
            members: dict[tuple[int, int], list[str]] = defaultdict(list)
            for name in group.layers:
                width = widths.get(f"{spec.block(index)}.{name}", base)
                members[width].append(name)
            for width, names in members.items():
                indices[width, tuple(names)].append(index)
        for (width, names), numbers in indices.items():
            if width != base:
                which = r"\d+" if numbers == blocks else _any_of(map(str, numbers))
                prefix = re.escape(f"{spec.blocks}.")
                bits, group_size = width
                yield (
                    rf"+:^{prefix}{which}\.{_names(names)}$",
                    {"bits": bits, "group_size": group_size},
                )


def _names(names: tuple[str, ...]) -> str:
    """An expression for layers of one parent, and for what vLLM and SGLang fuse them to."""
    parent = names[0].rpartition(".")[0]
    last = tuple(name.removeprefix(f"{parent}.") for name in names)
    fused = [_FUSED[last]] if last in _FUSED else []
    return (re.escape(f"{parent}.") if parent else "") + _any_of([*map(re.escape, last), *fused])


def _any_of(choices: Iterable[str]) -> str:
    choices = list(choices)
    return choices[0] if len(choices) == 1 else f"({'|'.join(choices)})"
