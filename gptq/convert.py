"""`python -m gptq.convert CHECKPOINT OUT`: any checkpoint that can be read, written as another."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gptq.blockwise import empty_model
from gptq.blockwise.source import ModelSource, open_model
from gptq.checkpoints.compatibility import facts, lines
from gptq.checkpoints.layouts import FORMATS, PackedLayer
from gptq.checkpoints.reading import Checkpoint, attach
from gptq.checkpoints.writing import QUANTIZER, SHARD_BYTES, fill_folder, header, write_pt
from gptq.cli.command import Parser, report_error
from gptq.config import BITS
from gptq.device import half_dtype
from gptq.errors import UserError
from gptq.files.atomic import check_writable, whole_file, whole_folder
from gptq.files.opening import LazyTensors, Read, open_tensors
from gptq.files.safetensors_file import write_tensors
from gptq.nn import PackedModule, QuantEmbedding
from quant_cuda import PackedWeight
from quant_cuda.packing import pack_zeros, unpack_zeros, words_for
from quant_cuda.reference import rows

DENSE = "dense"
# Outputs whose weights are unpacked at a time.
_CHUNK = 8192


def convert(
    checkpoint: str | Path,
    out: str | Path,
    *,
    model: str | Path | None = None,
    format: str | None = None,
    bits: int | None = None,
    group_size: int | None = None,
    quantize_embeddings: bool | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> int:
    """Write a checkpoint anew and compare what was written with what was read.

    checkpoint: a `.pt`, `.safetensors` or folder of any era and tool that `gptq.load` takes.
    out: a `.pt` or `.safetensors` file, or a folder.
    model: where the configuration and tokenizer are; needed where `checkpoint` is a file.
    format: "gptq", "gptq_v2", or "dense" for a full model in 16 bits; by default "gptq" for what is
        symmetric and for `.pt`, else "gptq_v2".
    bits, group_size: only for files that do not say them.
    quantize_embeddings: whether an embedding and a head that are packed stay so; by default in
        files, not in folders, since no other program reads them.
    One tensor is in memory at a time. Returns the number of layers. Raises UserError for input that
    cannot be read or that the format cannot hold.
    """
    opened = _open(Path(checkpoint), model, bits, group_size)
    target = Path(out)
    is_folder = target.suffix not in (".pt", ".safetensors")
    if format not in (None, DENSE, *FORMATS):
        raise UserError(f"--format {format}: choose one of {', '.join((*FORMATS, DENSE))}")
    check_writable(target, folder=is_folder)
    if target.exists() and target.samefile(checkpoint):
        raise UserError(f"{target}: is the checkpoint itself; give another name")
    keep_ends = not is_folder if quantize_embeddings is None else quantize_embeddings
    packed = opened.layers(keep_ends) if format != DENSE else ()
    sym = _is_symmetric(opened.checkpoint, packed)
    chosen = format or ("gptq" if sym or target.suffix == ".pt" else "gptq_v2")
    said = None if chosen == DENSE else _settings(opened, packed, chosen, sym)
    tensors = _tensors(opened, packed, 0 if chosen == "gptq_v2" else 1)
    if is_folder:
        with whole_folder(target) as temporary:
            fill_folder(temporary, opened.source, _untied(opened, tensors), said, shard_bytes)
    elif target.suffix == ".safetensors":
        with whole_file(target) as temporary:
            _write_file(temporary, _untied(opened, tensors), said)
    else:
        write_pt(target, _untied(opened, tensors), said or {}, _tied(opened, tensors))
    _verify(opened, packed, target)
    return len(opened.checkpoint.layers)


@dataclass(frozen=True)
class _Opened:
    source: ModelSource
    model: PreTrainedModel
    """Without weights; packed layers are in place."""
    checkpoint: Checkpoint

    def layer(self, layer: PackedLayer) -> PackedModule:
        module = self.model.get_submodule(layer.name)
        assert isinstance(module, PackedModule)
        return module

    def is_end(self, layer: PackedLayer) -> bool:
        """Whether it is the embedding or the head."""
        return layer.name in (self.source.spec.embed[0], self.source.spec.head)

    def layers(self, ends: bool) -> tuple[PackedLayer, ...]:
        """Packed layers, with or without the embedding and the head."""
        return tuple(s for s in self.checkpoint.layers if ends or not self.is_end(s))

    @property
    def stored(self) -> torch.dtype:
        """The type of what is not packed."""
        return half_dtype(self.source.config.dtype)


def _open(
    path: Path, model: str | Path | None, bits: int | None, group_size: int | None
) -> _Opened:
    if model is None and not path.is_dir():
        raise UserError(
            f"{path}: add --model, the folder or hub name of the model it was made from"
        )
    source = open_model(path if model is None else model, weights=False)
    bare = empty_model.build(source.config, source.spec, torch.device("cpu"))
    return _Opened(source, bare, attach(bare, source.spec, path, bits, group_size))


# What is written -----------------------------------------------------------------------------


def _settings(
    opened: _Opened, packed: tuple[PackedLayer, ...], layout: str, sym: bool
) -> dict[str, object]:
    """What the checkpoint said of itself, brought up to date."""
    checkpoint = opened.checkpoint
    meta = checkpoint.settings.get("meta")
    kept = dict(meta) if isinstance(meta, dict) else {}
    kept["quantizer"] = [QUANTIZER]
    ends = [layer.bits for layer in packed if opened.is_end(layer)]
    kept["embedding_bits"] = ends[0] if ends else 16
    known: dict[str, object] = {
        "damp_percent": 0.01,
        "true_sequential": True,
        "static_groups": False,
    }
    known |= {key: checkpoint.settings.get(key, value) for key, value in known.items()}
    dynamic = checkpoint.settings.get("dynamic")
    return {
        "quant_method": "gptq",
        "bits": checkpoint.bits,
        "group_size": checkpoint.group_size,
        "desc_act": any(_unnatural(checkpoint, layer) for layer in packed),
        "sym": sym,
        "checkpoint_format": layout,
        "format": layout,
        "pack_dtype": "int32",
        "lm_head": bool(ends),
        **known,
        **({"dynamic": dynamic} if dynamic else {}),
        "meta": kept,
    }


def _is_symmetric(checkpoint: Checkpoint, layers: tuple[PackedLayer, ...]) -> bool:
    return all(bool((_zeros(checkpoint, layer) == 2 ** (layer.bits - 1)).all()) for layer in layers)


def _zeros(checkpoint: Checkpoint, layer: PackedLayer) -> Tensor:
    words = checkpoint.tensors[f"{layer.name}.qzeros"]
    return unpack_zeros(words, layer.bits, layer.outputs, checkpoint.zero_offset)


def _unnatural(checkpoint: Checkpoint, layer: PackedLayer) -> bool:
    g_idx = checkpoint.tensors.get(f"{layer.name}.g_idx")
    return g_idx is not None and bool((g_idx[1:] < g_idx[:-1]).any())


# How each tensor is found when its turn comes, and the shape and type it then has.
_Plan = dict[str, tuple[Read, tuple[int, ...], torch.dtype]]


def _tensors(opened: _Opened, packed: tuple[PackedLayer, ...], zero_offset: int) -> LazyTensors:
    """Every tensor as it is to be written: those layers packed, all else in 16 bits."""
    plan = _others(opened)
    for layer in opened.checkpoint.layers:
        if layer in packed:
            plan |= _packed(opened, layer, zero_offset)
        else:
            plan |= _dense(opened, layer)
    return _lazy(opened, plan)


def _packed(opened: _Opened, layer: PackedLayer, zero_offset: int) -> _Plan:
    """A layer's tensors as today's files have them."""
    checkpoint, name, half, whole = opened.checkpoint, layer.name, torch.float16, torch.int32
    words, columns = words_for(layer.inputs, layer.bits), words_for(layer.outputs, layer.bits)
    stored = partial(checkpoint.tensors.__getitem__, f"{name}.qweight")
    zeros = partial(_stored_zeros, checkpoint, layer, zero_offset)
    scales = partial(_half, checkpoint, f"{name}.scales")
    plan: _Plan = {
        f"{name}.qweight": (stored, (words, layer.outputs), whole),
        f"{name}.qzeros": (zeros, (layer.groups, columns), whole),
        f"{name}.scales": (scales, (layer.groups, layer.outputs), half),
    }
    if not isinstance(opened.layer(layer), QuantEmbedding):
        plan[f"{name}.g_idx"] = (partial(_g_idx, opened, layer), (layer.inputs,), whole)
    if opened.layer(layer).bias is not None:
        bias = partial(_half, checkpoint, f"{name}.bias")
        plan[f"{name}.bias"] = (bias, (layer.outputs,), half)
    return plan


def _dense(opened: _Opened, layer: PackedLayer) -> _Plan:
    """A layer's tensors as the full model has them, in 16 bits."""
    dtype, name = opened.stored, layer.name
    weight = partial(_weight, opened, layer, dtype)
    plan: _Plan = {f"{name}.weight": (weight, (layer.outputs, layer.inputs), dtype)}
    if opened.layer(layer).bias is not None:
        bias = partial(_cast, opened, f"{name}.bias", (layer.outputs,))
        plan[f"{name}.bias"] = (bias, (layer.outputs,), dtype)
    return plan


