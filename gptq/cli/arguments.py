"""The words of a command line: which there are, and whether they make sense together."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from gptq.checkpoints.names import FOLDER_FORMATS
from gptq.config import EMBEDDING_BITS, ORDERS, QUALITIES, SCALE_SEARCHES, QuantConfig
from gptq.errors import UserError
from gptq.models import ModelSpec

# Flags whose value may be left out: the next word is theirs only if it ends like this.
OPTIONAL_VALUES = {"--save": ".pt", "--save_safetensors": ".safetensors"}
DEFAULT_NAME = ""
OUTPUTS = ("--save", "--save_safetensors", "--save-dir")
# Flags that do nothing unless one of the others is there.
NEEDS = {
    "--new-eval": ("--eval", "--eval-data"),
    "--eval-windows": ("--eval", "--eval-data"),
    "--max-new-tokens": ("--text", "--chat"),
    "--check": ("--benchmark",),
    "--resume": OUTPUTS,
    "--format": ("--save-dir",),
    "--quantize-embeddings": ("--save-dir",),
}
QUANTIZING_ONLY = (
    *OUTPUTS,
    *("--quality", "--format", "--plain", "--quantize-embeddings", "--report"),
    *("--nsamples", "--seed", "--resume", "--max-memory"),
)
# The least that can work; a token is predicted from at least one before it.
LEAST = {
    "--nsamples": 1,
    "--seqlen": 2,
    "--eval-windows": 1,
    "--max-new-tokens": 1,
    "--benchmark": 1,
}
EXAMPLES = """examples:
  python {prog} MODEL c4 --wbits 4 --groupsize 128 --save
  python {prog} MODEL wikitext2 --load model-4bit-128g.pt --eval
  python {prog} MODEL --load model-4bit-128g.pt --chat
