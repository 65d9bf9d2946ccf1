"""Speed of a packed model beside llama.cpp: the same shape, the same machine, in turn.

    python -m benchmarks.llama_cpp --python PYTHON [--shape llama-7b] [--blocks N] [--threads N]
        [--prompt N] [--tokens N] [--repeats N] [--activations {float,int8}...]
        [--output FILE] [--cache FOLDER]

PYTHON is of an environment with llama-cpp-python and gguf. Random weights on both sides: ours
rounded to 4 bits in groups of 128 (4.16 bits a weight), llama.cpp's Q4_0 (4.5), each with a head of
16 and of 8 bits. llama.cpp rounds activations to 8 bits, as ours do with `int8`.

Prefill is one pass over --prompt tokens for the last one's logits. Decoding is --tokens more after
a few: ours by model.generate, all that it does between tokens included; llama.cpp's by eval alone.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any, cast

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

import gptq
from benchmarks.common.assets import DEFAULT_CACHE
from benchmarks.kernels import processor
from benchmarks.release_table import ROUNDING, repeated
from benchmarks.shapes import SHAPES, write_model
from gptq.checkpoints.reading import open_checkpoint
from gptq.checkpoints.writing import write_safetensors
from gptq.errors import UserError
from gptq.files.atomic import check_writable, whole_folder
from gptq.models import SPECS
from gptq.nn import PackedModule, QuantLinear
from quant_cuda import PreparedWeight
from quant_cuda.weight import AnyWeight

RESULTS = Path(__file__).parent / "results" / "llama-cpp.json"
SCRIPT = Path(__file__).parent / "peers" / "llama_cpp_run.py"
PEER = "llama.cpp"
HEADS = (16, 8)
ACTIVATIONS = ("float", "int8")
START = 8  # tokens that decoding goes on from
WARM_UP = 64  # tokens


@dataclass(frozen=True)
class Run:
    """One pass, or the best of several."""

    method: str
    head: int
    """Bits of the output head in the file."""
    file_bytes: int
    read_bytes: int
    """Weights in memory that each token needs: all but the embedding."""
    prefill_seconds: float
    """Of the whole prompt."""
    start_seconds: float
    """Of what decoding goes on from."""
    whole_seconds: float
    """Of that and of the tokens decoded."""

    def decode_rate(self, tokens: int) -> float:
        """Tokens a second, one at a time. Raises UserError where they took no time."""
        spent = self.whole_seconds - self.start_seconds
        if spent <= 0:
            raise UserError(f"--tokens {tokens}: too few to be timed; give more")
        return tokens / spent


# Ours ----------------------------------------------------------------------------------------


def our_folder(folder: Path, shape: str, blocks: int) -> Path:
    """A folder of configuration, tokenizer and `head-BITS.safetensors` files, made if it is new.

    One block is rounded and stands for all.
    """
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=folder.parent) as scratch,
        whole_folder(folder) as unfinished,
    ):
        one = write_model(Path(scratch) / "one-block", shape, blocks=1)
        for file in one.iterdir():
            if file.suffix != ".safetensors" and not file.name.endswith(".index.json"):
                shutil.copy(file, unfinished)
        settings = json.loads((one / "config.json").read_text(encoding="utf-8"))
        settings["num_hidden_layers"] = blocks
        (unfinished / "config.json").write_text(json.dumps(settings), encoding="utf-8")
        first = f"{SPECS[settings['model_type']].block(0)}."
        for head in HEADS:
            small = Path(scratch) / f"{head}.safetensors"
            rounding = replace(ROUNDING, embedding_bits=head)
            gptq.quantize(one, None, rounding, save_safetensors=small)
            packed, said = open_checkpoint(small)
            write_safetensors(
                unfinished / f"head-{head}.safetensors", repeated(packed, first, blocks), said
            )
    return folder


def read_bytes(model: PreTrainedModel) -> int:
    """Bytes of a model's weights in memory, the input embedding's left out."""
    embedding = cast(Any, model).get_input_embeddings()
    total = 0
    for module in model.modules():
        if module is embedding:
            continue
        total += sum(weight.nbytes for weight in module.parameters(recurse=False))
        if isinstance(module, PackedModule):
            total += packed_bytes(module.prepare())
    return total


def packed_bytes(weight: AnyWeight) -> int:
    if isinstance(weight, PreparedWeight):
        return sum(tensor.nbytes for tensor in weight.tensors)
    return weight.qweight.nbytes + weight.qzeros.nbytes + weight.scales.nbytes


def set_activations(model: PreTrainedModel, activations: str) -> None:
    """As gptq.load's `int8_activations` does, for a model that is loaded."""
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.int8_activations = activations == "int8"


