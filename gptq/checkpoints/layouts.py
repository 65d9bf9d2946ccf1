"""Packed layers in the layouts of all GPTQ tools, recognised by their tensors and normalised.

In the normal form a layer has `qweight`, `qzeros` and `scales`, and if it needs them `g_idx` and
`bias`, all as docs/format.md defines them.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from gptq.errors import UserError
from gptq.files.lazy import Entry, LazyTensors
from quant_cuda.packing import BITS, pack_zeros, unpack, words_for
from quant_cuda.weight import group_count

# Sizes that quantizers offer, tried in this order if a file does not declare its own.
GROUP_SIZES = (128, 64, 32, 16, 256, 512, 1024)
# Values of checkpoint_format that can be read.
READABLE = ("gptq", "gptq_v2")
# quant_method of AutoRound's files; older versions wrote the second.
_AUTOROUND = ("auto-round", "intel/auto-round")
# Endings of tensor names by which other layouts are recognised, and what to call them.
_OTHER_LAYOUTS = {
    ".B": "in the marlin layout",
    ".q_weight": "in the EXL2 layout",
    ".weight.quant_state.bitsandbytes__nf4": "quantized by bitsandbytes",
}
_CONVERT = "give the checkpoint in GPTQ's own format, as the tool that made it can write it"


@dataclass(frozen=True)
class StoredLayer:
    """One packed layer, as its tensors' shapes describe it."""

    name: str
    inputs: int
    outputs: int
    bits: int
    groups: int


@dataclass(frozen=True)
class PackedLayer(StoredLayer):
    """A packed layer whose group size is known."""

    group_size: int
    """Inputs that share a scale; -1 is one group of all."""


@dataclass(frozen=True)
class Packed:
    """A checkpoint in the normal form."""

    tensors: LazyTensors
    layers: tuple[StoredLayer, ...]
    zero_offset: int
    """1 if `qzeros` hold the zero points less 1 ("gptq"), 0 if as they are ("gptq_v2")."""
    lost_zeros: int
    """Zero points that the tool which wrote the file destroyed; they read as 0."""
    as_stored: bool
    """Whether the file's own tensors are in the normal form already."""


def normal_form(
    path: Path,
    tensors: LazyTensors,
    settings: Mapping[str, object],
    sizes: Mapping[str, tuple[int, int]],
) -> Packed:
    """Recognise the layout of the tensors and normalise it.

    path: named in messages only. settings: what the file declares, maybe nothing.
    sizes: (in_features, out_features) of the layers that may be packed, by name.
    Reads every zero point and scale once. Raises UserError for layouts that are not GPTQ's, for
    shapes and types that do not go together, and for values that show the file to be damaged.
    """
    check_layout(path, tensors, settings)
    names = [name for name in sizes if f"{name}.qweight" in tensors]
    layers = tuple(_layer(path, name, sizes[name], tensors) for name in names)
    floating = {layer.name for layer in layers if f"{layer.name}.qzeros" not in tensors}
    changes = _normal_entries(path, layers, tensors)
    tensors = tensors.changed(changes)
    ranges = {}
    for layer in layers:
        _check_scales(path, layer, tensors)
        fields = _fields(layer, tensors)
        ranges[layer] = (int(fields.min()), int(fields.max())) if fields.numel() else (0, 0)
    offset = 0 if floating else _zero_offset(ranges, settings)
    under = [layer for layer, (_, most) in ranges.items() if most == 2**layer.bits - 1]
    if floating and len(floating) < len(layers):
        raise UserError(f"{path}: has both 'zeros' and 'qzeros', of two tools; {_CONVERT}")
    if offset == 0 or not under:
        return Packed(tensors, layers, offset, 0, not changes)
    zeros = {
        name: tensors.entry(name)._replace(read=partial(_without_underflow, layer, tensors))
        for layer in layers
        for name in (f"{layer.name}.qzeros",)
    }
    lost = sum(_lost_zeros(layer, tensors) for layer in under)
    return Packed(tensors.changed(zeros), layers, 0, lost, as_stored=False)


def check_layout(path: Path, names: Iterable[str], settings: Mapping[str, object]) -> None:
    """Raise UserError for a checkpoint in a layout that is not GPTQ's."""
    method = settings.get("quant_method", "gptq")
    layout = settings.get("checkpoint_format", settings.get("format"))
    if method in _AUTOROUND and "gptq" in str(settings.get("packing_format")):
        layout = "gptq"
    elif method != "gptq":
        raise UserError(f"{path}: says it is quantized by {method!r}, not by GPTQ; {_CONVERT}")
    if layout not in (None, *READABLE):
        raise UserError(f"{path}: says its format is {layout!r}; {_CONVERT}")
    dtype = settings.get("pack_dtype", "int32")
    if dtype != "int32":
        raise UserError(f"{path}: says its words are {dtype!r}, not int32; {_CONVERT}")
    for name in names:
        for ending, what in _OTHER_LAYOUTS.items():
            if name.endswith(ending):
                raise UserError(f"{path}: is {what} ({name}); {_CONVERT}")


