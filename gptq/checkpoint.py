"""Quantized checkpoints: what is in one, and how it takes its place in a model."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedModel

from gptq.errors import UserError
from gptq.models import ModelSpec
from gptq.qlinear import QuantLinear
from gptq.skeleton import replace
from gptq.source import to_todays_names
from gptq.tensors import LazyTensors, open_tensors
from quant_cuda.packing import BITS, words_for
from quant_cuda.weight import group_count

# Sizes that quantizers offer, tried in this order where a file does not say which it used.
GROUP_SIZES = (128, 64, 32, 16, 256, 512, 1024)
CONFIG_NAME = "quantize_config.json"
SETTINGS_KEY = "quantize_config"


@dataclass(frozen=True)
class Checkpoint:
    """Packed tensors by Hugging Face's names, read when asked for, and how to read them."""

    path: Path
    tensors: LazyTensors
    bits: int
    group_size: int
    zero_offset: int
    settings: Mapping[str, object]
    """What the file says of itself, in the words of quantize_config.json; empty if nothing."""


def attach(
    model: PreTrainedModel,
    spec: ModelSpec,
    path: Path,
    bits: int | None = None,
    group_size: int | None = None,
) -> Checkpoint:
    """Open a `.pt`, `.safetensors` or Hugging Face folder and make room for it in `model`.

    model: without weights, from `skeleton.build`; a QuantLinear takes the place of every linear
        layer that the checkpoint has packed. No weight is read.
    bits, group_size: taken from the file where it says them, else from its tensors' shapes.
    Raises UserError where an argument disagrees with the file, nothing tells, or the file holds
    tensors that the model has no place for.
    """
    raw, settings = _open(path)
    tensors = raw.renamed(to_todays_names(spec))
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and f"{name}.qweight" in tensors
    }
    if not linears:
        packed = any(name.endswith((".qweight", ".zeros")) for name in tensors)
        raise UserError(
            f"{path}: "
            + ("its packed layers are another model's" if packed else "holds no packed weights")
            + "; give a checkpoint that was made from this model"
        )
    said_bits, said_size = _integer(path, settings, "bits"), _integer(path, settings, "group_size")
    for flag, given, said in (("--wbits", bits, said_bits), ("--groupsize", group_size, said_size)):
        if None not in (given, said) and given != said:
            raise UserError(
                f"{flag} {given} disagrees with {path}, which says {said}; leave it out"
            )
    shapes = [_shape(path, name, module, tensors) for name, module in linears.items()]
    checkpoint = Checkpoint(
        path,
        tensors,
        _bits(path, shapes, said_bits if said_bits is not None else bits),
        _group_size(path, shapes, said_size if said_size is not None else group_size, tensors),
        0 if settings.get("checkpoint_format", settings.get("format")) == "gptq_v2" else 1,
        settings,
    )
    for (name, module), shape in zip(linears.items(), shapes, strict=True):
        layer = QuantLinear(
            module.in_features,
            module.out_features,
            checkpoint.bits,
            checkpoint.group_size,
            groups=shape.groups,
            bias=_has_bias(tensors, name, module),
            g_idx=f"{name}.g_idx" in tensors,
            zero_offset=checkpoint.zero_offset,
            device="meta",
        )
        replace(model, name, layer)
        _check_g_idx(checkpoint, name, shape.groups)
    _check_all_placed(model, checkpoint)
    return checkpoint


