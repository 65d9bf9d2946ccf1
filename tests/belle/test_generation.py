"""Runs of generate_instruction.py against a scripted endpoint: stopped, killed, edited, resumed."""

import fcntl
import json
import os
import random
import signal
import subprocess
import sys
from itertools import accumulate
from pathlib import Path

import pytest
from conftest import ROOT
from helpers.forked import Child
from helpers.scripted_endpoint import (
    FAULTS,
    Answer,
    Request,
    ScriptedEndpoint,
    error,
    prompt_of,
    reply,
)

from belle.generation import run as run_module
from belle.generation.command import FUNCTION, JOURNAL, OUTPUT, REFUSED, main

HAN = "天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬藏闰余成岁律吕调阳云腾致雨露结为霜"
COUNT = 20


def teach(request: Request) -> Answer:
    """What a teacher answers is decided by the prompt; it arrives in any order."""
    prompt = prompt_of(request)
    chooser = random.Random(prompt)
    delay = chooser.random() / 200
    if "只写答案" in prompt:
        answers = (f"答：{prompt[-8:]}", "", "我是一个语言模型。")
        return reply(chooser.choices(answers, (8, 1, 1))[0], delay=delay)
    instructions = ["".join(chooser.choices(HAN, k=16)) for _ in range(5)]
    instructions[chooser.randrange(5)] = f"说出第{chooser.choice('一二三')}种常见的水果名称"
    if "只写指令" in prompt:
        return reply("\n".join(f"{i}. {text}" for i, text in enumerate(instructions)), delay=delay)
    outputs = chooser.choices(["好的。", "我是ChatGPT。", ""], (8, 1, 1), k=5)
    tasks = [
        f"指令: {text}\n输入: 无\n输出: {output}"
        for text, output in zip(instructions, outputs, strict=True)
    ]
    return reply("\n###\n".join(tasks), chooser.choice(["stop", "length"]), delay=delay)


def arguments(url: str, folder: Path, *flags: str) -> list[str]:
    return [
        *(FUNCTION, f"--base_url={url}", "--api", "chat", "--model_name=teacher"),
        *(f"--output_dir={folder}", f"--num_instructions_to_generate={COUNT}", *flags),
    ]


def generate(url: str, folder: Path, *flags: str) -> int:
    return main(arguments(url, folder, *flags))


def records(folder: Path) -> list[dict]:
    return json.loads((folder / OUTPUT).read_text(encoding="utf-8"))


def refused(folder: Path) -> list[dict]:
    lines = (folder / REFUSED).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def error_line(capsys) -> str:
    """The one line that a command ends with."""
    lines = capsys.readouterr().err.splitlines()
    found = [line for line in lines if line.startswith("error: ")]
    assert lines[-1:] == found, lines
    return found[0]


@pytest.fixture(scope="module")
def endpoint():
    with ScriptedEndpoint(teach) as scripted:
        yield scripted


@pytest.fixture(scope="module", params=["", "--two_stage"], ids=["one stage", "two stages"])
def whole(request, endpoint, tmp_path_factory):
    """The flags and the folder of a run that nothing stopped, one request at a time."""
    folder = tmp_path_factory.mktemp("whole")
    flags = tuple(filter(None, [request.param]))
    assert generate(endpoint.url, folder, "--concurrency=1", *flags) == 0
    return flags, folder


