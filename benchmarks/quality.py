"""How close quantized models stay to the original: method by method, on text not calibrated on.

    python -m benchmarks.quality [--models NAME...] [--settings NAME...] [--methods NAME...]

The measure is the gap, ln(perplexity quantized) - ln(perplexity full), in nats a token, both
computed in float32. Every result is appended to a file at once, with the version that made it and
the machine. What is in the file is not measured again without --fresh; of two results for the same
model, setting and method the later counts.
Other toolkits run in environments of their own: --gptqmodel PYTHON, --autoround PYTHON.
"""

import argparse
import importlib.util
import json
import math
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from time import process_time

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.common.assets import DEFAULT_CACHE, model_path, text_path
from benchmarks.common.measures import bits_per_weight, machine, version
from benchmarks.common.permuted import permuted_copy
from benchmarks.limits import PLAIN
from benchmarks.train_tiny import tiny_model
from gptq import QuantConfig, api
from gptq.config import QUALITIES
from gptq.data.windows import calibration_windows, evaluation_windows
from gptq.errors import UserError
from gptq.files.atomic import whole_file

PEERS = Path(__file__).parent / "peers"
RESULTS = Path(__file__).parent / "results" / "quality.jsonl"
EVALUATION_WINDOWS = 20
# The version and machine of results from before these were kept.
UNKNOWN = "not recorded"

# Each of ours after the second adds one idea to the one before it.
METHODS: dict[str, dict[str, object]] = {
    "rounding": {"method": "rtn", "scale_search": "minmax"},
    "plain GPTQ": PLAIN,
    "act-order": {**PLAIN, "order": "act", "static_groups": True},
    "group-aware order": {**PLAIN, "order": "gar"},
    "+ Hessian-aware grids": {**QUALITIES["fast"]},
    "+ damping by held-out loss": {"error_feedback": 0.0, "refine": 0},
    "+ input feedback": {"residual_feedback": False, "refine": 0},
    "+ residual feedback": {"refine": 0},
    "default": {},
    "best": {**QUALITIES["best"]},
}
PEER_METHODS: dict[str, tuple[str, dict[str, object]]] = {
    "GPTQModel, its defaults": ("gptqmodel", {}),
    "GPTQModel, its best": (
        "gptqmodel",
        {"desc_act": True, "act_group_aware": False, "mse": 2.4, "damp_percent": 0.01},
    ),
    "AutoRound, 50 steps": ("autoround", {"iters": 50}),
    "AutoRound, 200 steps": ("autoround", {"iters": 200}),
}
PEER_PACKAGES = {"gptqmodel": "gptqmodel", "autoround": "auto-round"}
GRIDS = {
    "W4 g128": (4, 128),
    "W4 g64": (4, 64),
    "W4 g32": (4, 32),
    "W3 g128": (3, 128),
    "W2 g64": (2, 64),
    "W8 g128": (8, 128),
}
SETTINGS = {
    f"{name} {kind}": {"bits": bits, "group_size": size, "sym": kind == "sym"}
    for name, (bits, size) in GRIDS.items()
    for kind in ("asym", "sym")
}


@dataclass(frozen=True)
class Subject:
    """A model, its calibration text and its evaluation texts."""

    name: str
    folder: Path
    calibration: Path
    heldout: dict[str, Path]
    nsamples: int
    seqlen: int


@dataclass(frozen=True)
class Result:
    """One quantized model measured. Appended to the file as a line of JSON."""

    model: str
    setting: str
    method: str
    gaps: dict[str, float]
    """Nats a token, by text."""
    bits_per_weight: float
    """Of the quantized layers, with scales, zeros and group indices."""
    cpu_seconds: float
    """Processor time of quantizing, all threads together."""
    threads: int
    version: str = UNKNOWN
    """Of this package, with its commit; of another toolkit, its name and version."""
    machine: str = UNKNOWN
    """The processor and the number of its cores."""

    @property
    def key(self) -> tuple[str, str, str]:
        """What a table has one row for."""
        return self.model, self.setting, self.method


def subject(name: str, cache: Path) -> Subject:
    """One of this benchmark's models, made in `cache` if it is not there."""
    if name == "smollm2":
        text = text_path("c4", cache).read_text(encoding="utf-8")
        halves = cache / "c4-calibration.txt", cache / "c4-heldout.txt"
        cut = len(text) // 2
        for path, half in zip(halves, (text[:cut], text[cut:]), strict=True):
            with whole_file(path) as unfinished:
                unfinished.write_text(half, encoding="utf-8")
        folder = permuted_copy(model_path(cache), cache / "smollm2-permuted")
        heldout = {"wiki": text_path("wiki", cache), "c4": halves[1]}
        return Subject(name, folder, halves[0], heldout, nsamples=16, seqlen=512)
    arch, _, size = name.partition("-")
    folder = tiny_model(arch, cache, size=size)
    heldout = {"held out": folder / "heldout.txt"}
    return Subject(name, folder, folder / "train.txt", heldout, nsamples=32, seqlen=256)