def _others(opened: _Opened) -> _Plan:
    """What is not packed. A tied head is read from the embedding."""
    packed = tuple(f"{layer.name}." for layer in opened.checkpoint.layers)
    return {
        name: (partial(_cast, opened, name, expected.shape), tuple(expected.shape), opened.stored)
        for name, expected in opened.model.state_dict().items()
        if not name.startswith(packed)
    }


def _lazy(opened: _Opened, plan: _Plan) -> LazyTensors:
    """By the model's own order of modules."""
    places = {name: place for place, (name, _) in enumerate(opened.model.named_modules())}
    ordered = sorted(plan, key=lambda name: places[name.rpartition(".")[0]])
    return LazyTensors(
        {name: plan[name][0] for name in ordered},
        shapes={name: plan[name][1] for name in ordered},
        dtypes={name: plan[name][2] for name in ordered},
    )


def _tied(opened: _Opened, tensors: LazyTensors) -> dict[str, str]:
    return empty_model.tied(opened.model.config, opened.source.spec, tensors)


def _untied(opened: _Opened, tensors: LazyTensors) -> LazyTensors:
    return tensors.changed(dict.fromkeys(_tied(opened, tensors)))


def _cast(opened: _Opened, name: str, expected: tuple[int, ...]) -> Tensor:
    tensors = opened.checkpoint.tensors
    found = empty_model.stored_name(opened.model, opened.source.spec, name, tensors)
    if found not in tensors:
        raise UserError(f"{opened.checkpoint.path}: {found} is absent; the file is incomplete")
    tensor = tensors[found]
    if tensor.shape != expected:
        raise UserError(
            f"{opened.checkpoint.path}: {found} has shape {tuple(tensor.shape)} where the model's "
            f"configuration wants {tuple(expected)}"
        )
    return tensor.to(opened.stored)


