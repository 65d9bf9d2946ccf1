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
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from gguf import GGMLQuantizationType as GgmlType
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import gptq
from benchmarks.common.assets import DEFAULT_CACHE, model_path, text_path
from benchmarks.common.permuted import permuted_copy
from benchmarks.kernels import processor
from benchmarks.llama_cpp import in_peer
from gptq import QuantConfig, api
from gptq.blockwise.gguf_model import gguf_name, gguf_rows
from gptq.blockwise.source import open_model
from gptq.checkpoints import gguf_format
from gptq.checkpoints.names import GGUF_GROUP
from gptq.checkpoints.writing import Contents
from gptq.config import QUALITIES
from gptq.data.windows import calibration_windows, evaluation_windows
from gptq.errors import UserError
from gptq.files.atomic import check_writable, whole_file
from gptq.files.lazy import Entry, LazyTensors, Read

SCRIPT = Path(__file__).parent / "peers" / "llama_cpp_quality.py"
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
# llama.cpp's types, and whether each takes an importance matrix.
THEIRS = {"q4_0": True, "q4_1": True, "q8_0": False, "q4_k_m": True}


@dataclass(frozen=True)
class Run:
    """One quantized file."""

    name: str
    kind: str
    path: Path
    ours: bool


class Peer:
    """llama.cpp, in its own environment. Every file is made once and then kept."""

    def __init__(self, python: str, folder: Path, threads: int) -> None:
        self.python, self.folder, self.threads = python, folder, threads
        folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, *argv: object) -> dict:
        return in_peer(self.python, self.threads, *map(str, argv), script=SCRIPT)

    def make(self, name: str, *task: object) -> Path:
        """A file that a task writes; `OUT` in its arguments is the file's name."""
        path = self.folder / name
        if not path.exists():
            with whole_file(path) as unfinished:
                self(*(unfinished if part == "OUT" else part for part in task))
        return path

    def ask(self, task: str, file: Path, **request: object) -> dict:
        place = self.folder / f"{task}.json"
        place.write_text(json.dumps({**request, "threads": self.threads}))
        return self(task, file, place)


def full_file(folder: Path, target: Path) -> Path:
    """A Hugging Face folder as a .gguf file in float32."""
    if target.exists():
        return target
    source = open_model(folder)
    config, names = source.config, source.spec.gguf
    assert names is not None
    entries, types = {}, {}
    for full in source.tensors:
        name, entry = gguf_name(source.spec, names, full), source.tensors.entry(full)
        rows = gguf_rows(config, names, name, entry.shape[0])
        index = slice(None) if rows is None else rows
        read = partial(_rows, entry.read, index)
        entries[name] = Entry(read, entry.shape, torch.float32)
        types[name] = GgmlType.F32
    stored = LazyTensors(entries, {"types": types, "arrays": {}})
    gguf_format.write(target, Contents(source, stored, None, {}))
    return target


def _rows(read: Read, index: Tensor | slice) -> Tensor:
    return read().float()[index]


def importance(full: Path, windows: Tensor, target: Path) -> Path:
    """The mean square of each input of each layer, by the weights' names in .gguf files."""
    if target.exists():
        return target
    model, _ = gptq.load(full, device="cpu")
    spec = open_model(full).spec
    sums: dict[str, Tensor] = {}

    def add(name: str, x: Tensor) -> None:
        squares = x.detach().double().flatten(0, -2).square().sum(0)
        sums[name] = sums.get(name, 0) + squares

    assert spec.gguf is not None
    for layer, module in model.named_modules():
        if isinstance(module, nn.Linear) and layer.startswith(spec.blocks):
            name = gguf_name(spec, spec.gguf, f"{layer}.weight")
            module.register_forward_pre_hook(lambda _, inputs, name=name: add(name, inputs[0]))
    with torch.no_grad():
        for window in windows:
            model(input_ids=window[None], use_cache=False, logits_to_keep=1)
    means = {name: (total / windows.numel()).float().numpy() for name, total in sums.items()}
    with whole_file(target) as unfinished, unfinished.open("wb") as file:
        np.savez(file, allow_pickle=False, **means)
    return target


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
                path = peer.make(file, "quantize", full, "OUT", kind, *extra)
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