def windows_of(subject: Subject) -> tuple[Tensor, dict[str, Tensor]]:
    """Calibration windows, and evaluation windows: int64 (n, seqlen) each."""
    tokenizer = api.open_model(subject.folder).tokenizer()
    calibration = calibration_windows(
        subject.calibration, tokenizer, subject.nsamples, subject.seqlen, 0
    )
    evaluation = {
        name: evaluation_windows(path, tokenizer, subject.seqlen, EVALUATION_WINDOWS)
        for name, path in subject.heldout.items()
    }
    return calibration, evaluation


def log_perplexities(
    folder: Path, checkpoint: Path | None, evaluation: dict[str, Tensor]
) -> dict[str, float]:
    """ln perplexity by text of the full model, or of a checkpoint made from it."""
    return {
        name: math.log(api.perplexity(api.open_weights(folder, checkpoint), windows))
        for name, windows in evaluation.items()
    }


def quantize(
    subject: Subject,
    calibration: Tensor,
    method: str,
    setting: Mapping[str, object],
    pythons: dict[str, str],
    out: Path,
) -> tuple[Path, float]:
    """Make a quantized model under `out`; its path and the processor seconds that took."""
    if method in METHODS:
        # Other toolkits leave embeddings and heads as they are; what packing them costs is measured
        # by benchmarks/embeddings.py.
        config = QuantConfig(**{**setting, **METHODS[method]}, embedding_bits=16)  # type: ignore[arg-type]
        path, started = out / "model.pt", process_time()
        api.quantize(
            subject.folder,
            subject.calibration,
            config,
            save=path,
            nsamples=subject.nsamples,
            seqlen=subject.seqlen,
            dtype="float32",
        )
        return path, process_time() - started
    peer, changes = PEER_METHODS[method]
    tokens = out / "tokens.json"
    tokens.write_text(json.dumps(calibration.tolist()))
    settings = json.dumps({**setting, **changes})
    command = [pythons[peer], str(PEERS / f"{peer}_run.py"), str(subject.folder), str(tokens)]
    before = _children_seconds()
    done = subprocess.run(
        [*command, str(out / "peer"), settings], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise UserError(f"{method} failed: {done.stderr.strip().splitlines()[-1:]}")
    # This includes starting Python and reading the model, which take little of it.
    return _checkpoint_folder(out / "peer"), _children_seconds() - before


def _checkpoint_folder(out: Path) -> Path:
    """The folder with a peer's files: its output folder or one inside."""
    return next(path.parent for path in sorted(out.rglob("*.safetensors")))


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def toolkit_version(method: str, pythons: Mapping[str, str]) -> str:
    """Which code a method is: this package's version, or another toolkit's in its environment."""
    if method in METHODS:
        return version()
    peer = PEER_METHODS[method][0]
    script = "import importlib.metadata, sys; print(importlib.metadata.version(sys.argv[1]))"
    words = [pythons[peer], "-c", script, PEER_PACKAGES[peer]]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return f"{peer} {done.stdout.strip() or UNKNOWN}"


def read_results(path: Path) -> list[Result]:
    """The results in a file, of equal keys only the last; none if there is no file."""
    if not path.exists():
        return []
    rows = [Result(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    return list({row.key: row for row in rows}.values())


def add(path: Path, result: Result) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(result)) + "\n")


def measure(
    names: list[str], settings: list[str], methods: list[str], args: argparse.Namespace
) -> Iterator[Result]:
    """Quantize and evaluate everything that was asked for and is not in the file; with --fresh also
    what is."""
    pythons = {"gptqmodel": args.gptqmodel, "autoround": args.autoround}
    measured = set() if args.fresh else {row.key for row in read_results(args.results)}
    for name in names:
        wanted = [(s, m) for s in settings for m in methods if (name, s, m) not in measured]
        if not wanted:
            continue
        it = subject(name, args.cache)
        calibration, evaluation = windows_of(it)
        full = log_perplexities(it.folder, None, evaluation)
        for setting, method in wanted:
            with tempfile.TemporaryDirectory(prefix="quality-") as folder:
                checkpoint, seconds = quantize(
                    it, calibration, method, SETTINGS[setting], pythons, Path(folder)
                )
                quantized = log_perplexities(it.folder, checkpoint, evaluation)
                bits = bits_per_weight(api.open_weights(it.folder, checkpoint))
            gaps = {text: quantized[text] - full[text] for text in quantized}
            yield Result(
                model=name,
                setting=setting,
                method=method,
                gaps=gaps,
                bits_per_weight=bits,
                cpu_seconds=seconds,
                threads=torch.get_num_threads(),
                version=toolkit_version(method, pythons),
                machine=machine(),
            )


def table(results: list[Result], model: str) -> Table:
    """One row a setting and method, best reading order: settings, then methods as listed."""
    rows = [row for row in results if row.model == model]
    texts = list(rows[0].gaps)
    made = Table(
        title=model,
        caption="gap: ln perplexity above the full model's, nats a token; both run in float32",
    )
    for heading in ("setting", "method"):
        made.add_column(heading)
    for heading in (*(f"gap {text}" for text in texts), "bits a weight", "CPU s", "threads"):
        made.add_column(heading, justify="right")
    for heading in ("version", "machine"):
        made.add_column(heading)
    order = {name: place for place, name in enumerate([*METHODS, *PEER_METHODS])}
    places = {name: place for place, name in enumerate(SETTINGS)}
    for row in sorted(rows, key=lambda row: (places[row.setting], order[row.method])):
        gaps = [f"{row.gaps[text]:.4f}" for text in texts]
        costs = f"{row.bits_per_weight:.2f}", f"{row.cpu_seconds:.0f}", str(row.threads)
        made.add_row(row.setting, row.method, *gaps, *costs, row.version, row.machine)
    return made


def chart(results: list[Result], path: Path) -> None:
    """Gap against bits a weight, a panel for each model, a line for each method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    models = list(dict.fromkeys(row.model for row in results))
    figure, axes = pyplot.subplots(1, len(models), figsize=(6 * len(models), 5), squeeze=False)
    for axis, model in zip(axes[0], models, strict=True):
        for number, method in enumerate([*METHODS, *PEER_METHODS]):
            rows = [
                row
                for row in results
                if (row.model, row.method) == (model, method) and row.setting.endswith("asym")
            ]
            points = sorted(
                (row.bits_per_weight, sum(row.gaps.values()) / len(row.gaps)) for row in rows
            )
            if points:
                colour = pyplot.get_cmap("tab20")(number)
                marker = "s" if method in PEER_METHODS else "o"
                axis.plot(*zip(*points, strict=True), marker=marker, color=colour, label=method)
        axis.set(title=model, xlabel="bits a weight", ylabel="gap, nats a token", yscale="log")
        axis.grid(True, which="both", alpha=0.3)
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality",
        description="What quantization costs, by method, in nats a token on held-out text.",
    )
    models = ("smollm2", "llama-tiny", "bloom-tiny", "llama-small", "bloom-small")
    every = (*METHODS, *PEER_METHODS)
    parser.add_argument("--models", nargs="+", choices=models, default=models[:3], metavar="NAME")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=[*SETTINGS])
    parser.add_argument("--methods", nargs="+", choices=every, default=None, metavar="NAME")
    parser.add_argument("--gptqmodel", metavar="PYTHON", help="python of an environment with it")
    parser.add_argument("--autoround", metavar="PYTHON", help="python of an environment with it")
    parser.add_argument("--fresh", action="store_true", help="measure again what is in the file")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file to add to")
    parser.add_argument("--chart", type=Path, help="draw gap against bits into this picture")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE)
    args = parser.parse_args(argv)
    pythons = {"gptqmodel": args.gptqmodel, "autoround": args.autoround}
    if args.methods is None:
        args.methods = [
            *METHODS,
            *(name for name in PEER_METHODS if pythons[PEER_METHODS[name][0]]),
        ]
    for name in args.methods:
        if name in PEER_METHODS and not pythons[PEER_METHODS[name][0]]:
            parser.error(f"{name} needs --{PEER_METHODS[name][0]} PYTHON")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    console = Console()
    try:
        if args.chart is not None and importlib.util.find_spec("matplotlib") is None:
            raise UserError("--chart needs matplotlib: pip install '.[report]' first")
        for result in measure(args.models, args.settings, args.methods, args):
            add(args.results, result)
            gaps = ", ".join(f"{text} {gap:.4f}" for text, gap in result.gaps.items())
            print(f"{result.model}, {result.setting}, {result.method}: {gaps}", flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    results = read_results(args.results)
    for model in dict.fromkeys(row.model for row in results):
        console.print(table(results, model))
    if args.chart is not None and results:
        chart(results, args.chart)
    return 0


if __name__ == "__main__":
    sys.exit(main())
