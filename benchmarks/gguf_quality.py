"""Our .gguf files and llama.cpp's own quantizations of the same model, read by llama.cpp.

    python -m benchmarks.gguf_quality --python PYTHON [--windows N] [--nsamples N] [--threads N]
        [--quality NAME] [--output FILE] [--cache FOLDER]

PYTHON is of an environment with llama-cpp-python and gguf. The model is SmolLM2-135M-Instruct, its
channels shuffled (common/permuted.py), since the file that there is of it is Q4_1 itself;
calibration is on C4, also for llama.cpp's importance matrix, evaluation on wiki text. The measure
is the gap: ln(perplexity) less that of the full model in float32, in nats a token, by llama.cpp.
Of our files it is also measured by this package, which rounds no activations to 8 bits.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import gptq
from benchmarks.common.assets import DEFAULT_CACHE, model_path, text_path
from benchmarks.common.permuted import permuted_copy
from benchmarks.kernels import processor
from benchmarks.llama_cpp_files import Peer, full_file, importance
from gptq import QuantConfig, api
from gptq.blockwise.source import open_model
from gptq.checkpoints.names import GGUF_GROUP
from gptq.config import QUALITIES
from gptq.data.windows import calibration_windows, evaluation_windows
from gptq.errors import UserError
from gptq.files.atomic import check_writable

RESULTS = Path(__file__).parent / "results" / "gguf.json"
SEQLEN = 512
PROMPT = "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n"
NEW_TOKENS = 32
OURS: dict[str, dict[str, Any]] = {
    "q4_0": {"sym": True},
    "q4_1": {"sym": False},
    # At 8 bits more refinement changes nothing that could be measured.
    "q8_0": {**QUALITIES["fast"], "sym": True, "bits": 8},
}
# The type of the embedding, which is the head too, in every quantized file.
EMBEDDING = "q8_0"
# llama.cpp's types, and whether each takes an importance matrix.
THEIRS = {"q4_0": True, "q4_1": True, "q8_0": False, "q4_k_m": True}


@dataclass(frozen=True)
class Run:
    """One quantized file."""

    name: str
    kind: str
    path: Path
    ours: bool


def our_files(full: Path, folder: Path, args: argparse.Namespace) -> list[Run]:
    runs = []
    for kind, changes in OURS.items():
        path = folder / f"ours-{kind}-{args.quality}-{args.nsamples}.gguf"
        if not path.exists():
            text = text_path("c4", args.cache)
            config = QuantConfig(**{**QUALITIES[args.quality], "group_size": GGUF_GROUP, **changes})
            gptq.quantize(
                full, text, config, save=path, nsamples=args.nsamples, seqlen=SEQLEN, device="cpu"
            )
        runs.append(Run("ours", kind, path, ours=True))
        print(f"ours, {kind}: written", flush=True)
    return runs


def their_files(peer: Peer, full: Path, matrix: Path) -> list[Run]:
    runs = []
    for kind, takes in THEIRS.items():
        for name, extra in (("llama.cpp", ()), ("llama.cpp, imatrix", (matrix,))):
            if takes or not extra:
                file = f"theirs-{kind}{'-imatrix' if extra else ''}.gguf"
                task = ("quantize", full, "OUT", kind, EMBEDDING, *extra)
                path = peer.make(file, *task)
                runs.append(Run(name, kind, path, ours=False))
    return runs


def own_loss(path: Path, windows: Tensor) -> float:
    """ln(perplexity) by this package, activations in float32."""
    return math.log(api.perplexity(api.open_weights(path, device="cpu"), windows))


def same_text(peer: Peer, path: Path) -> dict[str, object]:
    """Whether llama.cpp and this package go on alike from a prompt, both greedily."""
    theirs = peer.ask("text", path, prompt=PROMPT, count=NEW_TOKENS)
    model, tokenizer = gptq.load(path, device="cpu")
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    settings = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    with torch.no_grad():
        made = cast(Any, model).generate(ids, attention_mask=torch.ones_like(ids), **settings)
    ours = made[0, ids.shape[1] :].tolist()
    alike = sum(1 for _ in _common(ours, theirs["tokens"]))
    return {
        "prompt_ids_equal": ids[0].tolist() == theirs["prompt"],
        "equal_tokens": alike,
        "tokens": NEW_TOKENS,
        "text": theirs["text"],
    }


def _common(some: Sequence[int], others: Sequence[int]):
    """What two lists begin with alike."""
    for one, other in zip(some, others, strict=False):
        if one != other:
            return
        yield one


def measure(args: argparse.Namespace) -> tuple[list[dict], dict]:
    """A row for each file, and what is known of the full model."""
    peer = Peer(args.python, args.cache / "gguf", args.threads)
    original = permuted_copy(model_path(args.cache), args.cache / "smollm2-permuted")
    full = full_file(original, peer.folder / "full.gguf")
    tokenizer = open_model(original).tokenizer()
    windows = evaluation_windows(text_path("wiki", args.cache), tokenizer, SEQLEN, args.windows)
    calibration = calibration_windows(
        text_path("c4", args.cache), tokenizer, args.nsamples, SEQLEN, 0
    )
    matrix = importance(original, calibration, peer.folder / f"importance-{args.nsamples}.npz")
    runs = [*their_files(peer, full, matrix), *our_files(original, peer.folder, args)]
    base = peer.ask("score", full, windows=windows.tolist())
    own = own_loss(original, windows)
    rows = []
    for run in runs:
        scored = peer.ask("score", run.path, windows=windows.tolist())
        row: dict[str, Any] = {
            "name": run.name,
            "type": run.kind,
            "bits": scored["bits"],
            "types": scored["types"],
            "bytes": scored["bytes"],
            "gap_llama_cpp": scored["loss"] - base["loss"],
        }
        if run.ours:
            mine = own_loss(run.path, windows)
            row |= {"gap_ours": mine - own, "difference": scored["loss"] - mine}
            row["greedy"] = same_text(peer, run.path)
        rows.append(row)
        print(f"{run.name}, {run.kind}: {row['gap_llama_cpp']:.4f}", flush=True)
    about = {"loss_llama_cpp": base["loss"], "loss_ours": own, "version": base["version"]}
    return rows, about


def table(rows: Sequence[dict]) -> Table:
    shown = Table("file", "type", "bits a weight", "gap, llama.cpp", "gap, ours", "tokens alike")
    for row in sorted(rows, key=lambda row: (row["bits"], row["gap_llama_cpp"])):
        greedy = row.get("greedy")
        own = [f"{row['gap_ours']:.4f}"] if greedy else [""]
        own += [f"{greedy['equal_tokens']} of {greedy['tokens']}"] if greedy else []
        gap = f"{row['gap_llama_cpp']:.4f}"
        shown.add_row(row["name"], row["type"], f"{row['bits']:.2f}", gap, *own)
    return shown


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gguf_quality", description=(__doc__ or "").splitlines()[0]
    )
    add = parser.add_argument
    add("--python", required=True, help="of an environment with llama-cpp-python and gguf")
    add("--windows", type=int, default=20, metavar="N", help="evaluated (default: 20)")
    add("--nsamples", type=int, default=16, metavar="N", help="calibrated on (default: 16)")
    add("--threads", type=int, default=torch.get_num_threads(), metavar="N")
    add("--quality", choices=QUALITIES, default="default", help="of ours")
    add("--output", type=Path, default=RESULTS, help="file to write")
    add("--cache", type=Path, default=DEFAULT_CACHE, help="folder to keep files in")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        check_writable(args.output)
        torch.set_num_threads(args.threads)
        rows, about = measure(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    Console(width=100).print(table(rows))
    record = {
        "processor": processor(),
        "torch": torch.__version__,
        "llama_cpp_python": about.pop("version"),
        "windows": args.windows,
        "nsamples": args.nsamples,
        "seqlen": SEQLEN,
        "quality": args.quality,
        **about,
        "results": rows,
    }
    args.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
