"""Every command in docs/belle.md is one that its program takes."""

import re
import shlex
from argparse import Namespace

import pytest
from conftest import ROOT

from belle.compare import __main__ as compare
from belle.finetune import __main__ as finetune
from belle.generation import command as generation
from belle.release import __main__ as release
from benchmarks.miniature import __main__ as miniature
from gptq.cli import arguments
from gptq.models import SPECS

TEXT = (ROOT / "docs" / "belle.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```bash\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines()]
PARSERS = {
    "generate_instruction.py": generation.parser(),
    "belle.release": release.parser(),
    "belle.finetune": finetune.parser(),
    "belle.compare": compare.parser(),
    "benchmarks.miniature": miniature.parser(),
    "llama.py": arguments.parser(SPECS["llama"]),
}


def parsed(line: str) -> tuple[str, Namespace]:
    """The program of a command, and its arguments. Raises UserError for what it does not take."""
    words = shlex.split(line)
    if words[:2] == ["accelerate", "launch"]:
        assert words[2] == "--config_file"
        assert (ROOT / words[3]).is_file()
        words = ["python", *words[4:]]
    assert words[0] == "python", line
    program, *argv = words[2:] if words[1] == "-m" else words[1:]
    return program, PARSERS[program].parse_args(arguments.join_optional_values(argv))


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_is_valid(line):
    if line.startswith("make "):
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert re.search(rf"^{line.split()[1]}:", makefile, re.MULTILINE)
        return
    program, own = parsed(line)
    if program == "belle.finetune":
        finetune._job(own)
    elif program == "belle.compare":
        assert bool(own.judge) == bool(own.judge_model)
        compare.subjects(own)
    elif program == "llama.py":
        arguments.check_flags(own, own.wbits is not None)


def test_each_program_is_shown():
    shown = {parsed(line)[0] for line in COMMANDS if not line.startswith("make ")}
    assert shown == PARSERS.keys()


def test_the_recipes_are_those_that_there_are():
    for name in finetune.RECIPES:
        assert f"`{name}" in TEXT or f"`{name.removesuffix('-lora')}`" in TEXT


def test_no_command_is_outside_of_a_block():
    """Indented code is not tested."""
    assert not re.search(r"^ {4,}(python|accelerate|make|pip) ", TEXT, re.MULTILINE)
