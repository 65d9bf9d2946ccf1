"""Opening a quantized checkpoint of any tool, and replacing a model's layers by packed ones."""

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from gptq.blockwise.empty_model import replace
from gptq.blockwise.source import to_todays_names
from gptq.blockwise.ties import resolve_ties
from gptq.blockwise.weight_files import open_packed_weights
from gptq.checkpoints.foreign import as_gptq
from gptq.checkpoints.layouts import Packed, PackedLayer, StoredLayer, group_size, normal_form
from gptq.checkpoints.settings import (
    SETTINGS_KEY,
    declared_integer,
    folder_settings,
    parse,
    settings_folder,
)
from gptq.checkpoints.widths import declared_group_sizes, has_exceptions
from gptq.errors import SettingError, UserError
from gptq.files.lazy import LazyTensors
from gptq.files.opening import open_tensors
from gptq.files.torch_file import check_sums
from gptq.models import ModelSpec
from gptq.nn import (
    GROUP_SIZE_KEY,
    ZERO_OFFSET_KEY,
    QuantEmbedding,
    QuantLinear,
    TiedHead,
    format_of,
)


@dataclass(frozen=True)
class Checkpoint:
    """Packed tensors by Hugging Face's names, read when asked for, and how to read them."""

    path: Path
    tensors: LazyTensors
    """In the normal form of `layouts`."""
    layers: tuple[PackedLayer, ...]
    bits: int
    """Of the layers that are no exceptions; a file can declare some."""
    group_size: int
    """Likewise."""
    zero_offset: int
    """1 if `qzeros` hold the zero points less 1 ("gptq"), 0 if as they are ("gptq_v2")."""
    settings: Mapping[str, object]
    """What the file declares, by the keys of quantize_config.json; empty if nothing."""
    as_stored: bool
    """Whether the file's own tensors are in the normal form already."""


def open_checkpoint(path: Path) -> tuple[LazyTensors, dict[str, object]]:
    """Tensors and settings of a file or folder, those of other formats read as GPTQ's."""
    return as_gptq(path, *_open_stored(path))


def _open_stored(path: Path) -> tuple[LazyTensors, dict[str, object]]:
    if not path.exists():
        raise UserError(f"{path}: no such checkpoint; give a .pt or .safetensors file or a folder")
    if path.suffix == ".gguf":
        # Only here: that format's package is read for nothing else.
        from gptq.checkpoints.gguf_packed import open_packed

        return open_packed(path)
    if not path.is_dir():
        opened = open_tensors([path])
        check_sums(path)
        declared = opened.metadata.get(SETTINGS_KEY)
        if declared is not None:
            settings = parse(path, declared)
        else:
            # A file that declares nothing may be of a folder whose configuration does.
            folder = settings_folder(path)
            settings = {} if folder is None else folder_settings(folder)
        return opened, {**settings, **_modules_format(path, opened.metadata)}
    return open_packed_weights(path), folder_settings(path)


def _modules_format(path: Path, metadata: Mapping[str, object]) -> dict[str, object]:
    """`checkpoint_format`, and group sizes that differ, if packed modules have left them in the
    state dict that the file holds."""
    modules = {
        name: module
        for name, module in metadata.items()
        if isinstance(module, dict) and ZERO_OFFSET_KEY in module
    }
    if not modules:
        return {}
    first, *others = (module[ZERO_OFFSET_KEY] for module in modules.values())
    if first not in (0, 1) or any(offset != first for offset in others):
        raise UserError(
            f"{path}: its layers are not all of one format; save one model's state dict"
        )
    sizes = {name: module.get(GROUP_SIZE_KEY) for name, module in modules.items()}
    rules = {f"+:^{re.escape(name)}$": {GROUP_SIZE_KEY: size} for name, size in sizes.items()}
    alike = len(set(sizes.values())) == 1
    return {"checkpoint_format": format_of(first), **({} if alike else {"dynamic": rules})}


