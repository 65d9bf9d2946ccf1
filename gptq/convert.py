"""`python -m gptq.convert CHECKPOINT OUT`: any checkpoint that can be read, written as another."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from gptq.blockwise import empty_model
from gptq.blockwise.source import open_model
from gptq.checkpoints.assembly import from_checkpoint
from gptq.checkpoints.canonical import Canonical, measure, unpack
from gptq.checkpoints.compatibility import output_lines
from gptq.checkpoints.formats import FORMATS, container_of, default_format, write
from gptq.checkpoints.reading import attach
from gptq.checkpoints.verify import verify
from gptq.checkpoints.writing import FOLDER, SHARD_BYTES, is_ours
from gptq.cli.command import Parser, report_error
from gptq.cli.printing import prepare_streams, printable
from gptq.config import BITS
from gptq.errors import UserError
from gptq.files.atomic import check_apart, check_writable


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

    checkpoint: a `.pt`, `.safetensors`, `.gguf` or folder of any layout and tool that `gptq.load`
        takes.
    out: a `.pt`, `.safetensors` or `.gguf` file, or a folder.
    model: where the configuration and tokenizer are; needed if `checkpoint` is a file, unless it is
        a `.gguf`, which has both.
    format: a key of `checkpoints.formats.FORMATS`, such as "gptq", "awq", or "dense" for a full
        model in 16 bits; by default as `formats.default_format` says.
    bits, group_size: only for files that do not declare them.
    quantize_embeddings: whether an embedding and a head that are packed stay so; by default in
        files and in formats whose readers take them.
    One tensor is in memory at a time. Returns the number of layers. Raises UserError for input that
    cannot be read or that the format cannot hold.
    """
    original = _open(Path(checkpoint), model, bits, group_size)
    target = Path(out)
    if format not in (None, *FORMATS):
        raise UserError(f"--format {format}: choose one of {', '.join(FORMATS)}")
    container = container_of(target)
    check_writable(target, folder=container == FOLDER, ours=is_ours)
    inputs = (checkpoint,) if model is None else (checkpoint, model)
    folder = target if container == FOLDER else None
    check_apart([target], [Path(path) for path in inputs], folder)
    keep = quantize_embeddings
    if keep is None:
        keep = container != FOLDER or (format is not None and FORMATS[format].packs_embeddings)
    converted = measure(original if keep else unpack(original, original.embeddings))
    chosen = format or default_format(map(converted.facts, converted.layers), container)

    def check(written: Path) -> None:
        verify(original, converted, written, chosen)

    write(converted, target, chosen, container=container, shard_bytes=shard_bytes, check=check)
    return len(original.layers)


def _open(
    path: Path, model: str | Path | None, bits: int | None, group_size: int | None
) -> Canonical:
    if not path.exists():
        raise UserError(f"{path}: no such checkpoint; give a .pt, .safetensors, .gguf or folder")
    if model is None and not path.is_dir() and path.suffix != ".gguf":
        raise UserError(
            f"{path}: add --model, the folder or hub name of the model it was made from"
        )
    source = open_model(path if model is None else model, weights=False)
    module = empty_model.build(source.config, source.spec, torch.device("cpu"))
    attached = attach(module, source.spec, path, bits, group_size)
    return from_checkpoint(source, module, attached)


# The command line ----------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    command = Parser(
        prog="python -m gptq.convert",
        description="Write a quantized checkpoint in another format, and compare the two.",
    )
    add = command.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="a .pt, .safetensors, .gguf or folder of any tool")
    add("out", metavar="OUT", help="a .pt, .safetensors or .gguf file, or else a folder")
    add("--model", help="folder or hub name of the model, if CHECKPOINT is a file")
    add(
        "--format",
        choices=tuple(FORMATS),
        help="dense is a full model of 16 bits (default: gptq for .pt and symmetric models; else "
        "compressed-tensors for a folder, gptq_v2 for a file)",
    )
    add(
        "--quantize-embeddings",
        action=argparse.BooleanOptionalAction,
        help="leave a packed embedding and head packed (default: in files and format mlx)",
    )
    add("--wbits", type=int, choices=BITS, help="if CHECKPOINT does not say")
    add("--groupsize", type=int, metavar="N", help="if CHECKPOINT does not say")
    return command


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code."""
    prepare_streams()
    try:
        arguments = parser().parse_args(argv)
        count = convert(
            arguments.checkpoint,
            arguments.out,
            model=arguments.model,
            format=arguments.format,
            bits=arguments.wbits,
            group_size=arguments.groupsize,
            quantize_embeddings=arguments.quantize_embeddings,
        )
    except (Exception, KeyboardInterrupt) as stop:
        return report_error(stop)
    names = [printable(path) for path in (arguments.out, arguments.checkpoint)]
    print(f"{names[0]}: {count} layers, the same weights as in {names[1]}")
    for line in output_lines(Path(arguments.out)):
        print(printable(line))
    return 0


if __name__ == "__main__":
    sys.exit(main())
