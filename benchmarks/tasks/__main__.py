"""The last words of passages, found by a full model and by checkpoints made from it.

    python -m benchmarks.tasks MODEL [--checkpoint FILE...] [--count N] [--output FILE]

MODEL is a folder, a .gguf file or a hub name; FILE is a file or folder of a quantized model. The
passages are of an encyclopedia (passages.py says how they are chosen), the same ones for each. The
measure is lm-evaluation-harness's: accuracy, and perplexity of the last word.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.common.assets import DEFAULT_CACHE, text_path
from benchmarks.common.measures import machine, version
from benchmarks.tasks.harness import Score, check_installed, last_words
from benchmarks.tasks.passages import Passage, passages
from gptq import api
from gptq.errors import UserError
from gptq.files.atomic import check_writable, whole_file

RESULTS = Path(__file__).parents[1] / "results" / "tasks.json"
COUNT = 300
FULL = "full"


def measure(args: argparse.Namespace, found: Sequence[Passage]) -> Iterator[tuple[str, Score]]:
    """The full model first, then each checkpoint."""
    for checkpoint in (None, *args.checkpoint):
        model, tokenizer = api.load(args.model, checkpoint, device=args.device)
        yield FULL if checkpoint is None else checkpoint.name, last_words(model, tokenizer, found)


def table(scores: Sequence[tuple[str, Score]], title: str) -> Table:
    made = Table("model", title=title)
    for heading in ("right", "perplexity of the last word"):
        made.add_column(heading, justify="right")
    for name, it in scores:
        right = f"{100 * it.accuracy:.1f} ± {100 * it.standard_error:.1f}%"
        made.add_row(name, right, f"{it.perplexity:.2f}")
    return made


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tasks", description=(__doc__ or "").splitlines()[0]
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder, .gguf file or hub name of the full model")
    add("--checkpoint", nargs="+", type=Path, default=[], metavar="FILE", help="made from it")
    add("--count", type=int, default=COUNT, metavar="N", help=f"passages (default: {COUNT})")
    add("--device", help="such as cuda or cpu (default: a GPU if there is one)")
    add("--output", type=Path, default=RESULTS, help="file to write")
    add("--cache", type=Path, default=DEFAULT_CACHE, help="folder to keep the text in")
    args = parser.parse_args(argv)
    if args.count < 1:
        parser.error(f"--count {args.count}: give at least 1")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    scores = []
    try:
        harness = check_installed()
        check_writable(args.output)
        name = api.open_model(args.model, weights=False).name
        for checkpoint in args.checkpoint:
            if not checkpoint.exists():
                raise UserError(f"--checkpoint {checkpoint}: is not there")
        found = passages(text_path("wiki", args.cache).read_text(encoding="utf-8"), args.count)
        for label, score in measure(args, found):
            scores.append((label, score))
            print(f"{label}: {100 * score.accuracy:.1f}% right", flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    Console().print(table(scores, f"{name}, {len(found)} passages"))
    record = {
        "model": name,
        "version": version(),
        "machine": machine(),
        "lm_eval": harness,
        "passages": len(found),
        "results": [{"name": label, **asdict(score)} for label, score in scores],
    }
    with whole_file(args.output) as unfinished:
        unfinished.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
