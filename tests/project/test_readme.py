"""Every command in the README is run, and every link leads somewhere."""

import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from helpers.scripted_endpoint import Answer, ScriptedEndpoint, prompt_of, reply

from belle.compare import __main__ as compare
from belle.finetune import __main__ as finetune
from belle.generation import command
from belle.release import __main__ as release
from gptq import convert
from gptq.cli.run import main
from gptq.models import SPECS

READMES = (ROOT / "README.md", ROOT / "README.zh.md")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
DEFAULT_NAME = "tiny-llama-4bit-128g.pt"
# What a flag makes a command print.
SHOWN = {
    "--save": "written",
    "--eval": "perplexity words.txt",
    "--text": "What is the weather like today?",
    "--benchmark": "tokens/s",
    "--check": "perplexity of these 32 tokens",
}


def blocks(path: Path) -> list[tuple[str, str]]:
    """(language, text) of each fenced block."""
    return BLOCK.findall(path.read_text(encoding="utf-8"))


def commands() -> list[str]:
    text = "".join(code for language, code in blocks(READMES[0]) if language == "bash")
    return [line for line in text.splitlines() if line.strip()]


def smaller(words: list[str]) -> list[str]:
    """Flags that keep a line short on the tiny models; a flag given later overrides an earlier."""
    calibration = ["--nsamples", "4", "--seqlen", "64"]
    flags = {"--wbits": calibration, "--size": calibration, "--eval": ["--seqlen", "64"]}
    if "--nearest" in words or "16" in words:
        flags["--wbits"] = []
    tokens = ["--max-new-tokens", "4"]
    # Tiny models that sample may end an answer before its first word.
    flags |= {"--text": tokens, "--chat": [*tokens, "--seed", "1"]}
    return [word for flag, added in flags.items() if flag in words for word in added]


@pytest.fixture
def stand_ins(request) -> dict[str, dict[str, str]]:
    """What MODEL and DATASET mean for each architecture."""
    dataset = str(request.getfixturevalue("text_file"))
    return {
        arch: {"MODEL": str(request.getfixturevalue(f"{arch}_dir")), "DATASET": dataset}
        for arch in ("llama", "bloom")
    }


def test_both_languages_have_the_same_code():
    english, chinese = map(blocks, READMES)
    assert english == chinese
    assert {language for language, _ in english} == {"bash", "python"}


def test_the_two_commands_come_first():
    assert [line for line in commands() if line.startswith("make")] == ["make demo", "make test"]
    first = next(i for i, line in enumerate(commands()) if line.startswith("python"))
    assert set(commands()[:first]) == {"pip install .", "make demo", "make test"}


def test_every_command_runs(tmp_path, stand_ins, monkeypatch, capsys):
    """In one folder, in their order: later ones load what earlier ones wrote."""
    monkeypatch.chdir(tmp_path)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for line in commands():
        program, *words = shlex.split(line)
        if line == "pip install ." or "gptq.serve" in words:
            continue  # Run by test_packaging.py and test_extras.py.
        if program == "torchrun":
            continue  # Run by test_distributed.py.
        if line.startswith(("python -m belle", "python generate")):
            continue  # Run below.
        if program == "make":
            assert re.search(rf"^{words[0]}:", makefile, re.MULTILINE), line
            continue
        if words[:2] == ["-m", "gptq.convert"]:
            arguments = [stand_ins["llama"].get(word, word) for word in words[2:]]
            assert convert.main(arguments) == 0, line
            assert "the same weights" in capsys.readouterr().out
            continue
        if program == "gptq":
            words.insert(0, "llama.py")
        arch, _, ending = words[0].partition(".")
        known = program in ("python", "gptq") and arch in SPECS and ending == "py"
        assert known, f"no test knows how to run: {line}"
        spec = SPECS[arch] if program == "python" else None
        arguments = [stand_ins[arch].get(word, word) for word in words[1:]]
        before = set(tmp_path.iterdir())
        monkeypatch.setattr("sys.stdin", io.StringIO("the cat\n"))
        assert main(spec, [*arguments, *smaller(words)]) == 0, line
        printed = capsys.readouterr().out
        written = {path.name for path in set(tmp_path.iterdir()) - before}
        assert len(written) == sum(word.startswith("--save") for word in words), line
        assert written - {DEFAULT_NAME} <= set(words), line
        assert printed.strip(), line
        for flag, shown in SHOWN.items():
            assert flag not in words or shown in printed, line