def group_size(
    path: Path,
    layers: Iterable[StoredLayer],
    declared: int | None,
    tensors: Mapping[str, Tensor],
) -> int:
    """The inputs that share a scale, from every layer's number of groups.

    declared: by the file or the caller; checked.
    Raises UserError if no size explains all layers.
    """
    layers = list(layers)

    def fits(size: int) -> bool:
        return all(group_count(layer.inputs, size) == layer.groups for layer in layers)

    if declared is not None:
        if declared != -1 and declared < 1:
            raise UserError(f"{path}: says group_size is {declared}, which cannot be")
        if not fits(declared):
            odd = next(s for s in layers if group_count(s.inputs, declared) != s.groups)
            raise UserError(
                f"{path}: {odd.name} has {odd.groups} groups of {odd.inputs} inputs, not what "
                f"groups of {declared} give; leave --groupsize out or correct it"
            )
        return declared
    if fits(-1):
        return -1
    # Each group but the last is full, so that group 0 shows the size, whatever the order.
    counted = {
        int((tensors[f"{layer.name}.g_idx"] == 0).sum())
        for layer in layers
        if layer.groups > 1 and f"{layer.name}.g_idx" in tensors
    }
    sizes = [size for size in (*sorted(counted), *GROUP_SIZES) if size > 0 and fits(size)]
    if not sizes:
        raise UserError(f"{path}: does not say its group size; give --groupsize")
    return sizes[0]


# One layer -----------------------------------------------------------------------------------


def _layer(path: Path, name: str, size: tuple[int, int], tensors: LazyTensors) -> StoredLayer:
    inputs, outputs = size
    zeros = "qzeros" if f"{name}.qzeros" in tensors else "zeros"
    for key in ("scales", zeros):
        if f"{name}.{key}" not in tensors:
            key = "qzeros" if key == "zeros" else key
            raise UserError(f"{path}: {name}.{key} is absent; copy or download the file again")
    for key, floating in (
        ("qweight", False),
        (zeros, zeros == "zeros"),
        ("scales", True),
        ("g_idx", False),
        ("bias", True),
    ):
        tensor = f"{name}.{key}"
        if tensor in tensors and not _fitting_type(tensors.dtype(tensor), floating, key):
            raise UserError(f"{path}: {tensor} is of type {tensors.dtype(tensor)}; {_CONVERT}")
    qweight, scales = tensors.shape(f"{name}.qweight"), tensors.shape(f"{name}.scales")
    if len(qweight) != 2 or len(scales) != 2:
        raise UserError(f"{path}: {name}.qweight or {name}.scales is not a matrix; make it again")
    bits = _layer_bits(size, qweight[0], tensors.shape(f"{name}.{zeros}")[-1:])
    if bits is None or qweight[1] != outputs:
        raise UserError(f"{path}: {name}.qweight {_misfit(qweight, inputs, outputs)}")
    column = zeros == "zeros" and scales == (outputs, 1)
    layer = StoredLayer(name, inputs, outputs, bits, 1 if column else scales[0])
    expected = {
        "scales": scales if column else (layer.groups, outputs),
        zeros: scales if zeros == "zeros" else (layer.groups, words_for(outputs, bits)),
        "g_idx": (inputs,),
        "bias": (outputs,),
    }
    for key, shape in expected.items():
        tensor = f"{name}.{key}"
        if tensor in tensors and tensors.shape(tensor) != shape:
            raise UserError(
                f"{path}: {tensor} has shape {tensors.shape(tensor)} where {shape} goes with the "
                "rest; the file is damaged or made by a tool that cut off what it could not pack"
            )
    return layer


def _layer_bits(size: tuple[int, int], rows: int, columns: tuple[int, ...]) -> int | None:
    """The bits at which a layer has `rows` rows of packed words, None if there are none.

    Of a narrow layer several can, since rows are rounded up: then the width of the zero points
    decides, columns, and then which of them fills whole words.
    """
    inputs, outputs = size
    fitting = [bits for bits in BITS if rows == words_for(inputs, bits)]

    def likelihood(bits: int) -> tuple[bool, bool]:
        return columns == (words_for(outputs, bits),), inputs * bits % 32 == 0

    return max(fitting, key=likelihood, default=None)


def stored_bits(tensors: LazyTensors, name: str) -> int:
    """The bits of a packed layer in the normal form, by its zero points.

    A group has a zero point for each output, packed into words at the weights' own bits.
    """
    outputs, words = (tensors.shape(f"{name}.{key}")[1] for key in ("qweight", "qzeros"))
    return max(bits for bits in BITS if words_for(outputs, bits) <= words)


def _fitting_type(dtype: torch.dtype, floating: bool, key: str) -> bool:
    if floating:
        return dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    return dtype == torch.int32 or (key == "g_idx" and dtype == torch.int64)


