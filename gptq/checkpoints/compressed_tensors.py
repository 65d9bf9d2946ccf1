"""The format "compressed-tensors" in its kind "pack-quantized", which llm-compressor writes.

Of each layer: weight_packed int32 (out, ceil(in * bits / 32)), weight_scale (out, groups),
weight_zero_point int32 (ceil(out * bits / 32), groups) unless symmetric, weight_shape int64 (2,).
Layout: https://github.com/vllm-project/compressed-tensors (compressors/pack_quantized)
"""

import contextlib
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptq.checkpoints import translation
from gptq.checkpoints.canonical import Canonical, LayerFacts, half, with_modules
from gptq.checkpoints.layouts import PackedLayer
from gptq.checkpoints.translation import MAKE_AGAIN, names_with, require
from gptq.checkpoints.widths import are_mixed, patterns
from gptq.errors import UserError
from gptq.files.lazy import Entries, Entry, LazyTensors
from quant_cuda.packing import BITS, pack_zeros, words_for

METHOD = "compressed-tensors"
# Of transforms, those that the stored weights have in them.
_IN_WEIGHTS = ("weight_input", "weight_output")
PACKED = "pack-quantized"

# Writing -------------------------------------------------------------------------------------


def refuses(facts: LayerFacts) -> str | None:
    """Why the format cannot hold a layer, with the flag that helps; None if it can."""
    if facts.has_g_idx:
        return "has groups in act-order, which its readers refuse; use --order gar"
    if facts.short_group:
        return (
            f"has {facts.layer.inputs} inputs, which groups of {facts.layer.group_size} do not "
            f"divide; use --groupsize {translation.fitting_group(facts.layer.inputs)}"
        )
    return None


def tensors(canonical: Canonical) -> LazyTensors:
    """Every tensor, none of which is read yet. Scales and biases become float16."""
    modules = {layer.name: _entries(canonical, layer) for layer in canonical.layers}
    return with_modules(canonical.tensors, modules)


def _entries(canonical: Canonical, layer: PackedLayer) -> Entries:
    words, zero_words = (words_for(n, layer.bits) for n in (layer.inputs, layer.outputs))
    own, name = canonical.tensors, layer.name
    entries = {
        "weight_packed": _turned(own, f"{name}.qweight", (layer.outputs, words)),
        "weight_scale": _turned(
            LazyTensors({"scales": half(canonical, f"{name}.scales")}),
            "scales",
            (layer.outputs, layer.groups),
        ),
    }
    if not canonical.settings.sym:
        zeros = _turned(own, f"{name}.qzeros", (zero_words, layer.groups))
        entries["weight_zero_point"] = zeros
    shape = torch.tensor([layer.outputs, layer.inputs])
    entries["weight_shape"] = Entry(shape.clone, (2,), torch.int64)
    if f"{name}.bias" in own:
        entries["bias"] = half(canonical, f"{name}.bias")
    return entries


def _turned(tensors: LazyTensors, name: str, shape: tuple[int, int]) -> Entry:
    return Entry(partial(translation.transposed, tensors, name), shape, tensors.dtype(name))


def settings(canonical: Canonical) -> dict[str, object]:
    """config.json's quantization_config: one group of layers for each width and group size."""
    ends = {layer.name for layer in canonical.embeddings}
    targets = _targets(canonical, ends)
    groups = {
        f"group_{number}": {
            "targets": names,
            "weights": _weights(bits, size, canonical.settings.sym),
            "input_activations": None,
            "output_activations": None,
        }
        for number, ((bits, size, _), names) in enumerate(targets.items())
    }
    head = canonical.source.spec.head
    # transformers 5.24 with compressed-tensors 0.20 loads packed zero points only if it is told to
    # dequantize, and then takes all layers for those of the first group: of several widths it must
    # not be told, so that it ends with an error. vLLM ignores the key.
    dequantize = {} if canonical.settings.sym or canonical.mixed else {"dequantize": True}
    return {
        "quant_method": METHOD,
        "format": PACKED,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [*([] if head in ends else [head]), *_unpacked(canonical)],
        "kv_cache_scheme": None,
        **dequantize,
    }


def _targets(canonical: Canonical, ends: set[str]) -> dict[tuple[int, int, bool], list[str]]:
    """The layers of each width, as targets; those of `ends`, the packed ends, apart (True)."""
    spec = canonical.source.spec
    targets: dict[tuple[int, int, bool], list[str]] = defaultdict(list)
    linears = [layer for layer in canonical.layers if layer.name not in ends]
    for layer in canonical.embeddings:
        if layer.name == spec.embed[0]:
            # vLLM gives its embedding no name, only a class.
            targets[layer.bits, layer.group_size, True].append("Embedding")
    if are_mixed(linears):
        # No target is a class: servers would find it before the names of layers that they fuse.
        for alike in patterns(linears, spec):
            targets[alike.bits, alike.group_size, False].append(f"re:{alike.pattern}")
    elif linears:
        targets[linears[0].bits, linears[0].group_size, False] = ["Linear"]
    for layer in canonical.embeddings:
        if layer.name == spec.head:
            targets[layer.bits, layer.group_size, True].append(layer.name)
    return targets


