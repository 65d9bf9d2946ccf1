"""Seeds, and the prompts that are made of them."""

import json
from collections import Counter

import pytest

from belle.generation.prompts import (
    KINDS,
    TASKS,
    answer_prompt,
    draw,
    instructions_prompt,
    tasks_prompt,
)
from belle.generation.replies import Refusal, read_tasks
from belle.generation.seeds import LANGUAGES, Seed, Task, built_in, digest, read_seeds
from belle.generation.similarity import Pool
from gptq.errors import UserError

LINE = {"instruction": "do", "instances": [{"input": "", "output": "done"}]}
MAKERS = {"tasks": tasks_prompt, "instructions": instructions_prompt}


def write(path, *lines):
    path.write_text("\n".join(it if isinstance(it, str) else json.dumps(it) for it in lines))
    return path


@pytest.mark.parametrize("language", LANGUAGES)
def test_built_in_seeds(language):
    """Four of each kind, all different, in BELLE's form, and such as a teacher's would be taken."""
    seeds = read_seeds(built_in(language))
    assert Counter(it.kind for it in seeds) == dict.fromkeys(KINDS, 4)
    compared = Pool([], 1).compare([it.instruction for it in seeds])
    assert max(it.highest for it in compared) < 0.5
    records = [json.loads(line) for line in built_in(language).read_text("utf-8").splitlines()]
    for record in records:
        fields = {"id", "name", "kind", "instruction", "instances", "is_classification"}
        assert record.keys() == fields
        assert record["is_classification"] == (record["kind"] == "classification")
    assert len({it["id"] for it in records}) == len({it["name"] for it in records}) == 48


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_examples_of_a_prompt_are_read_as_they_are(language):
    """The form that the teacher is shown is the form that is read."""
    seeds = read_seeds(built_in(language))
    text = tasks_prompt(seeds, language, seed=0, request=0).text
    _, _, examples = text.partition("###")
    *found, unfinished = read_tasks(examples, False, language)
    assert found == [it.instances[0] for it in seeds]
    assert isinstance(unfinished, Refusal)


def test_seeds_as_belle_has_them(tmp_path):
    instances = [{"input": "a", "output": "b"}, {"input": "", "output": "c"}]
    line = {"id": "seed_task_0", "name": "x", "instruction": " do\u2028it ", "instances": instances}
    path = write(tmp_path / "seeds.json", "", json.dumps(line, ensure_ascii=False), LINE)
    first, second = read_seeds(path)
    assert first == Seed("", (Task("do\u2028it", "a", "b"), Task("do\u2028it", "", "c")))
    assert second.instruction == "do"


@pytest.mark.parametrize(
    "line",
    [
        "not JSON",
        "[]",
        {"instances": LINE["instances"]},
        {**LINE, "instruction": " "},
        {**LINE, "instruction": 3},
        {**LINE, "instances": []},
        {**LINE, "instances": [{"input": ""}]},
        {**LINE, "instances": [{"input": "", "output": " "}]},
        {**LINE, "instances": [{"input": None, "output": "x"}]},
        {**LINE, "instances": ["x"]},
    ],
    ids=str,
)
def test_a_bad_seed_is_named_by_its_line(line, tmp_path):
    path = write(tmp_path / "seeds.json", LINE, line, LINE)
    with pytest.raises(UserError) as caught:
        read_seeds(path)
    assert str(caught.value).startswith(f"{path}:2: ")


def test_no_seeds(tmp_path):
    for path in (tmp_path / "none", write(tmp_path / "empty", ""), tmp_path):
        with pytest.raises(UserError, match=path.name):
            read_seeds(path)


def test_a_digest_tells_seeds_apart():
    seeds = read_seeds(built_in("zh"))
    assert digest(seeds) == digest(list(seeds))
    assert digest(seeds) != digest(seeds[::-1]) != digest(seeds[1:])


@pytest.mark.parametrize("count", [1, 3, 5])
def test_kinds_are_drawn_evenly(count):
    seeds = read_seeds(built_in("zh"))
    requests = 60
    drawn = [draw(seeds, count, 7, request) for request in range(requests)]
    assert all(len(set(examples)) == count for examples in drawn)
    kinds = Counter(it.kind for examples in drawn for it in examples)
    assert kinds == dict.fromkeys(KINDS, requests * count / 12)
    assert draw(seeds, count, 7, 59) == drawn[59]
    assert [draw(seeds, count, 8, request) for request in range(requests)] != drawn


def test_more_examples_than_kinds():
    seeds = read_seeds(built_in("en"))
    assert set(draw(seeds, 48, 0, 1)) == set(seeds)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("language", LANGUAGES)
def test_a_prompt_names_its_kinds_and_goes_on(make, language):
    seeds = read_seeds(built_in(language))
    examples = draw(seeds, 3, 0, 4)
    prompt = make(examples, language, 0, 4)
    assert prompt == make(examples, language, 0, 4)
    for example in examples:
        assert example.instruction in prompt.text
        assert KINDS[example.kind][language] in prompt.text
    assert prompt.text.splitlines()[-1].startswith("4.")
    assert "{" not in prompt.text.partition("###")[0].partition("\n1.")[0]
    without = make([Seed("", it.instances) for it in examples], language, 0, 4)
    assert not any(KINDS[it.kind][language] in without.text for it in examples)


def test_the_stop_is_the_task_after_those_asked_for():
    examples = read_seeds(built_in("zh"))[:3]
    assert tasks_prompt(examples, "zh", 0, 0).stop == f"###\n{3 + TASKS + 1}."


def test_an_instruction_with_braces():
    assert answer_prompt("explain {x} and {", "en").text.endswith("\n\nexplain {x} and {")