def _misfit(shape: tuple[int, ...], inputs: int, outputs: int) -> str:
    for bits in BITS:
        if shape[0] == inputs // 256 * 8 * bits:
            return (
                f"lacks the last {inputs % 256} of {inputs} inputs, which the tool that wrote it "
                "dropped; quantize the model again"
            )
    return (
        f"has shape {shape}, which does not fit {inputs} inputs and {outputs} outputs at 2, 3, 4 "
        "or 8 bits; it is another model's"
    )


def _normal_entries(
    path: Path, layers: tuple[StoredLayer, ...], tensors: LazyTensors
) -> dict[str, Entry | None]:
    """Tensors that are converted to the normal form when they are read; None for those to omit."""
    changes: dict[str, Entry | None] = {}
    for layer in layers:
        g_idx, scales = f"{layer.name}.g_idx", tensors.entry(f"{layer.name}.scales")
        if f"{layer.name}.qzeros" not in tensors:
            zeros = (layer.groups, words_for(layer.outputs, layer.bits))
            read = partial(_packed_zeros, path, layer, tensors)
            changes[f"{layer.name}.qzeros"] = Entry(read, zeros, torch.int32)
            changes[f"{layer.name}.zeros"] = None
            if scales.shape[0] != layer.groups:
                read = partial(_transposed, tensors, f"{layer.name}.scales")
                changes[f"{layer.name}.scales"] = Entry(read, scales.shape[::-1], scales.dtype)
        if g_idx in tensors and layer.groups > 1 and not bool(tensors[g_idx].any()):
            # Some tools write zeros if groups are runs of neighbours.
            changes[g_idx] = None
        elif g_idx in tensors and tensors.dtype(g_idx) != torch.int32:
            read = partial(_narrowed, tensors, g_idx)
            changes[g_idx] = Entry(read, tensors.shape(g_idx), torch.int32)
    return changes


def _transposed(tensors: LazyTensors, name: str) -> Tensor:
    return tensors[name].T.contiguous()


def _narrowed(tensors: LazyTensors, name: str) -> Tensor:
    return tensors[name].clamp(-1, 2**31 - 1).to(torch.int32)


def _packed_zeros(path: Path, layer: StoredLayer, tensors: LazyTensors) -> Tensor:
    """`qzeros` as "gptq_v2" has them, from floating zero * scale."""
    scaled = tensors[f"{layer.name}.zeros"].double()
    zeros = scaled / tensors[f"{layer.name}.scales"].double()
    whole = zeros.round()
    # float32 products of whole numbers and a scale come back whole to seven digits.
    in_range = bool(((whole >= 0) & (whole < 2**layer.bits)).all())
    if not in_range or bool(((zeros - whole).abs() > 0.01).any()):
        raise UserError(f"{path}: {layer.name}.zeros are not zero points times scales; {_CONVERT}")
    transposed = whole.T if tensors.shape(f"{layer.name}.scales")[0] != layer.groups else whole
    return pack_zeros(transposed.to(torch.int64), layer.bits, zero_offset=0)


# Zero points ---------------------------------------------------------------------------------


def _check_scales(path: Path, layer: StoredLayer, tensors: LazyTensors) -> None:
    if not bool(torch.isfinite(tensors[f"{layer.name}.scales"]).all()):
        raise UserError(
            f"{path}: {layer.name}.scales hold NaN or infinity; the file is damaged, copy or "
            "download it again"
        )


def _fields(layer: StoredLayer, tensors: LazyTensors) -> Tensor:
    """The stored zero points, uint8 (out, groups)."""
    words = tensors[f"{layer.name}.qzeros"]
    return unpack(words.T.contiguous(), layer.bits, layer.outputs)


def _zero_offset(
    ranges: Mapping[StoredLayer, tuple[int, int]], settings: Mapping[str, object]
) -> int:
    """What is to be added to stored fields. ranges: each layer's least and greatest field."""
    label, sym = settings.get("checkpoint_format", settings.get("format")), settings.get("sym")
    # A symmetric zero point is known, so that its fields tell how they are stored, whatever the
    # label says: tools have mixed the two up.
    if sym is True or (sym is None and label is None):
        for offset in (0, 1):
            middles = {layer: 2 ** (layer.bits - 1) - offset for layer in ranges}
            if all(ranges[layer] == (middle, middle) for layer, middle in middles.items()):
                return offset
    return 0 if label == "gptq_v2" else 1


def _lost_zeros(layer: StoredLayer, tensors: LazyTensors) -> int:
    """Fields of all ones above another one in their word.

    A zero point of 0 was stored as -1, whose sign bits ran over all higher fields of the word.
    """
    ones = _fields(layer, tensors) == 2**layer.bits - 1
    per_word = torch.arange(1, len(ones)) * layer.bits % 32 >= layer.bits
    return int((ones[1:] & ones[:-1])[per_word].sum())


def _without_underflow(layer: StoredLayer, tensors: LazyTensors) -> Tensor:
    """`qzeros` as "gptq_v2" has them, if fields of all ones mean zero points of 0."""
    zeros = (_fields(layer, tensors).to(torch.int64) + 1) % 2**layer.bits
    return pack_zeros(zeros.T, layer.bits, zero_offset=0)