def _half(checkpoint: Checkpoint, name: str) -> Tensor:
    tensor = checkpoint.tensors[name].to(torch.float16)
    if not bool(torch.isfinite(tensor).all()):
        raise UserError(f"{checkpoint.path}: {name} exceeds what 16 bits can hold")
    return tensor


def _stored_zeros(checkpoint: Checkpoint, layer: PackedLayer, zero_offset: int) -> Tensor:
    zeros = _zeros(checkpoint, layer)
    if zero_offset == 1 and bool((zeros < 1).any()):
        raise UserError(
            f"{checkpoint.path}: {layer.name} has a zero point of 0, which format gptq cannot "
            "hold; use --format gptq_v2 and a folder or .safetensors"
        )
    return pack_zeros(zeros, layer.bits, zero_offset)


def _g_idx(opened: _Opened, layer: PackedLayer) -> Tensor:
    g_idx = opened.checkpoint.tensors.get(f"{layer.name}.g_idx")
    if g_idx is not None:
        return g_idx
    size = opened.layer(layer).group_size
    inputs = torch.arange(layer.inputs, dtype=torch.int32)
    return inputs // (layer.inputs if size == -1 else size)


def _weight(opened: _Opened, layer: PackedLayer, dtype: torch.dtype) -> Tensor:
    """The dequantized weight (out, in)."""
    tensors = opened.checkpoint.tensors
    weight = PackedWeight(
        tensors[f"{layer.name}.qweight"],
        tensors[f"{layer.name}.qzeros"],
        tensors[f"{layer.name}.scales"],
        tensors.get(f"{layer.name}.g_idx"),
        layer.bits,
        opened.layer(layer).group_size,
        layer.inputs,
        opened.checkpoint.zero_offset,
    )
    numbers = torch.empty((layer.outputs, layer.inputs), dtype=dtype)
    for columns in torch.arange(layer.outputs).split(_CHUNK):
        numbers[columns] = rows(weight, columns).to(dtype)
    return numbers