"""


def join_optional_values(words: Sequence[str]) -> list[str]:
    """Tie `--save x.pt` into one word, and give a bare `--save` an empty value.

    argparse would otherwise let `--save MODEL c4` swallow MODEL.
    """
    joined: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        ending = OPTIONAL_VALUES.get(word)
        if ending is not None:
            taken = rest and rest[0].endswith(ending) and not rest[0].startswith("-")
            word = f"{word}={rest.pop(0) if taken else DEFAULT_NAME}"
        joined.append(word)
    return joined


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with a command line in one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def parser(spec: ModelSpec) -> argparse.ArgumentParser:
    """The flags of GPTQ-for-LLaMa under their names, and a few more.

    A flag that is not given is None or False. Parsing raises UserError.
    """
    prog = f"{spec.model_type}.py"
    command = _Parser(
        prog=prog,
        description=f"Quantize a {spec.model_type} model with GPTQ, or run one.",
        epilog=EXAMPLES.format(prog=prog),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = command.add_argument
    add("model", metavar="MODEL", help="local folder, hub name or .gguf file")
    add(
        "dataset",
        metavar="DATASET",
        nargs="?",
        help="c4, wikitext2, ptb, c4-new, ptb-new, or a text, .jsonl, .json or .parquet file",
    )
    _add_quantization(command.add_argument_group("quantization"))
    _add_files(command.add_argument_group("files"))
    _add_actions(command.add_argument_group("what to do with the model"))
    machine = command.add_argument_group("machine")
    machine.add_argument("--device", help="such as cuda:0 or cpu (default: a GPU if there is one)")
    machine.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="type of activations (default: float32 on a CPU, the model's 16-bit type on a GPU)",
    )
    machine.add_argument(
        "--max-memory",
        metavar="SIZE",
        help="such as 6GiB: quantizing, activations go to disk (a GPU's to the machine's "
        "memory if they fit) where they would exceed it "
        "(default: what is free)",
    )
    return command


def _add_quantization(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--wbits", type=int, choices=(2, 3, 4, 8, 16), help="bits a weight; 16 is the full model")
    add(
        "--groupsize",
        type=int,
        metavar="N",
        help="inputs that share a scale; -1 for all (default: 128)",
    )
    add("--sym", action="store_true", help="symmetric grids; every reader takes them")
    add("--nearest", action="store_true", help="round to nearest only; needs no DATASET")
    add("--nsamples", type=int, metavar="N", help="calibration windows (default: 128)")
    add(
        "--seqlen",
        type=int,
        metavar="N",
        help="tokens in a window, also with --eval (default: 2048, or the model's limit)",
    )
    add("--seed", type=int, metavar="N", help="of the choice of windows (default: 0)")
    add(
        "--percdamp",
        type=float,
        metavar="SHARE",
        help="damping, a share of the Hessian's mean diagonal (default: chosen for each layer)",
    )
    add(
        "--error-feedback",
        type=float,
        metavar="SHARE",
        help="share of the error of layers before it that a layer makes up for (default: 0.5)",
    )
    add("--order", choices=ORDERS, help="in what order columns are solved (default: gar)")
    add("--act-order", action="store_true", help="the same as --order act")
    add("--static-groups", action="store_true", help="find all grids before solving")
    add(
        "--true-sequential",
        action=argparse.BooleanOptionalAction,
        help="solve a block's layers in turn, each on what the ones before it produce (default)",
    )
    add(
        "--refine",
        type=int,
        metavar="N",
        help="rounds of refinement after a layer is solved (default: 3)",
    )
    add(
        "--quality",
        choices=QUALITIES,
        help="best: a closer model in a few times the time; fast: less than half the time",
    )
    add("--scale-search", choices=SCALE_SEARCHES, help="how scales are found (default: hessian)")
    add(
        "--embedding-bits",
        type=int,
        choices=EMBEDDING_BITS,
        help="of the embedding and the output head in files (default: 8)",
    )


def _add_files(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--save", metavar="PATH.pt", help="write a .pt state dict; PATH may be left out")
    add("--save_safetensors", metavar="PATH.safetensors", help="the same as safetensors")
    add("--save-dir", metavar="DIR", help="write a Hugging Face folder")
    add(
        "--format",
        choices=FOLDER_FORMATS,
        help="of the folder's zero points (default: gptq with --sym, else gptq_v2)",
    )
    add(
        "--plain",
        action="store_true",
        help="files of exactly GPTQ-for-LLaMa's tensors: the same as --embedding-bits 16",
    )
    add(
        "--quantize-embeddings",
        action="store_true",
        help="also in the folder of --save-dir, which then only this package reads",
    )
    add("--report", metavar="DIR", help="write a page about the quantization, DIR/index.html")
    add("--resume", action="store_true", help="continue a quantization that was stopped")
    add("--load", metavar="PATH", help="a quantized .pt, .safetensors or folder made from MODEL")


def _add_actions(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--eval", action="store_true", help="print perplexity on DATASET")
    add("--new-eval", action="store_true", help="evaluate c4 and ptb as c4-new and ptb-new")
    add("--eval-data", metavar="DATASET", action="append", help="evaluate on this instead")
    add("--eval-windows", type=int, metavar="N", help="evaluate on the first N windows only")
    add("--text", metavar="PROMPT", help="write on from PROMPT")
    add("--chat", action="store_true", help="answer lines from standard input")
    add("--max-new-tokens", type=int, metavar="N", help="of --text and --chat (default: 128)")
    add("--benchmark", type=int, metavar="N", help="time N tokens of DATASET, one by one")
    add("--check", action="store_true", help="with --benchmark: perplexity of those tokens too")


def given_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the flags say of a quantization, by the fields of QuantConfig; no defaults."""
    if arguments.act_order and arguments.order not in (None, "act"):
        raise UserError(f"--act-order and --order {arguments.order} disagree; give one of them")
    if arguments.plain and arguments.embedding_bits not in (None, 16):
        raise UserError(
            f"--plain and --embedding-bits {arguments.embedding_bits} disagree; give one of them"
        )
    asked = {
        "bits": arguments.wbits,
        "group_size": arguments.groupsize,
        "sym": arguments.sym or None,
        "order": "act" if arguments.act_order else arguments.order,
        "static_groups": arguments.static_groups or None,
        "true_sequential": arguments.true_sequential,
        "percdamp": arguments.percdamp,
        "scale_search": arguments.scale_search,
        "error_feedback": arguments.error_feedback,
        "refine": arguments.refine,
        "method": "rtn" if arguments.nearest else None,
        "embedding_bits": 16 if arguments.plain else arguments.embedding_bits,
    }
    return {key: value for key, value in asked.items() if value is not None}


