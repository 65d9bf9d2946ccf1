"""`python -m gptq.serve DIR`: transformers' own OpenAI-compatible server on a quantized model.

Takes the options of `transformers serve`. `transformers chat` and OpenAI clients talk to it.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from gptq.checkpoints.writing import has_chat_template
from gptq.cli.command import report_error
from gptq.errors import UserError

NEEDED = "serving needs more packages: pip install 'belle-gptq[serve]'"


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until interrupted; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if argv and not argv[0].startswith("-"):
            check_folder(Path(argv[0]))
        _serve(argv)
    except (Exception, KeyboardInterrupt) as stop:
        return report_error(stop)
    return 0


def check_folder(folder: Path) -> None:
    """Raise UserError for a folder that could not answer a conversation."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: is no model's folder; give one that --save-dir wrote")
    if not has_chat_template(folder):
        raise UserError(
            f"{folder}: its tokenizer has no chat template; write one to "
            f"{folder / 'chat_template.jinja'}"
        )


def _serve(argv: list[str]) -> None:
    try:
        import typer
        from huggingface_hub.constants import HF_HUB_CACHE
        from transformers.cli.serve import Serve
        from transformers.utils.import_utils import is_serve_available
    except ImportError as error:
        raise UserError(NEEDED) from error
    if not is_serve_available():
        raise UserError(NEEDED)
    from gptq import hf

    hf.register()
    # Without this folder, the list of models that clients ask for is an error in transformers 5.17.
    Path(HF_HUB_CACHE).mkdir(parents=True, exist_ok=True)
    app = typer.Typer(add_completion=False)
    app.command(name="python -m gptq.serve")(Serve)
    app(argv, standalone_mode=False)


if __name__ == "__main__":
    sys.exit(main())
