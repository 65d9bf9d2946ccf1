"""A release of 1,000 records with known faults, whole, and what a command line can get wrong."""

import json
from random import Random

import dill
import numpy as np
import pytest

from belle.records import FORMS, parse
from belle.release import pipeline
from belle.release.__main__ import main
from belle.release.blocks import Source
from belle.release.duplicates import grams, jaccard
from belle.release.filters import filters, normalized
from benchmarks.data_release import changed, texts

QUESTION = "请用一句话说明为什么天空在晴朗的白天看起来是蓝色的而在傍晚看起来是红色的"
FAULTS = {
    "schema": 30,
    "length": 20,
    "repetition": 30,
    "merged tasks": 40,
    "self-mention": 50,
    "unanswered": 60,
    "language": 35,
    "contamination": 25,
    "exact duplicates": 70,
    "near duplicates": 40,
}


def record(question, answer):
    return {"instruction": question, "input": "", "output": answer}


def halves(text):
    return record(text[: len(text) // 4], text[len(text) // 4 :])


def faulty_records(clean):
    """Faults by filter. clean: an iterator of records without any."""
    control = ["\x00", "\x1b", "\ud800", "\ufffd"]
    for i in range(30):
        good = next(clean)
        fault = [{"output": None}, {"output": " "}, {"output": control[i % 4] + good["output"]}]
        yield {**good, **fault[i % 3]}
    for field, value, count in (
        ("instruction", "？", 20),
        ("output", "谢谢大家。" * 60, 30),
        ("output", "好。\n2. 指令：写诗", 40),
        ("output", "作为一个人工智能语言模型，我没有看法。", 30),
        ("output", "As an AI language model, I have no opinion.", 20),
        ("output", "抱歉，我无法回答这个问题。", 40),
        ("output", "Please provide the text.", 20),
    ):
        for i in range(count):
            good = next(clean)
            yield {**good, field: value if field == "instruction" else f"{value}" + " " * (i % 3)}
    chinese = (it for it in clean if ord(it["instruction"][0]) >= 0x4E00)
    for _ in range(35):
        answer = "The answer is in a language that nobody has asked for."
        yield {**next(chinese), "output": answer}
    for _ in range(25):
        yield {**next(chinese), "instruction": f"你好，{QUESTION}？"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """1,000 records: FAULTS, 580 without a fault, and 20 that are far from near duplicates."""
    clean = (halves(text) for text, copied in texts(3000, seed=5) if copied is None)
    good = [next(clean) for _ in range(580)]
    faulty = list(faulty_records(clean))
    generator = np.random.default_rng(0)
    faulty += [{"input": it["instruction"], "target": it["output"] + "\n"} for it in good[:70]]
    for similarity, count in ((0.95, 40), (0.5, 20)):
        for _ in range(count):
            long = next(it for it in good[100:] if len(it["output"]) > 150)
            good.remove(long)
            copy = {**long, "output": changed(long["output"], similarity, generator)}
            faulty.append(copy)
            good.insert(0, long)
    records = [*good, *faulty]
    # A copy stays behind what it is a copy of.
    order = Random(0).sample(range(len(good)), len(good))
    records = [*(good[i] for i in order), *Random(1).sample(faulty, len(faulty))]
    assert len(records) == 1000
    folder = tmp_path_factory.mktemp("data")
    path, evaluation = folder / "data.jsonl", folder / "evaluation.json"
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    line = {"question": QUESTION, "class": "open qa", "std_answer": ""}
    evaluation.write_text(json.dumps(line), encoding="utf-8")
    return path, evaluation


def release(data, out, *options):
    path, evaluation = data
    return main([str(path), str(out), "--evaluation", str(evaluation), *options])


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def released(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("release") / "out"
    assert release(data, out, "--workers", "1", "--scales", "400,100") == 0
    return out


def test_every_fault_is_counted_by_its_filter(released):
    report = json.loads((released / "report.json").read_text(encoding="utf-8"))
    assert {name: it["removed"] for name, it in report["filters"].items()} == FAULTS
    assert (report["read"], report["kept"], report["scales"]) == (1000, 600, [100, 400])
    assert all(it["first"]["filter"] == name for name, it in report["filters"].items())
    assert report["filters"]["schema"]["reasons"] == {
        "control characters": 10,
        "has an empty answer": 10,
        **{reason: 10 for reason in report["filters"]["schema"]["reasons"] if "fields" in reason},
    }


def test_no_record_is_lost(data, released):
    given = data[0].read_text(encoding="utf-8").splitlines()
    removed = lines(released / "removed.jsonl")
    numbers = {int(entry["place"].rsplit(" ", 1)[1]) for entry in removed}
    assert len(numbers) == len(removed) == 400
    stayed = [parse(json.loads(line)) for i, line in enumerate(given, 1) if i not in numbers]
    kept = [parse(it) for it in lines(released / "all.jsonl")]
    assert sorted(map(str, kept)) == sorted(map(str, stayed))
    for entry in removed:
        original = json.loads(given[int(entry["place"].rsplit(" ", 1)[1]) - 1])
        if entry["filter"] == "schema":
            assert entry["record"] == original
        else:
            assert parse(entry["record"]) == parse(original)


def test_a_near_duplicate_names_what_it_is_similar_to(data, released):
    given = data[0].read_text(encoding="utf-8").splitlines()

    def text(place):
        conversation = parse(json.loads(given[int(place.rsplit(" ", 1)[1]) - 1]))
        return normalized("".join(turn["content"] for turn in conversation))

    near = [it for it in lines(released / "removed.jsonl") if it["filter"] == "near duplicates"]
    for entry in near:
        similarity = jaccard(text(entry["place"]), text(entry["to"]))
        assert entry["similarity"] == round(similarity, 3) >= 0.8


def test_a_subset_is_the_beginning_of_a_shuffled_whole(data, released):
    whole = (released / "all.jsonl").read_bytes().splitlines()
    for scale in (100, 400):
        assert (released / f"{scale}.jsonl").read_bytes().splitlines() == whole[:scale]
    given = data[0].read_text(encoding="utf-8").splitlines()
    places = {str(parse(json.loads(line))): i for i, line in enumerate(given[:550])}
    order = [places[it] for it in (str(parse(json.loads(line))) for line in whole) if it in places]
    middle = len(order) // 2
    # Of a shuffled order neither half has the earlier records.
    assert abs(np.mean(order[:middle]) - np.mean(order[middle:])) < 60


def test_several_processes_write_the_same(data, released, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "LEAST_RECORDS", 300)
    assert release(data, tmp_path / "out", "--workers", "2", "--scales", "100,400") == 0
    for name in ("all.jsonl", "100.jsonl", "400.jsonl", "removed.jsonl", "report.json"):
        assert (tmp_path / "out" / name).read_bytes() == (released / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("form", FORMS)
def test_several_files_and_forms_are_one_release(tmp_path, form):
    conversations = [parse(halves(text)) for text, copied in texts(30, seed=2) if copied is None]
    first, second, out = tmp_path / "a.json", tmp_path / "b.jsonl", tmp_path / "out"
    first.write_text(json.dumps([FORMS[form](it) for it in conversations[:7]]), encoding="utf-8")
    rest = [FORMS["messages"](it) for it in conversations[5:]]
    second.write_text("\n".join(map(json.dumps, rest)), encoding="utf-8")
    assert main([str(first), str(second), str(out), "--form", form, "--workers", "1"]) == 0
    kept = lines(out / "all.jsonl")
    assert {frozenset(it) for it in kept} == {frozenset(FORMS[form](conversations[0]))}
    assert sorted(map(str, map(parse, kept))) == sorted(map(str, conversations))
    places = [entry["place"] for entry in lines(out / "removed.jsonl")]
    assert places == [f"{second}, line 1", f"{second}, line 2"]


def test_a_task_that_nothing_is_left_of_shifts_no_other(tmp_path, monkeypatch):
    """Duplicates are told by task and number."""
    monkeypatch.setattr(pipeline, "task_count", lambda records, workers: 3)
    good = [halves(text) for text, copied in texts(60, seed=6) if copied is None][:20]
    generator = np.random.default_rng(0)
    near = [{**it, "output": changed(it["output"], 0.97, generator)} for it in good[:10]]
    path, out = tmp_path / "data.jsonl", tmp_path / "out"
    bad = [{"instruction": "x"}] * 20
    records = [*good, *bad, *near, *good[10:]]
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    assert main([str(path), str(out), "--workers", "1", "--without", "language"]) == 0
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    removed = {name: it["removed"] for name, it in report["filters"].items() if it["removed"]}
    assert removed == {"schema": 20, "exact duplicates": 10, "near duplicates": 10}
    kept = {str(parse(it)) for it in lines(out / "all.jsonl")}
    assert kept >= {str(parse(it)) for it in good[10:]}
    assert len(kept) == 20


def test_a_seed_is_another_order_of_the_same(tmp_path, capsys):
    path = tmp_path / "data.json"
    kept = [halves(text) for text, copied in texts(30, seed=2) if copied is None]
    path.write_text(json.dumps(kept), encoding="utf-8")
    for seed in "12":
        options = ["--workers", "1", "--seed", seed, "--without", "length,language"]
        assert main([str(path), str(tmp_path / seed), *options]) == 0
    first, second = (lines(tmp_path / seed / "all.jsonl") for seed in "12")
    assert first != second
    assert sorted(map(str, first)) == sorted(map(str, second))
    assert "language" not in capsys.readouterr().out


def test_similarity_is_that_of_sets_of_substrings():
    generator = np.random.default_rng(3)
    for text, _ in texts(20, seed=4):
        a = normalized(text)
        b = normalized(changed(text, 0.7, generator))
        first, second = ({it[i : i + 5] for i in range(len(it) - 4)} for it in (a, b))
        assert jaccard(a, b) == len(first & second) / len(first | second)
    assert jaccard("你好", "你好") == 1
    assert jaccard("你好", "您好") == 0
    assert len(grams("abcdefg")) == 3


# What can go wrong -----------------------------------------------------------------------------

GOOD = '{"instruction": "你叫什么", "output": "小明"}'


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (None, [], "data.json: cannot be read (No such file or directory)"),
        (GOOD + "\n{", [], "data.json, line 2: is not JSON"),
        (GOOD + "\n\xff", [], "data.json: is not UTF-8"),
        ("", [], "data.json: has no records"),
        ("[]", [], "data.json: has no records"),
        (GOOD, ["--scales", "2"], "--scales 2: the data has 1 records"),
        (GOOD, ["--scales", "1,x"], "--scales: x is no whole number"),
        (GOOD, ["--threshold", "2"], "--threshold: 2 is no number"),
        (GOOD, ["--without", "lenght"], "--without lenght: choose of length"),
        (GOOD, ["--evaluation", "none.json"], "none.json: cannot be read"),
        (GOOD, ["--executor", "slurm"], "--executor slurm: add --work"),
        (GOOD, ["--executor", "slurm", "--work", "w"], "--executor slurm: add --partition"),
        (GOOD, ["--executor", "ray", "--work", "w"], "--executor ray: there is no ray"),
        ('{"instruction": "x"}', [], "no record is left; removed.jsonl has the reasons"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, monkeypatch, capsys, text, options, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")
    path = tmp_path / "data.json"
    if text is not None:
        path.write_bytes(text.encode("latin-1" if "\xff" in text else "utf-8", "replace"))
    assert main([str(path), "out", "--workers", "1", *options]) == 2
    error = capsys.readouterr().err.splitlines()
    assert message in error[-1]
    assert error[-1].startswith("error: ")
    left = {"data.json", "out"} if "no record is left" in message else {"data.json"}
    assert {it.name for it in tmp_path.iterdir()} <= left


def test_a_folder_with_something_in_it_is_not_replaced(tmp_path, capsys):
    path, out = tmp_path / "data.json", tmp_path / "out"
    path.write_text(GOOD, encoding="utf-8")
    out.mkdir()
    assert main([str(path), str(out), "--workers", "1"]) == 0
    before = (out / "all.jsonl").read_bytes()
    assert main([str(path), str(out), "--workers", "1"]) == 2
    assert "out: has all.jsonl in it; give a new folder" in capsys.readouterr().err
    assert (out / "all.jsonl").read_bytes() == before


def test_a_scale_that_too_few_records_are_left_for_is_named(tmp_path, capsys):
    path, out = tmp_path / "data.json", tmp_path / "out"
    path.write_text("\n".join([GOOD, GOOD]), encoding="utf-8")
    assert main([str(path), str(out), "--workers", "1", "--scales", "1,2"]) == 2
    assert "has no 2.jsonl, because 1 records are left" in capsys.readouterr().err
    assert len(lines(out / "1.jsonl")) == len(lines(out / "all.jsonl")) == 1
    assert not (out / "2.jsonl").exists()


# On a cluster ----------------------------------------------------------------------------------


def test_slurm_gets_the_stages_in_their_order(tmp_path, monkeypatch, capsys):
    """A stand-in for sbatch notes what it is called with."""
    tools, work = tmp_path / "bin", tmp_path / "work"
    tools.mkdir()
    log = tmp_path / "log"
    sbatch = tools / "sbatch"
    sbatch.write_text(f'#!/bin/sh\necho "$@" >> {log}\necho Submitted batch job $(wc -l < {log})\n')
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    path = tmp_path / "data.json"
    path.write_text(GOOD, encoding="utf-8")
    options = ["--executor", "slurm", "--partition", "cpu", "--work", str(work), "--workers", "3"]
    assert main([str(path), str(tmp_path / "out"), *options]) == 0
    assert "submitted" in capsys.readouterr().out
    names = ["filters", "equal", "signatures", "buckets", "compare", "keep", "publish"]
    for name in names:
        script = (work / "logs" / name / "launch_script.slurm").read_text(encoding="utf-8")
        assert "#SBATCH --partition=cpu" in script
        assert f"#SBATCH --job-name=release-{name}" in script
        assert f"launch_pickled_pipeline {work}/logs/{name}/executor.pik" in script
    submitted = [line for line in log.read_text(encoding="utf-8").splitlines() if "export" in line]
    assert len(submitted) == len(names)
    assert all("--dependency=afterok:" in line for line in submitted[1:])
    plan = pipeline.Plan([Source.of(path)], tmp_path / "out", filters(), {"form": "x", "seed": 0})
    for stage in pipeline.stages(plan, work, 1):
        with (work / "logs" / stage.name / "executor.pik").open("rb") as file:
            pickled = dill.load(file)
        assert list(map(type, pickled.pipeline)) == list(map(type, stage.blocks))
        assert pickled.tasks == stage.tasks


def test_ray_gets_the_same_stages(tmp_path):
    plan = pipeline.Plan([], tmp_path / "out", filters(), {"form": "merged", "seed": 0})
    chain = pipeline.stages(plan, tmp_path, 5)
    made = pipeline.executors(chain, tmp_path, pipeline.Cluster("ray", workers=4))
    assert [type(it).__name__ for it in made] == ["RayPipelineExecutor"] * len(chain)
    assert [it.depends for it in made] == [None, *made[:-1]]
    assert [it.tasks for it in made] == [5, 1, 5, 10, 1, 5, 1]
    assert all(it.pipeline is stage.blocks for it, stage in zip(made, chain, strict=True))