def quant_config(arguments: argparse.Namespace) -> QuantConfig:
    """The settings that the flags ask for, defaults for what they leave open."""
    nearest = {"scale_search": "minmax"} if arguments.nearest else {}
    fixed = {} if arguments.percdamp is None else {"adaptive_damp": False}
    quality = QUALITIES[arguments.quality or "default"]
    return QuantConfig(**{**nearest, **fixed, **quality, **given_settings(arguments)})


def default_name(name: str, config: QuantConfig, suffix: str) -> Path:
    """`belle-llama-7b-2m-4bit-128g.pt` for BELLE-LLAMA-7B-2M, in the current folder."""
    group = f"-{config.group_size}g" if config.group_size != -1 else ""
    return Path(f"{name.lower()}-{config.bits}bit{group}{suffix}")


def check_flags(arguments: argparse.Namespace, quantizing: bool) -> None:
    """Raise UserError for flags that contradict each other, cannot work or would do nothing."""
    values = {_flag(name): value for name, value in vars(arguments).items()}
    given = {flag for flag, value in values.items() if value is not None and value is not False}
    if arguments.load is not None and arguments.wbits == 16:
        raise UserError("--wbits 16 is the full model; leave out --load, or --wbits")
    for flag in QUANTIZING_ONLY:
        if flag in given and not quantizing:
            raise UserError(
                f"{flag} is for quantizing: it needs --wbits 2, 3, 4 or 8 and no --load"
            )
    for flag, needed in NEEDS.items():
        if flag in given and not given.intersection(needed):
            raise UserError(f"{flag} needs {' or '.join(needed)}")
    for flag, ending in OPTIONAL_VALUES.items():
        if values[flag] and not values[flag].endswith(ending):
            raise UserError(f"{flag} {values[flag]}: give a name that ends in {ending}")
    for flag, without in (("--eval", not arguments.eval_data), ("--benchmark", True)):
        if flag in given and without and arguments.dataset is None:
            raise UserError(f"{flag} needs DATASET: c4, wikitext2, ptb or a text file")
    least = {**LEAST, "--benchmark": 2 if arguments.check else 1}
    for flag, lowest in least.items():
        if flag in given and values[flag] < lowest:
            raise UserError(f"{flag} {values[flag]} is not possible: give {lowest} or more")


def _flag(field: str) -> str:
    return "--" + (field if field == "save_safetensors" else field.replace("_", "-"))


def check_agreement(
    given: Mapping[str, object], settings: Mapping[str, object], path: Path
) -> None:
    """Raise UserError for a flag that a checkpoint contradicts; what it does not say is let be.

    given: as from `given_settings`; settings: in the words of quantize_config.json.
    """
    meta = settings.get("meta")
    own = meta if isinstance(meta, dict) else {}
    said: dict[str, object] = {
        "sym": settings.get("sym"),
        "static_groups": settings.get("static_groups"),
        "true_sequential": settings.get("true_sequential"),
        "percdamp": settings.get("damp_percent"),
        **own,
    }
    # Other tools only say whether columns were solved in act-order.
    orders = ("act",) if settings.get("desc_act") else ("gar", "natural")
    for field, value in given.items():
        if field == "order" and field not in said and "desc_act" in settings:
            agreed, answer = value in orders, f"desc_act {settings['desc_act']}"
        else:
            agreed, answer = said.get(field) in (None, value), f"{field} {said.get(field)}"
        if not agreed:
            raise UserError(
                f"{spelled(field, value)} disagrees with {path}, which says {answer}; leave it out"
            )


def spelled(field: str, value: object) -> str:
    """The flag that says a setting."""
    flag = {"method": "nearest", "group_size": "groupsize"}.get(field, field.replace("_", "-"))
    if field == "method" or value is True:
        return f"--{flag}"
    return f"--no-{flag}" if value is False else f"--{flag} {value}"
