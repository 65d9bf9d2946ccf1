"""Perplexity of transformers and of ours for each architecture, as a small trained model.

    python -m benchmarks.architectures [ARCHITECTURE...] [--steps N] [--out FILE]

Columns: transformers' own forward of the full model; ours, block by block; ours after 4-bit GPTQ
in groups of 32, block by block and as a loaded model; whether a token is one call of compiled CPU
code. The text is held out from training.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import gptq
from benchmarks.common.assets import DEFAULT_CACHE
from benchmarks.common.measures import machine
from benchmarks.train_tiny import SEQLEN, tiny_model
from gptq.api import open_weights, perplexity
from gptq.data.windows import evaluation_windows
from gptq.errors import UserError
from gptq.files.atomic import whole_file
from gptq.inference.architectures import CODES
from gptq.models import SPECS

STEPS, WINDOWS = 1000, 16
CONFIG = gptq.QuantConfig(bits=4, group_size=32)
COLUMNS = ("transformers", "ours", "4 bit", "4 bit, loaded", "one call a token")


@torch.no_grad()
def own_perplexity(model: torch.nn.Module, windows: torch.Tensor) -> float:
    """By transformers' own forward and loss, a window at a time."""
    losses = [model(window[None], labels=window[None]).loss.double() for window in windows]
    return float(torch.stack(losses).mean().exp())


def measure(arch: str, cache: Path, steps: int) -> dict[str, object]:
    """A row of the table, by COLUMNS."""
    folder = tiny_model(arch, cache, steps=steps)
    full = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    opened = open_weights(folder, device="cpu")
    tokenizer = opened.source.tokenizer()
    windows = evaluation_windows(str(folder / "heldout.txt"), tokenizer, SEQLEN, WINDOWS)
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "model.pt"
        gptq.quantize(
            folder,
            folder / "train.txt",
            CONFIG,
            save=file,
            nsamples=32,
            seqlen=SEQLEN,
            device="cpu",
            dtype="float32",
        )
        packed = perplexity(open_weights(folder, file, device="cpu"), windows)
        loaded, _ = gptq.load(folder, file, device="cpu", dtype="float32")
        row = (
            own_perplexity(full, windows),
            perplexity(opened, windows),
            packed,
            own_perplexity(loaded, windows),
            type(full) in CODES,
        )
    return dict(zip(COLUMNS, row, strict=True))


def table(rows: dict[str, dict[str, object]]) -> str:
    """Markdown, a row for each architecture."""

    def cell(value: object) -> str:
        return format(value, ".4f") if isinstance(value, float) else "yes" if value else "no"

    lines = [("architecture", *COLUMNS), ("---",) * (1 + len(COLUMNS))]
    lines += [(arch, *(cell(row[name]) for name in COLUMNS)) for arch, row in rows.items()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.architectures", description=(__doc__ or "").splitlines()[0]
    )
    add = parser.add_argument
    add("architectures", nargs="*", metavar="ARCHITECTURE", help=", ".join(SPECS))
    add("--steps", type=int, default=STEPS, metavar="N", help=f"of training (default: {STEPS})")
    add("--cache", type=Path, default=DEFAULT_CACHE, help="where models are kept")
    add("--out", type=Path, metavar="FILE", help="a .json file to write")
    args = parser.parse_args(argv)
    rows = {}
    try:
        for arch in args.architectures or SPECS:
            rows[arch] = measure(arch, args.cache, args.steps)
            print(arch, rows[arch], flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n" + table(rows))
    if args.out is not None:
        result = {"steps": args.steps, "version": gptq.__version__, "machine": machine()}
        with whole_file(args.out) as unfinished:
            unfinished.write_text(json.dumps({**result, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
