"""Quantized checkpoints: what is in one, and how it takes its place in a model."""

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedModel

from gptq.blockwise.empty_model import replace
from gptq.blockwise.source import to_todays_names
from gptq.blockwise.ties import resolve_ties
from gptq.blockwise.weight_files import open_packed_weights
from gptq.checkpoints.layouts import Packed, PackedLayer, group_size, normal_form
from gptq.errors import SettingError, UserError
from gptq.files.opening import LazyTensors, check_sums, open_tensors
from gptq.models import ModelSpec
from gptq.nn import QuantEmbedding, QuantLinear, TiedHead

CONFIG_NAME = "quantize_config.json"
SETTINGS_KEY = "quantize_config"


@dataclass(frozen=True)
class Checkpoint:
    """Packed tensors by Hugging Face's names, read when asked for, and how to read them."""

    path: Path
    tensors: LazyTensors
    """In the normal form of `eras`."""
    layers: tuple[PackedLayer, ...]
    bits: int
    """Of the layers that say nothing else; a file can name exceptions."""
    group_size: int
    """Likewise."""
    zero_offset: int
    settings: Mapping[str, object]
    """What the file says of itself, in the words of quantize_config.json; empty if nothing."""
    as_stored: bool
    """Whether the file's own tensors are in the normal form already."""


def attach(
    model: PreTrainedModel,
    spec: ModelSpec,
    path: Path,
    bits: int | None = None,
    group_size: int | None = None,
) -> Checkpoint:
    """Open a `.pt`, `.safetensors` or Hugging Face folder and make room for it in `model`.

    model: without weights, from `skeleton.build`; a QuantLinear takes the place of every linear
        layer that the checkpoint has packed. Of the weights only scales and zero points are read.
    bits, group_size: taken from the file where it says them, else from its tensors' shapes.
    Raises UserError where an argument disagrees with the file, nothing tells, or the file holds
    tensors that the model has no place for.
    """
    raw, settings = open_checkpoint(path)
    tensors = raw.renamed(to_todays_names(spec))
    config, tensors = resolve_ties(model.config, spec, tensors)
    model.config.tie_word_embeddings = config.tie_word_embeddings
    checkpoint = place(model, path, tensors, settings, bits, group_size)
    _check_all_placed(model, checkpoint)
    return checkpoint


def place(
    model: PreTrainedModel,
    path: Path,
    tensors: LazyTensors,
    settings: Mapping[str, object],
    bits: int | None = None,
    group_size: int | None = None,
    keep_bias: bool = False,
) -> Checkpoint:
    """Put a QuantLinear or QuantEmbedding, on the meta device, in the place of every packed layer.

    A head that is tied to a packed embedding becomes a TiedHead.

    tensors: by the model's own names. keep_bias: give every layer that has a bias in the file one,
        also where it is all zeros and the model has none.
    Raises UserError as `attach`.
    """
    places = _places(model)
    ends = _ends(model, places)
    packed = normal_form(path, tensors, settings, {name: _size(m) for name, m in places.items()})
    inner = tuple(layer for layer in packed.layers if layer.name not in ends)
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
    if packed.lost_zeros:
        warnings.warn(
            f"{path}: the tool that wrote it destroyed {packed.lost_zeros} zero points, which are "
            "read as 0; quantize the model again",
            stacklevel=2,
        )
    said_bits, said_size = _integer(path, settings, "bits"), _integer(path, settings, "group_size")
    for field, given, said in (
        ("bits", bits, said_bits),
        ("group_size", group_size, said_size),
    ):
        if None not in (given, said) and given != said:
            raise SettingError(
                field, given, f"disagrees with {path}, which says {said}; leave it out"
            )
    # GPTQModel's exceptions for some layers, which the layers' own shapes tell.
    mixed = bool(settings.get("dynamic"))
    # An embedding and a head may have their own, which nothing else says.
    inner = inner or packed.layers
    base_bits = _bits(path, inner, bits if said_bits is None else said_bits, mixed)
    base_size, group_sizes = _group_sizes(
        path, packed, inner, group_size if said_size is None else said_size, mixed
    )
    for layer in packed.layers:
        _check_g_idx(path, layer, packed.tensors)
        module = places[layer.name]
        if isinstance(module, nn.Embedding):
            _put_embedding(model, layer, packed, group_sizes[layer.name])
            continue
        quantized = QuantLinear(
            layer.inputs,
            layer.outputs,
            layer.bits,
            group_sizes[layer.name],
            groups=layer.groups,
            bias=(keep_bias and f"{layer.name}.bias" in tensors)
            or _has_bias(packed.tensors, layer.name, module),
            g_idx=f"{layer.name}.g_idx" in packed.tensors,
            zero_offset=packed.zero_offset,
            device="meta",
        )
        replace(model, layer.name, quantized)
    return Checkpoint(
        path,
        packed.tensors,
        packed.layers,
        base_bits,
        base_size,
        packed.zero_offset,
        settings,
        packed.as_stored,
    )


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


