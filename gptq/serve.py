"""`python -m gptq.serve DIR`: an OpenAI-compatible server for the model in a folder."""

import argparse
import contextlib
import importlib
import json
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from gptq import api, hf
from gptq.blockwise.weight_files import read_json
from gptq.checkpoints.writing import has_chat_template
from gptq.cli.command import Parser, report_error
from gptq.cli.printing import prepare_streams, printable, without_surrogates
from gptq.device import pick_device, pick_dtype
from gptq.errors import UserError, first_line
from gptq.models import SPECS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EXTRA = ("pydantic", "starlette", "uvicorn")
# Of a prompt and its answer: the memory for their keys and values grows with them.
DEFAULT_TOKENS = 8192
DEFAULT_NEW_TOKENS = 2048
DEFAULT_REQUESTS = 64
MOST = 2**31 - 1
# Connections that the system keeps until they are taken.
BACKLOG = 1024


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until interrupted; returns the exit code."""
    prepare_streams()
    try:
        _serve(sys.argv[1:] if argv is None else argv)
    except (Exception, KeyboardInterrupt) as stop:
        return report_error(stop)
    return 0


def parser() -> argparse.ArgumentParser:
    command = Parser(
        prog="python -m gptq.serve",
        description="Serve a model to OpenAI clients.",
    )
    add = command.add_argument
    add("folder", metavar="DIR", type=Path, help="a model's folder, such as --save-dir wrote")
    add("--host", default="localhost", help="address to listen at (default: localhost)")
    add("--port", type=_number(0, 65535), default=8000, help="0: any (default: 8000)")
    add("--device", help="such as cuda:0 or cpu (default: a GPU if there is one)")
    add("--dtype", help="of activations: float32, float16 or bfloat16 (default: as for --load)")
    for flag, default, text in (
        ("--max-tokens", None, f"of prompt and answer (default: {DEFAULT_TOKENS}, or what fits)"),
        ("--max-new-tokens", DEFAULT_NEW_TOKENS, f"of an answer (default: {DEFAULT_NEW_TOKENS})"),
        ("--max-requests", DEFAULT_REQUESTS, f"at a time (default: {DEFAULT_REQUESTS})"),
    ):
        add(flag, type=_number(1, MOST), default=default, metavar="N", help=text)
    return command


def check_folder(folder: Path) -> None:
    """Raise UserError for a folder that could not answer a conversation."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: is no model's folder; give one that --save-dir wrote")
    if not has_chat_template(folder):
        raise UserError(
            f"{folder}: its tokenizer has no chat template; write one to "
            f"{folder / 'chat_template.jinja'}"
        )


def load(
    folder: Path, device: str | None = None, dtype: str | None = None
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """A model and its tokenizer: as `gptq.load`, and of other architectures as transformers does.

    Raises UserError for a folder that cannot be loaded.
    """
    if read_json(folder / "config.json").get("model_type") in SPECS:
        return api.load(folder, device=device, dtype=dtype)
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    where = pick_device(device)
    hf.register()
    try:
        kind = pick_dtype(dtype, where, AutoConfig.from_pretrained(folder).dtype)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=kind)
    except UserError:
        raise
    # What transformers raises for files that it cannot use.
    except (ImportError, KeyError, OSError, TypeError, ValueError) as error:
        raise UserError(f"{folder}: cannot be loaded ({first_line(error)})") from error
    return cast(Any, model).to(where).eval(), tokenizer


def _serve(argv: Sequence[str]) -> None:
    arguments = parser().parse_args(argv)
    folder = arguments.folder
    check_folder(folder)
    for name in EXTRA:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UserError(
                f"serving needs {name}, which is not here: pip install 'belle-gptq[serve]'"
            ) from error
    from gptq.inference.answers import Served
    from gptq.serving.app import Server, make_app
    from gptq.serving.jobs import Limits

    # Before the model is loaded, which may take minutes.
    with _listen(arguments.host, arguments.port) as listening:
        served = Served.of(*load(folder, arguments.device, arguments.dtype))
        most = min(arguments.max_tokens or DEFAULT_TOKENS, served.positions or MOST)
        limits = Limits(most, arguments.max_new_tokens, arguments.max_requests)
        # What clients may call it; the first is its name in responses.
        known = (folder.resolve().name, str(folder), str(folder.resolve()))
        names = [without_surrogates(name) for name in known]
        app = make_app(served, names, limits)
        host = arguments.host
        url = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
        print(printable(f"serving {folder} at {url}/v1, up to {most} tokens; Ctrl-C ends it"))
        print(f"try it: {_example(url)}")
        # uvicorn raises the signal again that ended it.
        with contextlib.suppress(KeyboardInterrupt):
            Server(app).run(sockets=[listening])


def _example(url: str) -> str:
    body = json.dumps({"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 50})
    return f"curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'"


def _listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections. Raises UserError if there can be none."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except (OSError, UnicodeError) as error:
        raise UserError(
            f"cannot listen at {host}:{port} ({first_line(error)}); give another --host or --port"
        ) from error


def _number(least: int, most: int) -> Callable[[str], int]:
    """A whole number as an argument."""

    def parse(text: str) -> int:
        # No more digits than int takes.
        number = int(text) if text.isascii() and text.isdecimal() and len(text) < 20 else -1
        if not least <= number <= most:
            raise argparse.ArgumentTypeError(f"{text} is no number from {least} to {most}")
        return number

    return parse


if __name__ == "__main__":
    sys.exit(main())