@torch.no_grad()
def time_ours(model: PreTrainedModel, prompt: int, tokens: int) -> dict[str, Any]:
    """Seconds by the fields of Run."""
    generator = torch.Generator().manual_seed(0)
    longest = max(prompt, WARM_UP)
    ids = torch.randint(3, model.config.vocab_size, (1, longest), generator=generator)

    def forward(some: Tensor) -> float:
        started = perf_counter()
        model(input_ids=some, use_cache=True, logits_to_keep=1)
        return perf_counter() - started

    def generate(count: int) -> float:
        some = ids[:, :START]
        started = perf_counter()
        cast(Any, model).generate(
            input_ids=some,
            attention_mask=torch.ones_like(some),
            do_sample=False,
            min_new_tokens=count,
            max_new_tokens=count,
            pad_token_id=0,
        )
        return perf_counter() - started

    forward(ids[:, :WARM_UP])
    generate(2)
    return {
        "prefill_seconds": forward(ids[:, :prompt]),
        "start_seconds": generate(1),
        "whole_seconds": generate(1 + tokens),
    }


# llama.cpp -----------------------------------------------------------------------------------


def in_peer(python: str, threads: int, *words: str) -> dict[str, Any]:
    """What peers/llama_cpp_run.py says. Raises UserError where it fails or cannot be run."""
    try:
        done = subprocess.run(
            [python, str(SCRIPT), *words],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )
    except OSError as error:
        raise UserError(
            f"--python {python}: cannot be run ({error.strerror}); give the interpreter of an "
            "environment with llama-cpp-python and gguf"
        ) from error
    if done.returncode:
        said = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise UserError(f"{PEER} failed: {said}")
    try:
        return json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError) as error:
        raise UserError(f"--python {python}: is no Python, by what it answers") from error


def peer_config(config: PretrainedConfig) -> dict[str, Any]:
    """What peers/llama_cpp_run.py needs to know of a shape."""
    return {
        "vocabulary": config.vocab_size,
        "hidden": config.hidden_size,
        "intermediate": config.intermediate_size,
        "blocks": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "positions": config.max_position_embeddings,
        "epsilon": config.rms_norm_eps,
        "theta": config.rope_parameters["rope_theta"],
    }


# Both ----------------------------------------------------------------------------------------


def measure(args: argparse.Namespace, folder: Path, files: dict[str, Any]) -> Iterator[Run]:
    """Every method once a repeat, those of a head in turn.

    files: by bits of the head, what the peer says of its own.
    """
    settings = {
        "threads": args.threads,
        "prompt": args.prompt,
        "start": START,
        "tokens": args.tokens,
        "warm_up": WARM_UP,
    }
    paths = {head: folder / f"head-{head}.safetensors" for head in HEADS}
    models = {head: gptq.load(folder, path, device="cpu")[0] for head, path in paths.items()}
    sizes = {head: (paths[head].stat().st_size, read_bytes(models[head])) for head in HEADS}
    for _ in range(args.repeats):
        for head, model in models.items():
            file = files[str(head)]
            words = "time", file["path"], json.dumps(settings)
            seconds = in_peer(args.python, args.threads, *words)
            yield Run(PEER, head, file["file_bytes"], file["read_bytes"], **seconds)
            for activations in args.activations:
                set_activations(model, activations)
                seconds = time_ours(model, args.prompt, args.tokens)
                yield Run(f"ours, {activations}", head, *sizes[head], **seconds)


def best(runs: Sequence[Run]) -> list[Run]:
    """The least seconds of each kind, by head and method, in the order they first came in."""
    found: dict[tuple[int, str], Run] = {}
    for run in runs:
        known = found.setdefault((run.head, run.method), run)
        found[run.head, run.method] = replace(
            known,
            prefill_seconds=min(known.prefill_seconds, run.prefill_seconds),
            start_seconds=min(known.start_seconds, run.start_seconds),
            whole_seconds=min(known.whole_seconds, run.whole_seconds),
        )
    return list(found.values())


def results(runs: Sequence[Run], prompt: int, tokens: int) -> list[dict[str, Any]]:
    """The best of each method: tokens a second, GB/s of weights in decoding, and how many times as
    fast as llama.cpp with a head of the same bits."""
    made: list[dict[str, Any]] = []
    for run in best(runs):
        decode = run.decode_rate(tokens)
        made.append(
            {
                "method": run.method,
                "head": run.head,
                "file_bytes": run.file_bytes,
                "read_bytes": run.read_bytes,
                "decode": decode,
                "gigabytes": run.read_bytes * decode / 1e9,
                "prefill": prompt / run.prefill_seconds,
            }
        )
    peers = {row["head"]: row for row in made if row["method"] == PEER}
    for row in made:
        for kind in ("decode", "prefill"):
            row[f"{kind}_ratio"] = row[kind] / peers[row["head"]][kind]
    return made