def _put_embedding(
    model: PreTrainedModel, layer: PackedLayer, packed: Packed, group_size: int
) -> None:
    head, tied = model.get_output_embeddings(), model.config.tie_word_embeddings
    embedding = QuantEmbedding(
        layer.outputs,
        layer.inputs,
        layer.bits,
        group_size,
        groups=layer.groups,
        zero_offset=packed.zero_offset,
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


def open_checkpoint(path: Path) -> tuple[LazyTensors, dict[str, object]]:
    """Tensors and settings of a file or folder, as they are stored."""
    if not path.exists():
        raise UserError(f"{path}: no such checkpoint; give a .pt or .safetensors file or a folder")
    if not path.is_dir():
        opened = open_tensors([path])
        check_sums(path)
        said = opened.metadata.get(SETTINGS_KEY)
        # A folder's configuration tells of its files, for what they do not say themselves.
        return opened, folder_settings(path.parent) if said is None else _parse(path, said)
    return open_packed_weights(path), folder_settings(path)


def folder_settings(folder: Path) -> dict[str, object]:
    """What a folder's quantize_config.json, or else its config.json, says; empty if nothing."""
    for name in (CONFIG_NAME, "quant_config.json", "config.json"):
        file = folder / name
        if not file.is_file():
            continue
        try:
            settings = _parse(file, file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file}: cannot be read as text; copy it again") from error
        if name == "config.json":
            inner = settings.get("quantization_config", {})
            if not isinstance(inner, dict):
                raise UserError(f"{file}: its quantization_config is no JSON object; copy it again")
            settings = inner
        if settings:
            return settings
    return {}


def _parse(path: Path, text: object) -> dict[str, object]:
    try:
        parsed = json.loads(text if isinstance(text, str) else "")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: its settings are not JSON ({error}); make it again") from error
    if not isinstance(parsed, dict):
        raise UserError(f"{path}: its settings are not a JSON object; make it again")
    return parsed


def _integer(path: Path, settings: Mapping[str, object], key: str) -> int | None:
    value = settings.get(key)
    if value is None:
        return None
    if type(value) is not int:
        raise UserError(f"{path}: says {key} is {value!r}, which is not a whole number")
    return value


def _bits(path: Path, layers: tuple[PackedLayer, ...], bits: int | None, mixed: bool) -> int:
    if bits is None:
        return layers[0].bits
    for layer in layers:
        if layer.bits != bits and not mixed:
            raise UserError(f"{path}: {layer.name} holds {layer.bits}-bit weights, not {bits}-bit")
    return bits


def _group_sizes(
    path: Path, packed: Packed, inner: tuple[PackedLayer, ...], size: int | None, mixed: bool
) -> tuple[int, dict[str, int]]:
    """The group size of the inner layers, and each layer's."""
    sizes = {}
    if not mixed:
        size = group_size(path, inner, size, packed.tensors)
        sizes = {layer.name: size for layer in inner}
    for layer in packed.layers:
        if layer.name in sizes:
            continue
        # An end has groups of its own, of which a size like the others' could miscount.
        given = size if layer in inner else None
        try:
            sizes[layer.name] = group_size(path, [layer], given, packed.tensors)
        except UserError:
            sizes[layer.name] = group_size(path, [layer], None, packed.tensors)
    return (sizes[inner[0].name] if size is None else size), sizes


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
    # Early tools wrote a bias for every layer, of zeros where the model has none.
    return f"{name}.bias" in tensors and bool(tensors[f"{name}.bias"].any())


def _ignorable(name: str, tensors: Mapping[str, Tensor]) -> bool:
    return name.endswith(".bias") and not bool(tensors[name].any())
