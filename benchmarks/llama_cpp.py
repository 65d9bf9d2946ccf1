"""Speed of a packed model and of llama.cpp: the same shape, the same machine, in turn.

    python -m benchmarks.llama_cpp --python PYTHON [--shape llama-7b] [--blocks N] [--threads N]
        [--prompt N] [--tokens N] [--repeats N] [--activations {float,int8}...]
        [--output FILE] [--cache FOLDER]

PYTHON is of an environment with llama-cpp-python and gguf. Random weights on both sides: ours
rounded to 4 bits in groups of 128 (4.16 bits a weight), llama.cpp's Q4_0 (4.5), each with a head of
16 and of 8 bits. llama.cpp rounds activations to 8 bits, as ours do with `int8`.

Prefill is one pass over --prompt tokens for the last one's logits. Decoding is --tokens more after
a few: ours by model.generate, with all that it does between tokens; llama.cpp's by eval alone.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from time import perf_counter
from typing import Any, cast

import torch
from rich.console import Console
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

import gptq
from benchmarks.common.assets import DEFAULT_CACHE
from benchmarks.kernels import processor
from benchmarks.llama_cpp_report import PEER, Run, results, table
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
HEADS = (16, 8)
ACTIVATIONS = ("float", "int8")
START = 8  # tokens before the decoded ones
WARM_UP = 64  # tokens


# Ours ----------------------------------------------------------------------------------------


def our_folder(folder: Path, shape: str, blocks: int) -> Path:
    """A folder of configuration, tokenizer and `head-BITS.safetensors` files, made if it is new.

    One block is rounded, and all blocks are copies of it.
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
            packed, declared = open_checkpoint(small)
            write_safetensors(
                unfinished / f"head-{head}.safetensors", repeated(packed, first, blocks), declared
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


def in_peer(
    python: str, threads: int, *argv: str, script: Path | None = None, flag: str = "--python"
) -> dict[str, Any]:
    """What a script of `peers` prints. Raises UserError if it fails or cannot be run."""
    try:
        done = subprocess.run(
            [python, str(script or SCRIPT), *argv],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )
    except OSError as error:
        raise UserError(
            f"{flag} {python}: cannot be run ({error.strerror}); give the interpreter of an "
            "environment with llama-cpp-python and gguf"
        ) from error
    if done.returncode:
        reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise UserError(f"{PEER} failed: {reason}")
    try:
        return json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError) as error:
        raise UserError(f"{flag} {python}: is no Python, by what it answers") from error


def peer_config(config: PretrainedConfig) -> dict[str, Any]:
    """A shape as peers/llama_cpp_run.py takes it."""
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

    files: by bits of the head, the peer's files.
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
            argv = "time", file["path"], json.dumps(settings)
            seconds = in_peer(args.python, args.threads, *argv)
            yield Run(PEER, head, file["file_bytes"], file["read_bytes"], **seconds)
            for activations in args.activations:
                set_activations(model, activations)
                seconds = time_ours(model, args.prompt, args.tokens)
                yield Run(f"ours, {activations}", head, *sizes[head], **seconds)


def command(args: argparse.Namespace) -> str:
    """The line that measures the same again, without paths of this machine."""
    names = ("shape", "blocks", "threads", "prompt", "tokens", "repeats")
    options = [f"--{name} {getattr(args, name)}" for name in names]
    argv = ["python -m benchmarks.llama_cpp --python PYTHON", *options]
    return " ".join([*argv, "--activations", *args.activations])


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
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
    return parser.parse_args(argv)


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


def compare(args: argparse.Namespace) -> tuple[list[Run], dict[str, Any]]:
    """Measure both sides; the runs, and what the peer says of itself. Raises UserError."""
    config = check(args)
    torch.set_num_threads(args.threads)
    place = args.cache / "llama-cpp" / f"{args.shape}-{args.blocks}"
    task = "write", str(place / "gguf"), json.dumps(peer_config(config))
    peer = in_peer(args.python, args.threads, *task)
    ours = our_folder(place / "ours", args.shape, args.blocks)
    runs: list[Run] = []
    for run in measure(args, ours, peer["files"]):
        runs.append(run)
        rate = run.decode_rate(args.tokens)
        print(f"{run.method}, {run.head}-bit head: {rate:.2f} tokens a second", flush=True)
    return runs, peer


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        runs, peer = compare(args)
        rows = results(runs, args.prompt, args.tokens)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    load = os.getloadavg()[0]
    console = Console(width=100)
    console.print(table(rows))
    console.print(
        f"{args.shape}, {args.blocks} blocks, {args.threads} threads, load {load:.1f}; "
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
        "load_average": load,
        "command": command(args),
        "results": rows,
        "runs": [asdict(run) for run in runs],
    }
    args.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