def table(rows: Sequence[dict[str, Any]]) -> Table:
    made = Table(title=f"beside {PEER}", caption=f"x: times as fast as {PEER}; best of the repeats")
    headings = ("method", "head", "file MB", "read MB", "decode tok/s", "GB/s", "x")
    for heading in (*headings, "prefill tok/s", "x"):
        made.add_column(heading, justify="left" if heading == "method" else "right", no_wrap=True)
    for row in rows:
        ours = row["method"] != PEER
        made.add_row(
            row["method"],
            str(row["head"]),
            f"{row['file_bytes'] / 1e6:.0f}",
            f"{row['read_bytes'] / 1e6:.0f}",
            f"{row['decode']:.2f}",
            f"{row['gigabytes']:.1f}",
            f"{row['decode_ratio']:.2f}" if ours else "",
            f"{row['prefill']:.1f}",
            f"{row['prefill_ratio']:.2f}" if ours else "",
        )
    return made


def command(args: argparse.Namespace) -> str:
    """The line that measures the same again, without places on this machine."""
    names = ("shape", "blocks", "threads", "prompt", "tokens", "repeats")
    given = [f"--{name} {getattr(args, name)}" for name in names]
    words = ["python -m benchmarks.llama_cpp --python PYTHON", *given]
    return " ".join([*words, "--activations", *args.activations])


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.llama_cpp", description=(__doc__ or "").splitlines()[0]
    )
    add = parser.add_argument
    add("--python", required=True, help="of an environment with llama-cpp-python and gguf")
    add("--shape", default="llama-7b", help=f"{', '.join(_shapes())} (default: llama-7b)")
    add("--blocks", type=int, default=8, metavar="N", help="of the model (default: 8)")
    add("--threads", type=int, default=torch.get_num_threads(), metavar="N")
    add("--prompt", type=int, default=512, metavar="N", help="tokens of prefill (default: 512)")
    add("--tokens", type=int, default=32, metavar="N", help="tokens decoded (default: 32)")
    add("--repeats", type=int, default=3, metavar="N", help="turns (default: 3)")
    add("--activations", nargs="+", choices=ACTIVATIONS, default=[*ACTIVATIONS], help="of ours")
    add("--output", type=Path, default=RESULTS, help="file to write")
    add("--cache", type=Path, default=DEFAULT_CACHE, help="folder to keep the models in")
    return parser.parse_args(words)


def _shapes() -> list[str]:
    return [shape for shape in SHAPES if shape.startswith("llama-")]


def check(args: argparse.Namespace) -> PretrainedConfig:
    """The shape's configuration. Raises UserError for what cannot be measured."""
    if args.shape not in _shapes():
        raise UserError(f"--shape {args.shape}: choose of {', '.join(_shapes())}")
    for name in ("blocks", "threads", "prompt", "tokens", "repeats"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: give 1 or more")
    config = SHAPES[args.shape]()
    config.num_hidden_layers = args.blocks
    limits = {"prompt": config.max_position_embeddings}
    limits["tokens"] = limits["prompt"] - START
    for name, limit in limits.items():
        if getattr(args, name) > limit:
            raise UserError(f"--{name} {getattr(args, name)}: {args.shape} takes {limit} at most")
    check_writable(args.output)
    return config


def main(words: Sequence[str] | None = None) -> int:
    args = parse(words)
    runs: list[Run] = []
    try:
        config = check(args)
        torch.set_num_threads(args.threads)
        place = args.cache / "llama-cpp" / f"{args.shape}-{args.blocks}"
        task = "write", str(place / "gguf"), json.dumps(peer_config(config))
        peer = in_peer(args.python, args.threads, *task)
        ours = our_folder(place / "ours", args.shape, args.blocks)
        for run in measure(args, ours, peer["files"]):
            runs.append(run)
            rate = run.decode_rate(args.tokens)
            print(f"{run.method}, {run.head}-bit head: {rate:.2f} tokens a second", flush=True)
        rows = results(runs, args.prompt, args.tokens)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    busy = os.getloadavg()[0]
    console = Console(width=100)
    console.print(table(rows))
    console.print(
        f"{args.shape}, {args.blocks} blocks, {args.threads} threads, load {busy:.1f}; "
        f"{PEER} of llama-cpp-python {peer['version']}"
    )
    record = {
        "processor": processor(),
        "torch": torch.__version__,
        "llama_cpp_python": peer["version"],
        "llama_cpp_system": peer["system"],
        "shape": args.shape,
        "blocks": args.blocks,
        "threads": args.threads,
        "prompt": args.prompt,
        "tokens": args.tokens,
        "load_average": busy,
        "command": command(args),
        "results": rows,
        "runs": [asdict(run) for run in runs],
    }
    args.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
