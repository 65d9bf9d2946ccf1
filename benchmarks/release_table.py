"""File size, memory, load time, speed and perplexity of a model and of its quantized files.

    python -m benchmarks.release_table MODEL... [--checkpoints FILE...] [--data TEXT] [--eval TEXT]
    python -m benchmarks.release_table --shapes bloom-7b1,llama-7b

Each row is measured in a process of its own. Without a checkpoint MODEL is quantized to 8 and 4
bits first, calibrated on --data, or rounded to nearest without it. --shapes needs no model: one
block of random weights is made and quantized, and all blocks are copies of it. That changes neither
sizes nor times, but perplexity would mean nothing and is not measured.
"""

import argparse
import importlib.util
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor

import gptq
from benchmarks import release_report
from benchmarks.common.measures import gpu_bytes, in_fresh_process, weight_count
from benchmarks.release_report import Row
from benchmarks.shapes import SHAPES, write_model
from gptq.api import open_weights, perplexity, window_length
from gptq.blockwise.source import open_model
from gptq.checkpoints.reading import open_checkpoint
from gptq.checkpoints.writing import write_pt
from gptq.cli.console import size_of
from gptq.config import QuantConfig
from gptq.data.windows import evaluation_windows
from gptq.device import pick_device
from gptq.errors import UserError
from gptq.files.lazy import LazyTensors
from gptq.files.safetensors_file import write_tensors
from gptq.inference.generate import benchmark
from gptq.models import SPECS

RESULTS = Path(__file__).parent / "results"
BITS = (8, 4, 16)
GROUP_SIZE = 128
ROUNDING = QuantConfig(group_size=GROUP_SIZE, method="rtn", scale_search="minmax")
# In a run of random weights any will do; they are in every vocabulary.
FIRST_TOKENS = 256


@dataclass(frozen=True)
class Task:
    """A model or a file of it, and what to run it on."""

    name: str
    model: Path
    checkpoint: Path | None
    tokens: int
    evaluation: Path | None
    windows: int
    seqlen: int | None


def measure(task: Task) -> Row:
    """Load and run one row; call it in a fresh process, since its peak memory is the process's."""
    device = pick_device(None)
    # The full model in 16 bits, as it is on disk, also where activations would be wider.
    narrow = task.checkpoint is None and device.type == "cpu"
    started = perf_counter()
    model, tokenizer = gptq.load(task.model, task.checkpoint, dtype="bfloat16" if narrow else None)
    load_seconds = perf_counter() - started
    latency = benchmark(model, _tokens(task, tokenizer))
    value = None
    if task.evaluation is not None:
        opened = open_weights(task.model, task.checkpoint)
        seqlen = window_length(opened.source, task.seqlen)
        windows = evaluation_windows(task.evaluation, tokenizer, seqlen, task.windows)
        value = perplexity(opened, windows)
    weights = weight_count(model)
    size = size_of(task.checkpoint) if task.checkpoint else _weights_size(task.model, weights)
    return Row(
        name=task.name,
        file_bytes=size,
        bits_per_weight=8 * size / weights,
        peak_memory=latency.peak_memory,
        on_gpu=device.type == "cuda",
        computed_memory=gpu_bytes(model) + _cache_bytes(model.config, task.tokens),
        tokens=task.tokens,
        load_seconds=load_seconds,
        seconds_a_token=tuple(sorted(latency.seconds)),
        perplexity=value,
    )


def _tokens(task: Task, tokenizer) -> Tensor:
    if task.evaluation is None:
        return torch.arange(task.tokens) % FIRST_TOKENS
    text = task.evaluation.read_text(encoding="utf-8")[: 100 * task.tokens]
    return torch.tensor(tokenizer(text)["input_ids"][: task.tokens])


def _weights_size(model: Path, weights: int) -> int:
    """Bytes of a full model's weight files; 2 a weight if there are none, as for a .gguf file."""
    files = list(model.glob("*.safetensors")) if model.is_dir() else []
    return sum(file.stat().st_size for file in files) or 2 * weights


