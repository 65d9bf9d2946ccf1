"""Chat templates that never end, ask for all memory or make endless text: one line each."""

import json
import os

import pytest
from helpers.texts import byte_tokenizer

from gptq.data import bounded as bounded_module
from gptq.data.bounded import bounded
from gptq.data.chat import chat_prompt
from gptq.data.local_files import read_text
from gptq.errors import UserError

TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
HOSTILE = {
    "loops in loops": (LOOP, "runs for more than 0.5 seconds"),
    "a loop with output": (LOOP.replace("{% endfor", "{{ j }}{% endfor", 1), "more than"),
    "a power of a power": ("{{ 10 ** (10 ** 9) }}", "runs for more than 0.5 seconds"),
    "a huge text": ("{{ 'x' * 10 ** 12 }}", "MemoryError"),
    "a long text": ("{{ 'x' * 1500000 }}", "more than 1 MiB"),
    "a wide format": ("{{ '%0999999999999d' % 1 }}", "refuses"),
    "a long range": ("{% for i in range(10 ** 9) %}{% endfor %}", "too big"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "the system": ("{{ ''.__class__.__mro__ }}", "unsafe"),
    "an error": ("{{ raise_exception('first\\nsecond') }}", "first"),
}


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(bounded_module, "SECONDS", 0.5)


@pytest.mark.parametrize("case", HOSTILE)
def test_templates_that_do_harm(tmp_path, short, monkeypatch, case):
    template, reason = HOSTILE[case]
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    if "text" in case:
        monkeypatch.setattr(bounded_module, "SECONDS", 60)
        monkeypatch.setattr(bounded_module, "CHARACTERS", 1 << 20)
    path = tmp_path / "m.jsonl"
    path.write_text(json.dumps({"messages": TURNS}) + "\n")
    calls = (lambda: chat_prompt(tokenizer, TURNS), lambda: read_text(path, tokenizer, None))
    for call, words in zip(calls, ((), (path.name,)), strict=True):
        with pytest.raises(UserError) as caught:
            call()
        message = str(caught.value)
        assert "\n" not in message
        assert all(word in message for word in ("chat template", reason, *words)), message


def test_work_comes_back_and_nothing_else():
    seen = []
    mine = os.getpid()

    def work() -> list[str]:
        seen.append(1)
        return ["é\ud800\n", str(os.getpid())]

    text, process = bounded(work, "it")
    assert text == "é\ud800\n"
    assert int(process) != mine
    assert seen == []
    with pytest.raises(ChildProcessError):  # it is not left behind
        os.waitpid(int(process), os.WNOHANG)


def test_a_bug_is_no_mistake_of_a_user():
    def wrong() -> list[str]:
        return [1 // 0]

    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        bounded(wrong, "it")
    with pytest.raises(RuntimeError, match="has ended"):
        bounded(lambda: os._exit(1), "it")


def test_more_records_than_one_process_converts(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    path = tmp_path / "m.jsonl"
    turns = [[{"role": "user", "content": f"number {i}"}] for i in range(200)]
    path.write_text("\n".join(json.dumps({"messages": turn}) for turn in turns))
    text = read_text(path, tokenizer, None)
    end = tokenizer.eos_token or "\n\n"
    assert text.split(end) == [f"number {i}" for i in range(200)]