def _write_file(path: Path, tensors: LazyTensors, said: dict[str, object] | None) -> None:
    about = {"format": "pt"} if said is None else header(said)
    write_tensors(path, tensors, list(tensors), about)


# Whether it is right -------------------------------------------------------------------------


def _verify(opened: _Opened, packed: tuple[PackedLayer, ...], target: Path) -> None:
    """Read what was written and compare every weight. Raises RuntimeError where one differs."""
    dense = tuple(layer for layer in opened.checkpoint.layers if layer not in packed)
    if dense:
        again = _written(target)
        for layer in dense:
            before = _weight(opened, layer, opened.stored)
            _same(layer, before, again[f"{layer.name}.weight"], 0.0)
    if not packed:
        return
    source = opened.source
    bare = empty_model.build(source.config, source.spec, torch.device("cpu"))
    written = _Opened(source, bare, attach(bare, source.spec, target))
    for layer in packed:
        half = opened.checkpoint.tensors.dtype(f"{layer.name}.scales") == torch.float16
        # Wider scales are rounded to 16 bits, by one part in 2048 at most.
        tolerance = 0.0 if half else 2.0**-10
        _same(
            layer,
            _weight(opened, layer, torch.float32),
            _weight(written, layer, torch.float32),
            tolerance,
        )


def _written(target: Path) -> LazyTensors:
    return open_tensors(sorted(target.glob("*.safetensors")) if target.is_dir() else [target])


def _same(layer: PackedLayer, before: Tensor, after: Tensor, tolerance: float) -> None:
    if not bool(((before - after).abs() <= tolerance * before.abs()).all()):
        raise RuntimeError(f"{layer.name} was not written as it was read")


# The command line ----------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    command = Parser(
        prog="python -m gptq.convert",
        description="Write a quantized checkpoint in another form, and compare the two.",
    )
    add = command.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="a .pt, .safetensors or folder of any era")
    add("out", metavar="OUT", help="a .pt or .safetensors file, or else a folder")
    add("--model", help="folder or hub name of the model, where CHECKPOINT is a file")
    add(
        "--format",
        choices=(*FORMATS, DENSE),
        help="zero points of gptq or gptq_v2, or a full model of 16 bits "
        "(default: gptq for .pt and what is symmetric, else gptq_v2)",
    )
    add(
        "--quantize-embeddings",
        action=argparse.BooleanOptionalAction,
        help="leave a packed embedding and head packed (default: in files, not in folders)",
    )
    add("--wbits", type=int, choices=BITS, help="where CHECKPOINT does not say")
    add("--groupsize", type=int, metavar="N", help="where CHECKPOINT does not say")
    return command


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code."""
    try:
        given = parser().parse_args(argv)
        count = convert(
            given.checkpoint,
            given.out,
            model=given.model,
            format=given.format,
            bits=given.wbits,
            group_size=given.groupsize,
            quantize_embeddings=given.quantize_embeddings,
        )
    except (UserError, KeyboardInterrupt) as stop:
        return report_error(stop)
    print(f"{given.out}: {count} layers, the same weights as in {given.checkpoint}")
    if given.format != DENSE and Path(given.out).is_dir():
        print("\n".join(lines(facts(Path(given.out)))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
