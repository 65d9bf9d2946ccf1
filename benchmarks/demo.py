"""From a real model to a 4-bit file and back: quantize, load, compare, write a line of text.

    python -m benchmarks.demo

Nothing is measured in this process: each model is run in a fresh one, so that its peak memory is
its own.
"""

import resource
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from rich.console import Console
from rich.table import Table

from benchmarks.common.assets import DEFAULT_CACHE, model_path, text_path
from benchmarks.common.measures import bits_per_weight, in_fresh_process, machine, version
from gptq.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
FOLDER = DEFAULT_CACHE / "demo"
BITS = 4
SETTINGS = ["--wbits", str(BITS), "--groupsize", "128"]
# The defaults, 128 windows of 2048 tokens, are worth a little more and take far longer on a CPU.
CALIBRATION = ["--nsamples", "12", "--seqlen", "512"]
WINDOWS, SEQLEN = 20, 512
TIMED_TOKENS = 8
PROMPT = "The most important thing about a good night's sleep is"
NEW_TOKENS = 20


@dataclass(frozen=True)
class Row:
    """What running one model came to."""

    file_bytes: int
    bits_per_weight: float
    """Of the layers that are quantized, with their scales and zeros."""
    peak_memory: int
    """Bytes, after loading and writing one token after another."""
    perplexity: float
    tokens_per_second: float
    text: str
    """The text after PROMPT; empty if it was not asked for."""
    dtype: str
    """What the model was computed in, such as float32."""


def measure(model: Path, checkpoint: Path | None, heldout: Path, write: bool) -> Row:
    """Load and run the full model, or the checkpoint made from it; `write` on from PROMPT."""
    import torch

    from gptq.api import load, open_weights, perplexity
    from gptq.data.windows import evaluation_windows
    from gptq.inference.generate import benchmark, text

    loaded, tokenizer = load(model, checkpoint)
    with heldout.open(encoding="utf-8") as file:
        tokens = tokenizer(file.read(100 * TIMED_TOKENS))["input_ids"][:TIMED_TOKENS]
    # First, because the peak includes everything done before.
    latency = benchmark(loaded, torch.tensor(tokens))
    written = text(loaded, tokenizer, PROMPT, NEW_TOKENS) if write else ""
    itemsize, dtype = loaded.dtype.itemsize, str(loaded.dtype).removeprefix("torch.")
    parameters = sum(parameter.numel() for parameter in loaded.parameters())
    del loaded
    windows = evaluation_windows(heldout, tokenizer, SEQLEN, WINDOWS)
    return Row(
        file_bytes=checkpoint.stat().st_size if checkpoint else itemsize * parameters,
        bits_per_weight=(
            bits_per_weight(open_weights(model, checkpoint)) if checkpoint else 8 * itemsize
        ),
        peak_memory=latency.peak_memory,
        perplexity=perplexity(open_weights(model, checkpoint), windows),
        tokens_per_second=latency.tokens_per_second,
        text=written,
        dtype=dtype,
    )


def main() -> int:
    started = perf_counter()
    console = Console()
    try:
        model, calibration, heldout = model_path(), text_path("c4"), text_path("wiki")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    stem = "smollm2-135m-instruct-4bit-128g"
    solved, rounded = FOLDER / f"{stem}.pt", FOLDER / f"{stem}-nearest.pt"
    runs: tuple[list[str | Path], ...] = (
        [model, calibration, *SETTINGS, *CALIBRATION, "--save", solved],
        [model, *SETTINGS, "--nearest", "--save", rounded],
    )
    for arguments in runs:
        code = llama(arguments)
        if code:
            return code
    models = {"full": None, "4 bit, nearest": rounded, "4 bit, GPTQ": solved}
    rows = {}
    for name, checkpoint in models.items():
        print(f"running: {name}", flush=True)
        rows[name] = in_fresh_process(measure, model, checkpoint, heldout, checkpoint == solved)
    console.print(table(rows))
    print(f"{PROMPT} | {' '.join(rows['4 bit, GPTQ'].text.split())}")
    print(f"{perf_counter() - started:.0f} s in all; the files are in {shown(FOLDER)}")
    return 0


def llama(arguments: list[str | Path]) -> int:
    """Run llama.py as a user would, its tables in a log; returns the exit code."""
    argv = [shown(word) if isinstance(word, Path) else word for word in arguments]
    print("$ python llama.py", shlex.join(argv), flush=True)
    started = perf_counter()
    with (FOLDER / "llama.log").open("a") as log:
        done = subprocess.run(
            [sys.executable, "llama.py", *argv], cwd=ROOT, stdout=log, check=False
        )
    # The largest so far: the first run is the larger.
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    print(f"{perf_counter() - started:.0f} s, peak memory so far {peak / 1e6:.0f} MB\n", flush=True)
    return done.returncode


def table(rows: dict[str, Row]) -> Table:
    result = Table(
        title=f"SmolLM2-135M-Instruct, {version()}, {machine()}",
        caption="Bits a weight: of the layers in blocks. Embeddings have 8 bits. Perplexity: "
        f"{WINDOWS} windows of {SEQLEN} tokens of an encyclopedia, calibrated on web pages. "
        "The weights come from a file of 4 bits in groups of 32; the full model's are counted as "
        "they are in memory.",
        caption_justify="left",
    )
    result.add_column("model")
    for heading in ("file MB", "bits a weight", "peak memory MB", "perplexity", "tokens/s"):
        result.add_column(heading, justify="right")
    for name, row in rows.items():
        result.add_row(
            f"{name}, in {row.dtype}",
            f"{row.file_bytes / 1e6:.0f}",
            f"{row.bits_per_weight:.2f}",
            f"{row.peak_memory / 1e6:.0f}",
            f"{row.perplexity:.2f}",
            f"{row.tokens_per_second:.1f}",
        )
    return result


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT))


if __name__ == "__main__":
    sys.exit(main())