def attach(
    model: PreTrainedModel,
    spec: ModelSpec,
    path: Path,
    bits: int | None = None,
    group_size: int | None = None,
) -> Checkpoint:
    """Open a `.pt`, `.safetensors` or Hugging Face folder and replace the layers it has packed.

    model: without weights, from `empty_model.build`. A QuantLinear replaces every linear layer that
        is packed. Of the weights only scales and zero points are read.
    bits, group_size: only for files that do not declare them; else told from tensors' shapes.
    Raises UserError if an argument disagrees with the file, if nothing tells, or if the file holds
    tensors that the model has no place for.
    """
    raw, settings = open_checkpoint(path)
    tensors = raw.renamed(to_todays_names(spec))
    config, tensors = resolve_ties(model.config, spec, tensors)
    model.config.tie_word_embeddings = config.tie_word_embeddings
    checkpoint = place(model, path, tensors, settings, bits=bits, group_size=group_size)
    _check_all_placed(model, checkpoint)
    return checkpoint


def place(
    model: PreTrainedModel,
    path: Path,
    tensors: LazyTensors,
    settings: Mapping[str, object],
    *,
    bits: int | None = None,
    group_size: int | None = None,
    keep_bias: bool = False,
) -> Checkpoint:
    """Replace every packed layer by a QuantLinear or QuantEmbedding on the meta device.

    A head that is tied to a packed embedding becomes a TiedHead.

    tensors: by the model's own names. keep_bias: give every layer that has a bias in the file one,
        also if it is all zeros and the model has none.
    Raises UserError as `attach`.
    """
    places = _places(model)
    packed = normal_form(path, tensors, settings, {name: _size(m) for name, m in places.items()})
    ends = _ends(model, places)
    inner = tuple(layer for layer in packed.layers if layer.name not in ends)
    _check_any_packed(path, packed, inner, tensors, places)
    if packed.lost_zeros:
        warnings.warn(
            f"{path}: the tool that wrote it destroyed {packed.lost_zeros} zero points, which are "
            "read as 0; quantize the model again",
            stacklevel=2,
        )
    bits = _agreed(path, settings, "bits", bits)
    group_size = _agreed(path, settings, "group_size", group_size)
    # An embedding and a head may have bits and groups of their own, which nothing declares.
    inner = inner or packed.layers
    mixed = has_exceptions(settings)
    base_bits = _bits(path, inner, bits, mixed)
    exceptions = declared_group_sizes(settings, [layer.name for layer in inner]) if mixed else None
    base_size, layers = _with_group_sizes(path, packed, inner, group_size, exceptions)
    for layer in layers:
        _check_g_idx(path, layer, packed.tensors)
        if isinstance(places[layer.name], nn.Embedding):
            _replace_embedding(model, layer, packed.zero_offset)
            continue
        linear = cast(nn.Linear, places[layer.name])
        bias = keep_bias and f"{layer.name}.bias" in tensors
        bias = bias or _has_bias(packed.tensors, layer.name, linear)
        replace(model, layer.name, _quant_linear(layer, packed, bias))
    return Checkpoint(
        path,
        packed.tensors,
        layers,
        base_bits,
        base_size,
        packed.zero_offset,
        settings=settings,
        as_stored=packed.as_stored,
    )


# Replacing layers ----------------------------------------------------------------------------


def _places(model: nn.Module) -> dict[str, nn.Linear | nn.Embedding]:
    """The modules whose weight may be packed, by name."""
    kinds = (nn.Linear, nn.Embedding)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def _size(module: nn.Linear | nn.Embedding) -> tuple[int, int]:
    """Inputs and outputs; an embedding is the linear layer that a head tied to it would be."""
    if isinstance(module, nn.Embedding):
        return module.embedding_dim, module.num_embeddings
    return module.in_features, module.out_features


def _ends(model: PreTrainedModel, places: Mapping[str, nn.Module]) -> set[str]:
    """Names of the embeddings and of the output head."""
    head = model.get_output_embeddings()
    return {name for name, m in places.items() if isinstance(m, nn.Embedding) or m is head}


def _quant_linear(layer: PackedLayer, packed: Packed, bias: bool) -> QuantLinear:
    return QuantLinear(
        layer.inputs,
        layer.outputs,
        layer.bits,
        layer.group_size,
        groups=layer.groups,
        bias=bias,
        g_idx=f"{layer.name}.g_idx" in packed.tensors,
        zero_offset=packed.zero_offset,
        device="meta",
    )


def _replace_embedding(model: PreTrainedModel, layer: PackedLayer, zero_offset: int) -> None:
    head, tied = model.get_output_embeddings(), model.config.tie_word_embeddings
    embedding = QuantEmbedding(
        layer.outputs,
        layer.inputs,
        layer.bits,
        layer.group_size,
        groups=layer.groups,
        zero_offset=zero_offset,
        dtype=model.dtype,
        device="meta",
    )
    if (
        tied
        and head is not None
        and model.get_submodule(layer.name) is model.get_input_embeddings()
    ):
        name = next(name for name, module in model.named_modules() if module is head)
        replace(model, name, TiedHead(embedding))
    replace(model, layer.name, embedding)