def taught(request) -> Answer:
    """A teacher, and a judge."""
    prompt = prompt_of(request)
    if "Answer to grade" in prompt:
        return reply('{"score": 0.5}')
    return reply(f"指令: 写出这些字：{prompt[-3:]}\n输入: 无\n输出: 好的，如下。")


def test_every_command_of_belle_runs(tmp_path, stand_ins, monkeypatch, capsys):
    """As the one above. What they write is the input of the next."""
    monkeypatch.chdir(tmp_path)
    tasks = str(ROOT / "tests" / "fixtures" / "tasks.jsonl")
    programs = {
        "generate_instruction.py": (command.main, []),
        "belle.release": (release.main, ["--workers", "1"]),
        "belle.finetune": (finetune.main, ["--batch", "1", "--epochs", "1", "--length", "64"]),
        "belle.compare": (compare.main, ["--limit", "1", "--max-new-tokens", "2"]),
    }
    lines = [it for it in commands() if it.startswith(("python -m belle", "python generate"))]
    assert len(lines) == len(programs)
    with ScriptedEndpoint(taught) as endpoint:
        means = {**stand_ins["llama"], "URL": endpoint.url, "TEST.json": tasks}
        for line in lines:
            _, *words = shlex.split(line.replace("=URL", f"={endpoint.url}"))
            words = words[1:] if words[0] == "-m" else words
            run, smaller_flags = programs[words[0]]
            arguments = [means.get(word, word) for word in words[1:]]
            assert run([*arguments, *smaller_flags]) == 0, (line, capsys.readouterr().err)
    written = {path.name for path in tmp_path.iterdir()}
    assert {"Belle.train.json", "released", "tuned", "comparison.md"} <= written
    assert "0.500" in (tmp_path / "comparison.md").read_text(encoding="utf-8")


def test_the_script_itself(tmp_path, stand_ins):
    """The first quantizing line as a user's shell runs it, from the checkout."""
    line = next(line for line in commands() if line.startswith("python llama.py"))
    words = [stand_ins["llama"].get(word, word) for word in shlex.split(line)]
    script = str(ROOT / words[1])
    done = subprocess.run(
        [sys.executable, script, *words[2:], *smaller(words)],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / DEFAULT_NAME).is_file()
    assert "mean loss" in done.stdout


def test_python_blocks(tmp_path, stand_ins, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for language, code in blocks(READMES[0]):
        if language == "python":
            for word, meaning in stand_ins["llama"].items():
                code = code.replace(f'"{word}"', repr(meaning))
            exec(code, names)
    assert "What is the weather like today?" not in capsys.readouterr().out
    layer, x, y = (names[name] for name in ("layer", "x", "y"))
    assert y.shape == (1, layer.out_features)
    assert (layer(x) - y).abs().max() == 0


@pytest.mark.parametrize(
    "path", sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]), ids=lambda path: path.name
)
def test_links_lead_somewhere(path):
    text = BLOCK.sub("", path.read_text(encoding="utf-8"))
    anchors = {
        re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-")
        for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    }
    for link in LINK.findall(text):
        if link.startswith("#"):
            assert link[1:] in anchors, f"{link}: no such heading"
        elif not link.startswith("https://"):
            assert (path.parent / link.partition("#")[0]).exists(), f"{link}: no such file"


@pytest.mark.parametrize("path", READMES, ids=lambda path: path.name)
def test_the_measured_table_has_its_place(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("<!-- demo table -->") == text.count("<!-- /demo table -->") == 1