def _unpacked(canonical: Canonical) -> list[str]:
    """Linear layers of blocks that are not packed, as those of a .gguf file can be."""
    spec, blocks = canonical.source.spec, range(canonical.source.config.num_hidden_layers)
    names = [f"{spec.block(index)}.{name}" for index in blocks for name in spec.linears]
    return [name for name in names if f"{name}.weight" in canonical.tensors]


def _weights(bits: int, group_size: int, sym: bool) -> dict[str, object]:
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": sym,
        "strategy": "channel" if group_size == -1 else "group",
        "group_size": None if group_size == -1 else group_size,
        "actorder": None,
        "dynamic": False,
    }


# Reading -------------------------------------------------------------------------------------


def recognizes(tensors: LazyTensors, settings: Mapping[str, object]) -> bool:
    """Whether a checkpoint is of this format."""
    return settings.get("quant_method") == METHOD or any(names_with(tensors, "weight_packed"))


def as_gptq(
    path: Path, tensors: LazyTensors, settings: Mapping[str, Any]
) -> tuple[LazyTensors, dict[str, object]]:
    """The same checkpoint with the tensors and settings of "gptq_v2".

    Raises UserError for kinds of the format other than "pack-quantized" of whole numbers, for
    quantized activations, and for tensors that do not go together.
    """
    _check_transforms(path, settings)
    declared = [(_declared(path, group), _targets_of(group)) for group in _groups(path, settings)]
    # Of layers that no group names, but their class.
    others = [weights for weights, targets in declared if not all(map(_is_name, targets))]
    names = names_with(tensors, "weight_packed")
    if not names:
        raise UserError(f"{path}: holds no weight_packed; {MAKE_AGAIN}")
    changes: dict[str, Entry | None] = {}
    layers, symmetric, ordered = [], True, False
    for name in names:
        require(path, tensors, name, "weight_scale", "weight_shape")
        named = [weights for weights, targets in declared if _names(targets, name)]
        layer = _layer(path, tensors, name, named or others)
        layers.append(layer)
        if {weights.get("symmetric") for weights in named or others} == {False}:
            require(path, tensors, name, "weight_zero_point")
        symmetric &= f"{name}.weight_zero_point" not in tensors
        ordered |= f"{name}.weight_g_idx" in tensors
        changes |= _gptq_entries(path, tensors, layer)
    return tensors.changed(changes), translation.gptq_settings(layers, symmetric, ordered)


