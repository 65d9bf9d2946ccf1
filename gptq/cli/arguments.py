"""The arguments of a command line: which there are, and whether they make sense together."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from gptq import __version__
from gptq.checkpoints.names import FILE_ENDINGS, FOLDER_FORMATS
from gptq.cli.command import Parser
from gptq.cli.settings import WBITS, add_settings
from gptq.config import FULL_MODEL, QUALITIES, QuantConfig
from gptq.errors import UserError
from gptq.models import SPECS, ModelSpec

# Flags whose value may be left out: the next argument is theirs only if it ends like this.
OPTIONAL_VALUES = {f"--{name}": endings for name, endings in FILE_ENDINGS.items()}
# Or like this, which no MODEL or DATASET does, so that it can be refused.
FILES = (".pt", ".safetensors")
DEFAULT_NAME = ""
OUTPUTS = ("--save", "--save_safetensors", "--save-dir")
# Flags that do nothing unless one of the others is there.
NEEDS = {
    "--new-eval": ("--eval", "--eval-data"),
    "--eval-windows": ("--eval", "--eval-data"),
    "--max-new-tokens": ("--text", "--chat"),
    "--seed": ("--wbits", "--size", "--chat"),
    "--temperature": ("--chat",),
    "--top-p": ("--chat",),
    "--top-k": ("--chat",),
    "--repetition-penalty": ("--chat",),
    "--check": ("--benchmark",),
    "--resume": OUTPUTS,
    "--format": ("--save-dir",),
    "--quantize-embeddings": ("--save-dir",),
}
# A folder alone leaves the embedding and the head at 16 bits, but for some formats.
PACKS_EMBEDDINGS = {*OPTIONAL_VALUES, "--quantize-embeddings", "--format"}
# Flags that rounding has no use for. `--quality tune` trains what was rounded, too.
SOLVING_ONLY = (
    *("--quality", "--order", "--act-order", "--static-groups", "--percdamp"),
    *("--error-feedback", "--refine"),
)
QUANTIZING_ONLY = (
    *OUTPUTS,
    *("--quality", "--format", "--plain", "--quantize-embeddings", "--report"),
    *("--nsamples", "--resume", "--max-memory", "--size"),
)
# The least that can work; a token is predicted from at least one before it.
LEAST = {
    "--nsamples": 1,
    "--seqlen": 2,
    "--eval-windows": 1,
    "--max-new-tokens": 1,
    "--benchmark": 1,
    "--top-k": 0,
}
# From the first to the second.
RANGES = {
    "--temperature": (0.0, 10.0),
    "--top-p": (0.001, 1.0),
    "--repetition-penalty": (0.1, 10.0),
}
# The most, of any count: such numbers are slips, and fit where a count is kept.
MOST = 2**31 - 1
EXAMPLES = """examples:
  {command} MODEL c4 --wbits 4 --groupsize 128 --save
  {command} MODEL c4 --size 3.5GiB --save model.pt
  {command} MODEL wikitext2 --load model-4bit-128g.pt --eval
  {command} MODEL --load model-4bit-128g.pt --chat