def _check_g_idx(checkpoint: Checkpoint, name: str, groups: int) -> None:
    g_idx = checkpoint.tensors.get(f"{name}.g_idx")
    if (
        g_idx is not None
        and g_idx.numel()
        and not 0 <= int(g_idx.min()) <= int(g_idx.max()) < groups
    ):
        raise UserError(
            f"{checkpoint.path}: {name}.g_idx: holds groups {int(g_idx.min())}..{int(g_idx.max())} "
            f"where there are 0..{groups - 1}; the file is damaged"
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


def _open(path: Path) -> tuple[LazyTensors, dict[str, object]]:
    """Tensors and settings of a file or folder."""
    if not path.exists():
        raise UserError(f"{path}: no such checkpoint; give a .pt or .safetensors file or a folder")
    if not path.is_dir():
        opened = open_tensors([path])
        said = opened.metadata.get(SETTINGS_KEY, "{}")
        return opened, _parse(path, said)
    files = sorted(path.glob("*.safetensors")) or sorted(path.glob("*.pt"))
    if not files:
        raise UserError(f"{path}: holds no .safetensors file; give the folder of a checkpoint")
    for name in (CONFIG_NAME, "config.json"):
        if (path / name).exists():
            settings = _parse(path / name, (path / name).read_text(encoding="utf-8"))
            if name == "config.json":
                settings = settings.get("quantization_config", {})  # type: ignore[assignment]
            if isinstance(settings, dict) and settings:
                return open_tensors(files), settings
    return open_tensors(files), {}


def _parse(path: Path, text: str) -> dict[str, object]:
    try:
        parsed = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path}: its settings are not JSON ({error}); make it again") from error
    if not isinstance(parsed, dict):
        raise UserError(f"{path}: its settings are not a JSON object; make it again")
    return parsed


def _integer(path: Path, settings: Mapping[str, object], key: str) -> int | None:
    value = settings.get(key)
    if value is not None and type(value) is not int:
        raise UserError(f"{path}: says {key} is {value!r}, which is not a whole number")
    return value


@dataclass(frozen=True)
class _Shape:
    """What the shapes of one packed layer tell."""

    name: str
    inputs: int
    words: int
    groups: int


def _shape(path: Path, name: str, linear: nn.Linear, tensors: LazyTensors) -> _Shape:
    for key in ("scales", "qzeros"):
        if f"{name}.{key}" not in tensors:
            raise UserError(f"{path}: {name}.{key} is absent; the file is incomplete or too old")
    qweight, scales = tensors.shape(f"{name}.qweight"), tensors.shape(f"{name}.scales")
    if len(qweight) != 2 or len(scales) != 2:
        raise UserError(f"{path}: {name}.qweight or {name}.scales is not a matrix; make it again")
    return _Shape(name, linear.in_features, qweight[0], scales[0])


def _bits(path: Path, shapes: list[_Shape], bits: int | None) -> int:
    fitting = [b for b in BITS if all(s.words == words_for(s.inputs, b) for s in shapes)]
    if not fitting:
        raise UserError(f"{path}: its packed layers do not fit this model; it is another model's")
    if bits is not None and bits not in fitting:
        raise UserError(f"{path}: holds {fitting[0]}-bit weights, not {bits}-bit")
    return fitting[0]


def _group_size(
    path: Path,
    shapes: list[_Shape],
    given: int | None,
    tensors: Mapping[str, Tensor],
) -> int:
    """The size that explains every layer's number of groups."""

    def fits(size: int) -> bool:
        return all(group_count(s.inputs, size) == s.groups for s in shapes)

    if given is not None:
        if given != -1 and given < 1:
            raise UserError(f"{path}: says group_size is {given}, which cannot be")
        if not fits(given):
            odd = next(s for s in shapes if group_count(s.inputs, given) != s.groups)
            raise UserError(
                f"{path}: {odd.name} has {odd.groups} groups of {odd.inputs} inputs, not what "
                f"groups of {given} give; leave --groupsize out or correct it"
            )
        return given
    if fits(-1):
        return -1
    # Each group but the last is full, so that group 0 shows the size, whatever the order.
    counted = {
        int((tensors[f"{s.name}.g_idx"] == 0).sum())
        for s in shapes
        if s.groups > 1 and f"{s.name}.g_idx" in tensors
    }
    sizes = [size for size in (*sorted(counted), *GROUP_SIZES) if size > 0 and fits(size)]
    if not sizes:
        raise UserError(f"{path}: does not say its group size; give --groupsize")
    return sizes[0]


def _has_bias(tensors: Mapping[str, Tensor], name: str, module: nn.Linear) -> bool:
    if module.bias is not None:
        return True
    # Early tools wrote a bias for every layer, of zeros where the model has none.
    return f"{name}.bias" in tensors and bool(tensors[f"{name}.bias"].any())


def _ignorable(name: str, tensors: Mapping[str, Tensor]) -> bool:
    return name.endswith(".bias") and not bool(tensors[name].any())