def _cache_bytes(config, tokens: int) -> int:
    """Keys and values of 16 bits."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = config.hidden_size // config.num_attention_heads
    return 2 * 2 * config.num_hidden_layers * heads * size * tokens


# Random weights of a real shape --------------------------------------------------------------


def shape_rows(shape: str, bits: Sequence[int], task: Task, scratch: Path) -> Iterator[Row]:
    """The full model, of 16 bits, and its files; one of them at a time is on disk."""
    spec = SPECS[SHAPES[shape]().model_type]
    blocks = SHAPES[shape]().num_hidden_layers
    one = write_model(scratch / "one-block", shape, blocks=1)
    whole = scratch / shape
    whole.mkdir()
    for file in one.iterdir():
        if file.suffix != ".safetensors" and not file.name.endswith(".index.json"):
            shutil.copy(file, whole)
    config = json.loads((whole / "config.json").read_text(encoding="utf-8"))
    config["n_layer" if "n_layer" in config else "num_hidden_layers"] = blocks
    (whole / "config.json").write_text(json.dumps(config), encoding="utf-8")
    first = f"{spec.block(0)}."
    dense = open_model(one).tensors
    assert isinstance(dense, LazyTensors)
    for width in (width for width in bits if width < 16):
        small, name = scratch / "small.safetensors", f"{shape}-{width}bit-{GROUP_SIZE}g.pt"
        gptq.quantize(one, None, replace(ROUNDING, bits=width), save_safetensors=small)
        packed, settings = open_checkpoint(small)
        write_pt(scratch / name, repeated(packed, first, blocks), settings)
        small.unlink()
        yield _marked(
            replace(task, name=name, model=whole, checkpoint=scratch / name), shape, width
        )
        (scratch / name).unlink()
    if 16 not in bits:
        return
    # Last, since it may not fit this machine's memory.
    full = whole / "model.safetensors"
    tensors = repeated(dense, first, blocks)
    write_tensors(full, tensors, list(tensors), {"format": "pt"})
    yield _marked(replace(task, name=shape, model=whole, checkpoint=None), shape, 16)


def repeated(tensors: LazyTensors, first: str, blocks: int) -> LazyTensors:
    """The same tensors with every block a copy of block 0, whose names begin with `first`."""
    prefix = first.removesuffix("0.")
    entries = {
        new: tensors.entry(name)
        for name in tensors
        for new in (
            [f"{prefix}{index}.{name.removeprefix(first)}" for index in range(blocks)]
            if name.startswith(first)
            else [name]
        )
    }
    return LazyTensors(entries)


def _marked(task: Task, shape: str, bits: int) -> Row:
    row = in_fresh_process(measure, task)
    return replace(row, random=True, published=release_report.PUBLISHED.get((shape, bits)))


# A model -------------------------------------------------------------------------------------


def model_rows(
    model: str, checkpoints: Sequence[Path], args: argparse.Namespace, task: Task, scratch: Path
) -> Iterator[Row]:
    """The full model and its files, quantized now if there are none."""
    source = open_model(model)
    path = source.folder / source.gguf if source.gguf else source.folder
    if 16 in args.bits:
        yield in_fresh_process(measure, replace(task, name=source.name, model=path))
    for file in checkpoints or _quantized(path, source.name, args, scratch):
        yield in_fresh_process(measure, replace(task, name=file.name, model=path, checkpoint=file))


def _quantized(model: Path, name: str, args: argparse.Namespace, scratch: Path) -> Iterator[Path]:
    config = ROUNDING if args.data is None else QuantConfig(group_size=GROUP_SIZE)
    for bits in (width for width in args.bits if width < 16):
        suffix = "-nearest" if args.data is None else ""
        file = scratch / f"{name.lower()}-{bits}bit-{GROUP_SIZE}g{suffix}.pt"
        gptq.quantize(
            model,
            args.data,
            replace(config, bits=bits),
            save=file,
            nsamples=args.nsamples,
            seqlen=args.seqlen,
        )
        yield file


# The command line ----------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.release_table", description=(__doc__ or "").splitlines()[0]
    )
    add = parser.add_argument
    add("models", nargs="*", metavar="MODEL", help="folder, hub name or .gguf file")
    add("--checkpoints", nargs="+", type=Path, default=[], metavar="FILE", help="of one MODEL")
    add("--shapes", help=f"comma-separated: {', '.join(SHAPES)}")
    add("--bits", nargs="+", type=int, choices=BITS, default=BITS, help="default: all three")
    add("--data", help="what to calibrate on (default: round to nearest)")
    add("--eval", type=Path, metavar="TEXT", help="perplexity on this file (default: none)")
    add("--nsamples", type=int, default=128, help="calibration windows (default: 128)")
    add("--seqlen", type=int, help="tokens in a window (default: 2048, or the model's limit)")
    add("--windows", type=int, default=20, help="windows of --eval (default: 20)")
    add("--tokens", type=int, default=32, help="tokens timed one by one (default: 32)")
    add("--scratch", type=Path, help="where files are made and removed (default: a new folder)")
    add("--out", type=Path, help="folder and beginning of .json, .md and .png to write")
    return parser.parse_args(argv)


def rows(args: argparse.Namespace) -> Iterator[Row]:
    """One row after another, as they are measured. Raises UserError."""
    shapes = args.shapes.split(",") if args.shapes else []
    unknown = [shape for shape in shapes if shape not in SHAPES]
    if unknown:
        raise UserError(f"--shapes {unknown[0]}: choose of {', '.join(SHAPES)}")
    if not (shapes or args.models):
        raise UserError("nothing to measure: give MODEL or --shapes")
    if args.checkpoints and len(args.models) != 1:
        raise UserError("--checkpoints belong to one MODEL; give one")
    if args.out is not None and importlib.util.find_spec("matplotlib") is None:
        raise UserError("--out draws a picture: pip install '.[report]' first")
    if args.tokens < 3:
        raise UserError(f"--tokens {args.tokens}: give 3 or more")
    task = Task(
        name="",
        model=Path(),
        checkpoint=None,
        tokens=args.tokens,
        evaluation=args.eval,
        windows=args.windows,
        seqlen=args.seqlen,
    )
    for model in args.models:
        with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
            yield from model_rows(model, args.checkpoints, args, task, Path(scratch))
    for shape in shapes:
        with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
            yield from shape_rows(shape, args.bits, replace(task, evaluation=None), Path(scratch))


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    measured: list[Row] = []
    try:
        for row in rows(args):
            measured.append(row)
            print(release_report.line(row), flush=True)
            if args.out is not None:
                release_report.write(measured, args.out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n" + release_report.markdown(measured))
    return 0


if __name__ == "__main__":
    sys.exit(main())