"""


def join_optional_values(argv: Sequence[str]) -> list[str]:
    """Join `--save x.pt` into one argument, and give a bare `--save` an empty value.

    argparse would otherwise let `--save MODEL c4` swallow MODEL.
    """
    joined: list[str] = []
    remaining = list(argv)
    while remaining:
        argument = remaining.pop(0)
        endings = OPTIONAL_VALUES.get(argument)
        if endings is not None:
            has_value = (
                remaining
                and remaining[0].endswith((*endings, *FILES))
                and not remaining[0].startswith("-")
            )
            argument = f"{argument}={remaining.pop(0) if has_value else DEFAULT_NAME}"
        joined.append(argument)
    return joined


def parser(spec: ModelSpec | None) -> argparse.ArgumentParser:
    """The flags of GPTQ-for-LLaMa under their names, and a few more.

    spec: the command takes the architectures that share its script; None: any.
    A flag that is not given is None or False. Parsing raises UserError.
    """
    prog = "python -m gptq" if spec is None else f"{spec.script}.py"
    command = prog if spec is None else f"python {prog}"
    kinds = [name for name, it in SPECS.items() if spec is None or it.script == spec.script]
    parser = Parser(
        prog=prog,
        description=f"Quantize a model with GPTQ, or run one. Architectures: {', '.join(kinds)}.",
        epilog=EXAMPLES.format(command=command),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--version", action="version", version=f"gptq {__version__}")
    add("model", metavar="MODEL", help="local folder, hub name or .gguf file")
    add(
        "dataset",
        metavar="DATASET",
        nargs="?",
        help="c4, wikitext2, ptb, c4-new, ptb-new, or a text, .jsonl, .json or .parquet file",
    )
    _add_quantization(parser.add_argument_group("quantization"))
    _add_files(parser.add_argument_group("files"))
    _add_actions(parser.add_argument_group("what to do with the model"))
    _add_machine(parser.add_argument_group("machine"))
    return parser


def _add_quantization(group: argparse._ArgumentGroup) -> None:
    add_settings(group)
    add = group.add_argument
    add(
        "--quality",
        choices=QUALITIES,
        help="fast: less than half the time; best: a closer model in a few times the time; tune: "
        "scales and norms are trained after the solve, the closest model",
    )
    add(
        "--size",
        metavar="SIZE",
        help="such as 3.5GiB, in place of --wbits: each layer gets the bits and groups with which "
        "the model is closest to the full one, and each file (of a folder its weights) fits",
    )
    add("--nsamples", type=int, metavar="N", help="calibration windows (default: 128)")
    add(
        "--seqlen",
        type=int,
        metavar="N",
        help="tokens in a window, also with --eval (default: 2048, or the model's limit)",
    )
    add(
        "--seed",
        type=int,
        metavar="N",
        help="of the choice of windows (default: 0), and of what --chat samples (default: none)",
    )


def _add_files(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--save",
        metavar="PATH.pt",
        help="write a .pt state dict, or a .gguf file; PATH may be left out",
    )
    add("--save_safetensors", metavar="PATH.safetensors", help="the same as safetensors")
    add("--save-dir", metavar="DIR", help="write a Hugging Face folder")
    add(
        "--format",
        choices=FOLDER_FORMATS,
        help="of the folder (default: gptq with --sym, else compressed-tensors, or gptq_v2 if that "
        "cannot hold the model)",
    )
    add(
        "--quantize-embeddings",
        action="store_true",
        help="also in the folder of --save-dir, which then fewer programs read",
    )
    add("--report", metavar="DIR", help="write a page about the quantization, DIR/index.html")
    add("--resume", action="store_true", help="continue a quantization that was stopped")
    add(
        "--load",
        metavar="PATH",
        help="a quantized .pt, .safetensors, .gguf or folder made from MODEL",
    )


def _add_actions(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--eval", action="store_true", help="print perplexity on DATASET")
    add("--new-eval", action="store_true", help="evaluate c4 and ptb as c4-new and ptb-new")
    add("--eval-data", metavar="DATASET", action="append", help="evaluate on this instead")
    add("--eval-windows", type=int, metavar="N", help="evaluate on the first N windows only")
    add("--text", metavar="PROMPT", help="write on from PROMPT")
    add("--chat", action="store_true", help="answer lines from standard input")
    add("--max-new-tokens", type=int, metavar="N", help="of --text and --chat (default: 128)")
    add("--temperature", type=float, metavar="T", help="of --chat (default: 0, the likeliest)")
    add("--top-p", type=float, metavar="P", help="of --chat: sample among so much probability")
    add("--top-k", type=int, metavar="K", help="of --chat: sample among so many tokens")
    add("--repetition-penalty", type=float, metavar="R", help="of --chat, such as 1.2")
    add("--benchmark", type=int, metavar="N", help="time N tokens of DATASET, one by one")
    add("--check", action="store_true", help="with --benchmark: perplexity of those tokens too")


def _add_machine(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--device", help="such as cuda:0 or cpu (default: a GPU if there is one)")
    add(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="type of activations (default: float32 on a CPU, the model's 16-bit type on a GPU)",
    )
    add(
        "--max-memory",
        metavar="SIZE",
        help="such as 6GiB: quantizing, activations go to disk (a GPU's to the machine's "
        "memory if they fit) where they would exceed it "
        "(default: what is free)",
    )


def default_name(name: str, config: QuantConfig, suffix: str, mixed: str | None = None) -> Path:
    """`belle-llama-7b-2m-4bit-128g.pt` for BELLE-LLAMA-7B-2M, in the current folder.

    mixed: what a model of mixed widths fits, in place of bits and group: `3.5bit` or `3.5GiB`.
    """
    if mixed is not None:
        return Path(f"{name.lower()}-{mixed}{suffix}")
    group = f"-{config.group_size}g" if config.group_size != -1 else ""
    return Path(f"{name.lower()}-{config.bits}bit{group}{suffix}")


def check_flags(arguments: argparse.Namespace, quantizing: bool) -> None:
    """Raise UserError for flags that contradict each other, cannot work or would do nothing."""
    values = {
        _flag(name): value
        for name, value in vars(arguments).items()
        if value is not None and value is not False
    }
    if arguments.load is not None and isinstance(arguments.wbits, float):
        raise UserError(f"--wbits {arguments.wbits:g} is for quantizing; leave it out, or --load")
    if arguments.load is not None and arguments.wbits == FULL_MODEL:
        raise UserError(f"--wbits {FULL_MODEL} is the full model; leave out --load, or --wbits")
    for flag in ("--save-dir", "--report", "--load"):
        if values.get(flag) is not None and not values[flag].strip():
            raise UserError(f"{flag} is empty; give it a value")
    if arguments.text is not None and not arguments.text.strip():
        raise UserError("the prompt is empty; give --text some words to go on from")
    for flag in QUANTIZING_ONLY:
        if flag in values and not quantizing:
            raise UserError(f"{flag} is for quantizing: it needs {WBITS} and no --load")
    for flag, needed in NEEDS.items():
        if flag in values and not values.keys() & set(needed):
            raise UserError(f"{flag} needs {' or '.join(needed)}")
    for flag in ("--embedding-bits", "--plain"):
        if flag in values and "--save-dir" in values and not values.keys() & PACKS_EMBEDDINGS:
            raise UserError(f"{flag} does nothing to a folder; add --quantize-embeddings")
    for flag in SOLVING_ONLY if arguments.nearest else ():
        if values.get(flag, "tune") != "tune":
            raise UserError(f"{flag} does nothing with --nearest; leave out one of them")
    for flag, endings in OPTIONAL_VALUES.items():
        name = values.get(flag, DEFAULT_NAME)
        if name != DEFAULT_NAME and not name.endswith(endings):
            other = next((it for it, ends in OPTIONAL_VALUES.items() if name.endswith(ends)), "")
            advice = f", or {other}" if other else ""
            raise UserError(
                f"{flag} {name}: give a name that ends in {' or '.join(endings)}{advice}"
            )
    for flag, reads_dataset in (("--eval", not arguments.eval_data), ("--benchmark", True)):
        if flag in values and reads_dataset and arguments.dataset is None:
            raise UserError(f"{flag} needs DATASET: c4, wikitext2, ptb or a text file")
    for flag in (*LEAST, "--groupsize"):
        if values.get(flag, 0) > MOST:
            raise UserError(f"{flag} {values[flag]} is not possible: give {MOST} or less")
    for flag, (low, high) in RANGES.items():
        if flag in values and not low <= values[flag] <= high:
            raise UserError(f"{flag} {values[flag]} is not possible: give {low:g} to {high:g}")
    least = {**LEAST, "--benchmark": 2 if arguments.check else 1}
    for flag, lowest in least.items():
        if flag in values and values[flag] < lowest:
            raise UserError(f"{flag} {values[flag]} is not possible: give {lowest} or more")


def _flag(name: str) -> str:
    """The flag whose value argparse stores under a name."""
    return "--" + (name if name == "save_safetensors" else name.replace("_", "-"))
