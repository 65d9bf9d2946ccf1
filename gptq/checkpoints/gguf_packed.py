"""The packed layers of a .gguf file: its integers as a checkpoint of format "gptq_v2" has them.

Layers of type Q4_0 and Q8_0 are symmetric. One of type Q4_1 has integers for zero points if each
minimum is a whole number of steps, as it is in files of this package; in those of other tools it is
not, and the layer is left dequantized, as layers of all other types are.
"""

import re
import warnings
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from gguf import GGMLQuantizationType as GgmlType
from torch import Tensor

from gptq.blockwise.gguf_model import GgufModel, open_gguf, open_names
from gptq.checkpoints.settings import SETTINGS_KEY, parse
from gptq.checkpoints.widths import declared_group_sizes
from gptq.files.gguf_blocks import BITS, BLOCK, ZEROS, floats, integers, row_bytes
from gptq.files.gguf_file import GgufTensor
from gptq.files.lazy import Entries, Entry, LazyTensors
from gptq.files.spans import read_span
from quant_cuda.packing import pack, pack_zeros, words_for

# How far from a whole number of steps a minimum can be that was rounded to float16, in steps.
_MINIMUM_ERROR = 16 * 2.0**-11


def open_packed(path: Path) -> tuple[LazyTensors, dict[str, object]]:
    """The file's tensors by Hugging Face's names, packed layers in the normal form of `layouts`,
    and what is known of the quantization by the keys of quantize_config.json.

    An embedding and a head are packed only if a layer of a block is: otherwise nothing is, and
    there are no settings. Reads all Q4_1 layers once. Raises UserError as `open_gguf`.
    """
    model, tensors = open_names(path), open_gguf(path)
    packed = _packable(model)
    inner = [full for full in model.tensors if full in packed and _in_block(model, full)]
    if not inner:
        return tensors, {}
    declared = _declared(model)
    sizes = _group_sizes(model, inner, declared)
    widths = Counter((BITS[_stored(model, full).type], size) for full, size in sizes.items())
    base, size = max(widths, key=lambda width: widths[width])
    entries: Entries = {}
    for full in tensors:
        if full in packed:
            entries |= _layer(model, full, sizes.get(full, BLOCK))
        else:
            entries[full] = tensors.entry(full)
    settings = {
        **declared,
        "quant_method": "gptq",
        "bits": base,
        "group_size": size,
        "sym": all(ZEROS[_stored(model, name).type] is not None for name in packed),
        "desc_act": False,
        "checkpoint_format": "gptq_v2",
        "format": "gptq_v2",
        "dynamic": _exceptions(model, sizes, (base, size)) or None,
    }
    return LazyTensors(entries, tensors.metadata), settings


def has_packed(path: Path) -> bool:
    """Whether `open_packed` finds packed layers. Raises UserError as `open_gguf`."""
    model = open_names(path)
    inner = [name for name in model.tensors if _in_block(model, name)]
    # The first that is found ends the search; if there is none, a warning may say why.
    return any(_is_packable(model, name) for name in inner) or bool(_packable(model) & {*inner})


def _packable(model: GgufModel) -> set[str]:
    """Hugging Face's names of the weights that can stay packed."""
    packed = {name for name in model.tensors if _is_packable(model, name)}
    kept = [
        name
        for name in model.tensors
        if name not in packed and _stored(model, name).type == GgmlType.Q4_1
    ]
    if kept:
        warnings.warn(
            f"{model.header.path}: {len(kept)} of its Q4_1 layers, such as "
            f"{model.tensors[kept[0]]}, have minima that are no whole number of steps; these are "
            "dequantized",
            stacklevel=2,
        )
    return packed


def _stored(model: GgufModel, full: str) -> GgufTensor:
    return model.header.tensors[model.tensors[full]]


def _in_block(model: GgufModel, full: str) -> bool:
    return full.startswith(f"{model.spec.blocks}.")


def _is_packable(model: GgufModel, full: str) -> bool:
    stored = _stored(model, full)
    if stored.type not in BITS or len(stored.shape) != 2 or not full.endswith(".weight"):
        return False
    if not (model.spec.packs_embedding or _in_block(model, full)):
        return False
    d, m = _floats(model, full) if stored.type == GgmlType.Q4_1 else (None, None)
    return d is None or m is None or _zeros(d, m) is not None


def _stored_rows(model: GgufModel, full: str) -> Tensor:
    """A weight's blocks as bytes, uint8 (out, bytes of a row), in Hugging Face's order of rows."""
    stored = _stored(model, full)
    outputs, inputs = stored.shape
    shape = (outputs, row_bytes(stored.type, inputs))
    raw = read_span(model.header.path, stored.start, torch.uint8, shape)
    rows = model.rows(model.tensors[full])
    return raw if rows is None else raw[rows]