def _groups(path: Path, settings: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    groups = settings.get("config_groups") or {}
    kinds = [settings.get("format"), *(g.get("format") for g in _records(path, groups))]
    for kind in kinds:
        if kind not in (None, PACKED, "mixed-precision"):
            raise UserError(f"{path}: is compressed-tensors of kind {kind!r}; {PACKED} can be read")
    yield from _records(path, groups)


def _check_transforms(path: Path, settings: Mapping[str, Any]) -> None:
    """Raise UserError for rotations that are not in the weights, but computed as the model runs."""
    transforms = settings.get("transform_config")
    schemes = transforms.get("config_groups") if isinstance(transforms, dict) else transforms
    for scheme in _records(path, schemes or {}):
        for place in _records(path, scheme.get("apply") or []):
            if (location := place.get("location")) not in _IN_WEIGHTS:
                raise UserError(
                    f"{path}: has a transform of each layer's {location}, which is not supported; "
                    "make it again without one, or with what is merged into the weights alone"
                )


def _records(path: Path, groups: object) -> list[dict[str, Any]]:
    """The JSON objects of an object or a list."""
    named = groups.values() if isinstance(groups, dict) else groups
    records = list(named) if isinstance(named, Iterable) else [named]
    checked = [record for record in records if isinstance(record, dict)]
    if len(checked) < len(records):
        raise UserError(f"{path}: its config_groups are no JSON objects; {MAKE_AGAIN}")
    return checked


def _declared(path: Path, group: Mapping[str, Any]) -> Mapping[str, Any]:
    """What one group of layers says of its weights."""
    weights = group.get("weights")
    if group.get("input_activations") or group.get("output_activations"):
        raise UserError(f"{path}: quantizes activations too, which cannot be read; {MAKE_AGAIN}")
    if not isinstance(weights, dict) or weights.get("type", "int") != "int":
        raise UserError(f"{path}: its weights are no whole numbers; {MAKE_AGAIN}")
    return weights


def _targets_of(group: Mapping[str, Any]) -> list[str]:
    """The layers that a group is of; a class of layers if it does not say."""
    targets = group.get("targets")
    return list(map(str, targets)) if isinstance(targets, list) and targets else ["Linear"]


def _is_name(target: str) -> bool:
    """Whether a target names layers, and not their class."""
    return target.startswith("re:") or "." in target


def _names(targets: list[str], name: str) -> bool:
    """Whether targets name a layer, itself or by a regular expression."""
    for target in targets:
        with contextlib.suppress(re.error):
            pattern = target.removeprefix("re:")
            if target == name or (target != pattern and re.match(pattern, name)):
                return True
    return False


def _layer(
    path: Path, tensors: LazyTensors, name: str, declared: list[Mapping[str, Any]]
) -> PackedLayer:
    shape = tensors[f"{name}.weight_shape"].tolist()
    if len(shape) != 2 or min(shape) < 1:
        raise UserError(f"{path}: {name}.weight_shape is {shape}; the file is damaged")
    outputs, inputs = shape
    words = tensors.shape(f"{name}.weight_packed")[-1]
    fitting = [bits for bits in BITS if words == words_for(inputs, bits)]
    stated = [bits for bits in fitting if any(each.get("num_bits") == bits for each in declared)]
    if not fitting:
        raise UserError(
            f"{path}: {name}.weight_packed has {words} words a row, which do not fit {inputs} "
            f"inputs at 2, 3, 4 or 8 bits; {MAKE_AGAIN}"
        )
    scale = tensors.shape(f"{name}.weight_scale")
    groups = scale[1] if len(scale) == 2 else 1
    sizes = [each["group_size"] for each in declared if isinstance(each.get("group_size"), int)]
    size = next((size for size in sizes if size > 0 and -(-inputs // size) == groups), None)
    if size is None and groups == 1:
        size = -1
    elif size is None and inputs % groups == 0:
        size = inputs // groups
    if size is None:
        raise UserError(f"{path}: {name}.weight_scale has {groups} groups of {inputs} inputs")
    return PackedLayer(name, inputs, outputs, (stated or fitting)[0], groups, size)


def _gptq_entries(path: Path, tensors: LazyTensors, layer: PackedLayer) -> dict[str, Entry | None]:
    name = layer.name
    words = words_for(layer.inputs, layer.bits)
    translation.check_shape(path, tensors, f"{name}.weight_packed", (layer.outputs, words))
    own: dict[str, Entry | None] = {
        f"{name}.weight_packed": None,
        f"{name}.weight_scale": None,
        f"{name}.weight_shape": None,
        f"{name}.weight_zero_point": None,
        f"{name}.weight_g_idx": None,
        f"{name}.qweight": translation.qweight(
            layer, partial(translation.transposed, tensors, f"{name}.weight_packed")
        ),
        f"{name}.scales": translation.scales(
            layer, partial(_scales, tensors, layer), tensors.dtype(f"{name}.weight_scale")
        ),
        f"{name}.qzeros": _zeros(path, tensors, layer),
    }
    scale = tensors.shape(f"{name}.weight_scale")
    if scale not in ((layer.outputs, layer.groups), (layer.outputs,), (1,), ()):
        translation.check_shape(
            path, tensors, f"{name}.weight_scale", (layer.outputs, layer.groups)
        )
    if f"{name}.weight_g_idx" in tensors:
        own[f"{name}.g_idx"] = tensors.entry(f"{name}.weight_g_idx")
    return own


def _scales(tensors: LazyTensors, layer: PackedLayer) -> Tensor:
    """(groups, out); one scale of a whole layer is everybody's."""
    scale = tensors[f"{layer.name}.weight_scale"]
    columns = scale.reshape(-1, layer.groups) if scale.dim() < 2 else scale
    return columns.expand(layer.outputs, layer.groups).T.contiguous()


def _zeros(path: Path, tensors: LazyTensors, layer: PackedLayer) -> Entry:
    name = f"{layer.name}.weight_zero_point"
    if name not in tensors:
        return translation.symmetric_zeros(layer)
    if tensors.dtype(name) == torch.int32:
        words = words_for(layer.outputs, layer.bits)
        translation.check_shape(path, tensors, name, (words, layer.groups))
        return translation.qzeros(layer, partial(translation.transposed, tensors, name))
    # Before version 0.10 zero points were not packed: int8 (out, groups), less 2**(bits - 1).
    translation.check_shape(path, tensors, name, (layer.outputs, layer.groups))
    return translation.qzeros(layer, partial(_signed_zeros, tensors, layer))


def _signed_zeros(tensors: LazyTensors, layer: PackedLayer) -> Tensor:
    signed = tensors[f"{layer.name}.weight_zero_point"].to(torch.int32)
    return pack_zeros(signed.T + 2 ** (layer.bits - 1), layer.bits, zero_offset=0)