def test_records_are_as_belle_has_them(whole):
    found = records(whole[1])
    assert len(found) == COUNT
    seeds = {json.loads(line)["instruction"] for line in _seeds()}
    known = set(seeds)
    for record in found:
        fields = {"instruction", "input", "output"}
        scores = {"most_similar_instructions", "avg_similarity_score"}
        assert record.keys() == fields | scores
        assert record["instruction"]
        assert record["output"].startswith(("好的。", "答："))
        similar = record["most_similar_instructions"]
        assert len(similar) == 10
        assert max(similar.values()) <= 0.7
        assert 0 <= record["avg_similarity_score"] <= max(similar.values())
        known.add(record["instruction"])
    later = {text for it in found[COUNT // 2 :] for text in it["most_similar_instructions"]}
    assert later - seeds, "accepted tasks are compared with too"


def _seeds() -> list[str]:
    path = ROOT / "belle" / "generation" / "seeds_zh.jsonl"
    return path.read_text(encoding="utf-8").splitlines()


def test_every_refusal_has_its_reason(whole):
    flags, folder = whole
    reasons = {it["reason"] for it in refused(folder)}
    expected = {"too similar", "no output", "self-mention"}
    assert reasons >= (expected if flags else {*expected, "cut by length"})
    for it in refused(folder):
        if it["reason"] == "too similar":
            assert it["score"] > 0.7
            assert "水果" in it["to"]


@pytest.mark.parametrize("concurrency", [2, 4, 16])
def test_concurrency_changes_nothing(whole, concurrency, endpoint, tmp_path):
    flags, folder = whole
    assert generate(endpoint.url, tmp_path, f"--concurrency={concurrency}", *flags) == 0
    assert (tmp_path / OUTPUT).read_bytes() == (folder / OUTPUT).read_bytes()


def test_requests_are_in_flight_together_but_no_more_than_asked_for(tmp_path):
    def slow(request: Request) -> Answer:
        answer = teach(request)
        return Answer(answer.body, delay=0.05)

    with ScriptedEndpoint(slow) as scripted:
        assert generate(scripted.url, tmp_path, "--request_batch_size=3") == 0
        assert scripted.most_at_once == 3


@pytest.mark.parametrize("concurrency", [1, 4])
def test_a_run_cut_anywhere_goes_on_to_the_same_file(whole, concurrency, endpoint, tmp_path):
    flags, folder = whole
    lines = (folder / JOURNAL).read_bytes().splitlines(keepends=True)
    assert len(lines) > 5
    ends = [0, *accumulate(map(len, lines))]
    # At an end of a line, after its first byte, and before its last, in turn.
    cuts = [end + (0, 1, -1)[i % 3] for i, end in enumerate(ends)]
    for i, cut in enumerate([0, *cuts[1 : -1 : 4 if flags else 1], ends[-1]]):
        here = tmp_path / str(i)
        here.mkdir()
        (here / JOURNAL).write_bytes(b"".join(lines)[:cut])
        assert generate(endpoint.url, here, f"--concurrency={concurrency}", *flags) == 0
        assert (here / OUTPUT).read_bytes() == (folder / OUTPUT).read_bytes()
        if not flags:  # In two stages answers are refused in the order in which they come.
            assert (here / REFUSED).read_bytes() == (folder / REFUSED).read_bytes()


@pytest.mark.parametrize("concurrency", [1, 4])
def test_a_process_killed_at_any_write_loses_nothing(whole, concurrency, endpoint, tmp_path):
    """Before each fsync and each rename in turn; in two stages, at every fifth."""
    flags, folder = whole

    def killed_at(number: int, here: Path) -> int:
        left = [number]

        def dying(call):
            def instead(*given):
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*given)

            return instead

        os.fsync, os.replace = dying(os.fsync), dying(os.replace)
        return generate(endpoint.url, here, f"--concurrency={concurrency}", *flags)

    for number in range(1, 100, 5 if flags else 1):
        here = tmp_path / str(number)
        here.mkdir()
        child = Child(lambda number=number, here=here: killed_at(number, here), here / "log", {})
        code = child.wait()
        assert code in (0, -signal.SIGKILL), child.said
        assert generate(endpoint.url, here, *flags) == 0
        assert (here / OUTPUT).read_bytes() == (folder / OUTPUT).read_bytes()
        if code == 0:
            return
    pytest.fail("the process does not end")


def test_edits_stay_and_a_longer_run_appends(whole, endpoint, tmp_path):
    flags, folder = whole
    expected = records(folder)
    assert generate(endpoint.url, tmp_path, *flags, "--num_instructions_to_generate=8") == 0
    found = records(tmp_path)
    assert found == expected[:8]
    found[2]["output"] = "改好了"
    del found[7], found[4]
    (tmp_path / OUTPUT).write_text(json.dumps(found), encoding="utf-8-sig")
    assert generate(endpoint.url, tmp_path, *flags) == 0
    assert records(tmp_path) == [*found, *expected[8:]]
    assert generate(endpoint.url, tmp_path, *flags) == 0
    assert records(tmp_path) == [*found, *expected[8:]]


def test_a_finished_run_asks_nothing(whole, tmp_path):
    """Nor does it write the file, or need an endpoint; a file that was removed comes back."""
    flags, folder = whole
    for name in (JOURNAL, OUTPUT):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    os.utime(tmp_path / OUTPUT, ns=(1, 1))
    assert generate("http://127.0.0.1:9/v1", tmp_path, *flags) == 0
    assert (tmp_path / OUTPUT).stat().st_mtime_ns == 1
    (tmp_path / OUTPUT).unlink()
    assert generate("http://127.0.0.1:9/v1", tmp_path, *flags) == 0
    assert records(tmp_path) == records(folder)


@pytest.mark.parametrize(
    ("flag", "name"),
    [
        ("--model_name=other", "model_name"),
        ("--api=completion", "api"),
        ("--temperature=0.5", "temperature"),
        ("--seed=3", "seed"),
        ("--two_stage", "two_stage"),
        ("--language=en", "language, seed_tasks_path"),
        ("--num_prompt_instructions=4", "num_prompt_instructions"),
    ],
)
def test_a_journal_of_another_run_is_left_alone(flag, name, endpoint, tmp_path, capsys):
    assert generate(endpoint.url, tmp_path, "--num_instructions_to_generate=2") == 0
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    asked = len(endpoint.requests)
    capsys.readouterr()
    assert generate(endpoint.url, tmp_path, flag) == 2
    assert f"differs in {name};" in error_line(capsys)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert len(endpoint.requests) == asked


@pytest.mark.parametrize("content", ["[]", "{", '{"a": 1}', "\xff"])
def test_a_file_that_no_run_wrote_is_left_alone(content, endpoint, tmp_path, capsys):
    (tmp_path / OUTPUT).write_text(content, encoding="latin-1")
    assert generate(endpoint.url, tmp_path) == 2
    assert OUTPUT in error_line(capsys)
    assert (tmp_path / OUTPUT).read_text(encoding="latin-1") == content


@pytest.mark.parametrize("content", ["[{]", '{"a": 1}', "\xff", ""])
def test_an_edit_that_is_no_json_is_named(content, endpoint, tmp_path, capsys):
    few = "--num_instructions_to_generate=2"
    assert generate(endpoint.url, tmp_path, few) == 0
    good, asked = (tmp_path / OUTPUT).read_bytes(), len(endpoint.requests)
    (tmp_path / OUTPUT).write_text(content, encoding="latin-1")
    capsys.readouterr()
    assert generate(endpoint.url, tmp_path) == 2
    assert OUTPUT in error_line(capsys)
    assert (tmp_path / OUTPUT).read_text(encoding="latin-1") == content
    assert len(endpoint.requests) == asked
    (tmp_path / OUTPUT).write_bytes(good)
    assert generate(endpoint.url, tmp_path) == 0
    assert len(records(tmp_path)) == COUNT


def test_a_damaged_journal_is_named_by_its_line(endpoint, tmp_path, capsys):
    assert generate(endpoint.url, tmp_path) == 0
    lines = (tmp_path / JOURNAL).read_bytes().splitlines(keepends=True)
    lines[1] = lines[1][:20] + b"\n"
    (tmp_path / JOURNAL).write_bytes(b"".join(lines))
    capsys.readouterr()
    assert generate(endpoint.url, tmp_path) == 2
    assert f"{tmp_path / JOURNAL}:2: is damaged" in error_line(capsys)
    assert (tmp_path / JOURNAL).read_bytes() == b"".join(lines)


@pytest.mark.parametrize("content", ["a note without an end", '{"a": 1}', '{"a": 1}\n'])
def test_a_file_that_is_no_journal_is_left_alone(content, endpoint, tmp_path, capsys):
    (tmp_path / JOURNAL).write_text(content)
    assert generate(endpoint.url, tmp_path) == 2
    assert str(tmp_path / JOURNAL) in error_line(capsys)
    assert (tmp_path / JOURNAL).read_text() == content


def test_a_journal_whose_first_line_is_torn_begins_anew(endpoint, tmp_path):
    assert generate(endpoint.url, tmp_path) == 0
    good = (tmp_path / JOURNAL).read_bytes()
    (tmp_path / OUTPUT).unlink()
    (tmp_path / JOURNAL).write_bytes(good[: good.index(b"\n")])
    assert generate(endpoint.url, tmp_path) == 0
    assert (tmp_path / JOURNAL).read_bytes().startswith(good[: good.index(b"\n") + 1])


def test_a_second_run_does_not_disturb_the_first(endpoint, tmp_path, capsys):
    assert generate(endpoint.url, tmp_path, "--num_instructions_to_generate=2") == 0
    capsys.readouterr()
    with (tmp_path / JOURNAL).open("rb") as first:
        fcntl.flock(first, fcntl.LOCK_EX)
        assert generate(endpoint.url, tmp_path) == 2
    assert "another run" in error_line(capsys)


@pytest.mark.parametrize("two_stage", [False, True])
def test_faults_cost_their_request_alone(two_stage, tmp_path, monkeypatch):
    """Of all prompts 0.4 meet a fault each time; the rest decide the file."""
    monkeypatch.setattr(run_module, "MOST_UNANSWERED", 1000)
    faults = [it for name, it in FAULTS.items() if name not in ("429", "500", "a cut body")]

    def faulty(request: Request) -> Answer:
        chooser = random.Random(prompt_of(request) + "fault")
        return chooser.choice(faults) if chooser.random() < 0.4 else teach(request)

    found: list[bytes] = []
    for concurrency in (1, 4):
        folder = tmp_path / str(concurrency)
        flags = [f"--concurrency={concurrency}", *(["--two_stage"] if two_stage else [])]
        with ScriptedEndpoint(faulty) as endpoint:
            assert generate(endpoint.url, folder, *flags) == 0
        found.append((folder / OUTPUT).read_bytes())
        assert "no answer" in {it["reason"] for it in refused(folder)}
    assert found[0] == found[1]


@pytest.mark.parametrize("two_stage", [False, True])
def test_an_endpoint_that_goes_away_is_asked_again_by_the_next_run(
    two_stage, endpoint, tmp_path, capsys
):
    flags = ["--two_stage"] if two_stage else []
    assert generate(endpoint.url, tmp_path / "whole", *flags) == 0

    def failing(request: Request) -> Answer:
        return teach(request) if len(gone.requests) <= 4 else FAULTS["no choices"]

    capsys.readouterr()
    with ScriptedEndpoint(failing) as gone:
        assert generate(gone.url, tmp_path / "cut", "--concurrency=2", *flags) == 2
    line = error_line(capsys)
    assert f"{gone.url}: does not answer (an answer without choices)" in line
    assert b"no answer" not in (tmp_path / "cut" / JOURNAL).read_bytes()
    assert generate(endpoint.url, tmp_path / "cut", *flags) == 0
    assert records(tmp_path / "cut") == records(tmp_path / "whole")


@pytest.mark.parametrize(
    "fault", [FAULTS["HTML"], error(401), error(404)], ids=["HTML", "401", "404"]
)
def test_a_wrong_address_key_or_model_ends_at_once(fault, tmp_path, capsys):
    with ScriptedEndpoint([fault]) as scripted:
        assert generate(scripted.url, tmp_path, "--concurrency=2") == 2
        assert len(scripted.requests) <= run_module.MOST_UNANSWERED + 2
    assert scripted.url in error_line(capsys)
    assert not (tmp_path / OUTPUT).exists()
    assert len((tmp_path / JOURNAL).read_bytes().splitlines()) == 1


@pytest.mark.parametrize("flags", [[], ["--two_stage"]])
def test_a_teacher_of_no_use_ends_the_run(flags, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run_module, "MOST_FRUITLESS", 5)
    with ScriptedEndpoint([reply("sorry")]) as scripted:
        assert generate(scripted.url, tmp_path, "--concurrency=1", *flags) == 2
        assert len(scripted.requests) == 5
    assert "teacher: its last 5 replies had no task to accept" in error_line(capsys)


@pytest.mark.parametrize("flags", [[], ["--two_stage"]])
def test_a_teacher_that_repeats_its_examples_is_refused(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "MOST_FRUITLESS", 1)

    def parrot(request: Request) -> Answer:
        examples = prompt_of(request).partition("\n1." if flags else "\n###")[2]
        return reply(examples.partition("\n4.")[0])

    with ScriptedEndpoint(parrot) as scripted:
        assert generate(scripted.url, tmp_path, *flags) == 2
    assert {it["reason"] for it in refused(tmp_path)} == {"too similar"}


def test_ctrl_c_writes_what_there_is(endpoint, tmp_path):
    def stopping(request: Request) -> Answer:
        if len(slow.requests) == 4:
            child.kill(signal.SIGINT)
        return teach(request)

    with ScriptedEndpoint(stopping) as slow:
        flags = ("--concurrency=1", "--num_instructions_to_generate=1000")
        child = Child(lambda: generate(slow.url, tmp_path, *flags), tmp_path / "log", {})
        assert child.wait() == 130, child.said
    assert child.said.splitlines()[-1] == "interrupted: the same command goes on"
    before = records(tmp_path)
    assert 0 < len(before) < COUNT
    assert generate(endpoint.url, tmp_path) == 0
    assert records(tmp_path)[: len(before)] == before
    assert len(records(tmp_path)) == COUNT


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--api=chats"], "chats"),
        (["--base_url=localhost"], "localhost"),
        (["--language=fr"], "fr"),
        (["--num_instructions_to_generate=0"], "0 is no whole number from 1"),
        (["--num_instructions_to_generate", "x"], "x is no whole number"),
        (["--num_prompt_instructions=49"], "has 48 seeds"),
        (["--temperature=nan"], "nan is no number from 0 to 2"),
        (["--top_p=2"], "2 is no number from 0 to 1"),
        (["--two_stage=maybe"], "maybe is neither True nor False"),
        (["--seed_tasks_path=missing.json"], "missing.json"),
        (["--model"], "--model"),
        (["more"], "more"),
    ],
    ids=str,
)
def test_bad_arguments_are_one_line_before_any_request(flags, said, endpoint, tmp_path, capsys):
    asked = len(endpoint.requests)
    assert generate(endpoint.url, tmp_path, *flags) == 2
    assert said in error_line(capsys)
    assert len(endpoint.requests) == asked
    assert not list(tmp_path.iterdir())


def test_the_script_names_its_function():
    command = [sys.executable, "generate_instruction.py", "generate"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert FUNCTION in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_missing_package_is_one_line():
    code = "import runpy, sys; sys.modules['openai'] = None; "
    code += "runpy.run_path('generate_instruction.py', run_name='__main__')"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: needs openai: pip install 'belle-gptq[belle]'\n"