def _floats(model: GgufModel, full: str) -> tuple[Tensor, Tensor | None]:
    return floats(_stored(model, full).type, _stored_rows(model, full))


def _zeros(d: Tensor, m: Tensor) -> Tensor | None:
    """The zero points of Q4_1 blocks, uint8 (out, in / 32); None if they are no integers."""
    d, m = d.float(), m.float()
    # A block of zeros has no scale.
    steps = torch.where((d == 0) & (m == 0), torch.zeros_like(m), -m / d)
    zeros = steps.round()
    whole = ((steps - zeros).abs() <= _MINIMUM_ERROR) & (zeros >= 0) & (zeros <= 15)
    return zeros.to(torch.uint8) if bool(whole.all()) else None


# Settings ------------------------------------------------------------------------------------


def _declared(model: GgufModel) -> dict[str, object]:
    """The settings that this package wrote into the file; empty for another's."""
    text = model.header.metadata.get(SETTINGS_KEY)
    return {} if text is None else parse(model.header.path, text)


def _group_sizes(
    model: GgufModel, packed: list[str], declared: Mapping[str, object]
) -> dict[str, int]:
    """Of each weight the group size that the file declares; BLOCK for all if blocks of some group
    are not alike."""
    names = {full: full.removesuffix(".weight") for full in packed}
    own = declared_group_sizes(declared, names.values())
    sizes = {}
    for full, name in names.items():
        size = own[name] or declared.get("group_size")
        if type(size) is not int or (size != -1 and (size < 1 or size % BLOCK)):
            return dict.fromkeys(packed, BLOCK)
        if size != BLOCK and not all(_alike(it, size) for it in _floats(model, full)):
            return dict.fromkeys(packed, BLOCK)
        sizes[full] = size
    return sizes


def _alike(part: Tensor | None, size: int) -> bool:
    """Whether blocks of a group have the same value. part: (out, in / 32)."""
    return part is None or torch.equal(part, part[:, _first_blocks(part.shape[1], size)])


def _first_blocks(count: int, size: int) -> Tensor:
    """Of each block the first in its group, int64 (blocks,)."""
    number = torch.arange(count)
    return number * 0 if size == -1 else number - number % (size // BLOCK)


def _exceptions(
    model: GgufModel, sizes: Mapping[str, int], base: tuple[int, int]
) -> dict[str, object]:
    """Layers of blocks unlike the most, as GPTQModel's `dynamic` names them.

    sizes: the group size of each packed one. base: bits and group size of the most.
    """
    exceptions: dict[str, object] = {}
    for full in model.tensors:
        name, _, kind = full.rpartition(".")
        linear = kind == "weight" and len(_stored(model, full).shape) == 2
        if not linear or not _in_block(model, full):
            continue
        pattern = f"^{re.escape(name)}$"
        if full not in sizes:
            exceptions[f"-:{pattern}"] = {}
            continue
        width = BITS[_stored(model, full).type], sizes[full]
        if width != base:
            exceptions[f"+:{pattern}"] = {"bits": width[0], "group_size": width[1]}
    return exceptions


# One layer -----------------------------------------------------------------------------------


def _layer(model: GgufModel, full: str, size: int) -> Entries:
    """A packed layer's tensors. size: inputs that share a scale, all of whose blocks are alike."""
    outputs, inputs = _stored(model, full).shape
    bits, name = BITS[_stored(model, full).type], full.removesuffix(".weight")
    first = _first_blocks(inputs // BLOCK, size).unique()
    groups = len(first)
    return {
        f"{name}.qweight": Entry(
            partial(_qweight, model, full), (words_for(inputs, bits), outputs), torch.int32
        ),
        f"{name}.qzeros": Entry(
            partial(_qzeros, model, full, first), (groups, words_for(outputs, bits)), torch.int32
        ),
        f"{name}.scales": Entry(
            partial(_scales, model, full, first), (groups, outputs), torch.float16
        ),
    }


def _qweight(model: GgufModel, full: str) -> Tensor:
    kind = _stored(model, full).type
    return pack(integers(kind, _stored_rows(model, full)).T, BITS[kind])


def _qzeros(model: GgufModel, full: str, first: Tensor) -> Tensor:
    stored = _stored(model, full)
    shape, fixed = (len(first), stored.shape[0]), ZEROS[stored.type]
    if fixed is not None:
        return pack_zeros(torch.full(shape, fixed), BITS[stored.type], zero_offset=0)
    d, m = _floats(model, full)
    assert m is not None
    zeros = _zeros(d, m)
    assert zeros is not None
    return pack_zeros(zeros[:, first].T, BITS[stored.type], zero_offset=0)


def _scales(model: GgufModel, full: str, first: Tensor) -> Tensor:
    d, _ = _floats(model, full)
    return d[:, first].T.contiguous()