# Bits and group sizes ------------------------------------------------------------------------


def _agreed(
    path: Path, settings: Mapping[str, object], key: str, argument: int | None
) -> int | None:
    """What the file declares, else the argument. Raises UserError if they disagree."""
    declared = declared_integer(path, settings, key)
    if None not in (argument, declared) and argument != declared:
        raise SettingError(
            key, argument, f"disagrees with {path}, which says {declared}; leave it out"
        )
    return argument if declared is None else declared


def _bits(path: Path, layers: tuple[StoredLayer, ...], bits: int | None, mixed: bool) -> int:
    if bits is None:
        return layers[0].bits
    for layer in layers:
        if layer.bits != bits and not mixed:
            raise UserError(f"{path}: {layer.name} holds {layer.bits}-bit weights, not {bits}-bit")
    return bits


def _with_group_sizes(
    path: Path,
    packed: Packed,
    inner: tuple[StoredLayer, ...],
    size: int | None,
    exceptions: Mapping[str, int | None] | None,
) -> tuple[int, tuple[PackedLayer, ...]]:
    """The group size of the inner layers, and all layers with their own.

    exceptions: what is declared of single layers; None if all are alike.
    """
    if exceptions is None:
        size = group_size(path, inner, size, packed.tensors)
    layers = []
    for layer in packed.layers:
        # An embedding's or head's own groups could be miscounted by a size like the others'.
        own = size if layer in inner else None
        if exceptions is not None or layer not in inner:
            own = (exceptions or {}).get(layer.name) or own
            own = _own_group_size(path, layer, own, packed.tensors)
        assert own is not None
        layers.append(PackedLayer(**vars(layer), group_size=own))
    base = next(layer.group_size for layer in layers if layer.name == inner[0].name)
    return (base if size is None else size), tuple(layers)


def _own_group_size(
    path: Path, layer: StoredLayer, declared: int | None, tensors: LazyTensors
) -> int:
    try:
        return group_size(path, [layer], declared, tensors)
    except UserError:
        return group_size(path, [layer], None, tensors)


# Checks --------------------------------------------------------------------------------------


def _check_any_packed(
    path: Path,
    packed: Packed,
    inner: tuple[StoredLayer, ...],
    tensors: LazyTensors,
    places: Mapping[str, nn.Module],
) -> None:
    # Heads and embeddings can have the same names in models that have nothing else in common.
    others = not inner and any(
        name.endswith(".qweight") and name.removesuffix(".qweight") not in places
        for name in tensors
    )
    if others or not packed.layers:
        raise UserError(
            f"{path}: "
            + ("its packed layers are another model's" if others else "holds no packed weights")
            + "; give a checkpoint that was made from this model"
        )


def _check_g_idx(path: Path, layer: PackedLayer, tensors: LazyTensors) -> None:
    g_idx = tensors.get(f"{layer.name}.g_idx")
    if g_idx is not None and not 0 <= int(g_idx.min()) <= int(g_idx.max()) < layer.groups:
        raise UserError(
            f"{path}: {layer.name}.g_idx: holds groups {int(g_idx.min())}..{int(g_idx.max())} "
            f"where there are 0..{layer.groups - 1}; the file is damaged"
        )


def _check_all_placed(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    wanted = set(model.state_dict())
    extra = [
        name
        for name in checkpoint.tensors
        if name not in wanted and not _ignorable(name, checkpoint.tensors)
    ]
    if extra:
        raise UserError(
            f"{checkpoint.path}: {extra[0]} has no place in the model"
            + (f", nor have {len(extra) - 1} more tensors" if len(extra) > 1 else "")
            + "; the checkpoint is another model's"
        )


def _has_bias(tensors: Mapping[str, Tensor], name: str, module: nn.Module) -> bool:
    if module.bias is not None:
        return True
    # Early tools wrote a bias for every layer, of zeros if the model has none.
    return f"{name}.bias" in tensors and bool(tensors[f"{name}.bias"].any())


def _ignorable(name: str, tensors: Mapping[str, Tensor]) -> bool:
    return name.endswith(".bias") and not bool(tensors[name].any())
