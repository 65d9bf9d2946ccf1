"""Scores by kind of task, held to straight computations and to answers known beforehand."""

import asyncio
import json
from pathlib import Path

import pytest
import torch
from helpers.scripted_endpoint import FAULTS, ScriptedEndpoint, prompt_of, reply
from transformers import AutoModelForCausalLM, AutoTokenizer

import gptq
from belle.compare import __main__ as command
from belle.compare import judge, measures, published
from belle.compare.answers import log_likelihood
from belle.compare.chart import draw
from belle.compare.questions import KINDS, Question, first_of_each, kind_of, read_questions
from belle.compare.results import OVERALL, Scored, markdown, means
from belle.endpoint import Endpoint, Unanswered
from gptq.config import QuantConfig
from gptq.errors import UserError

QUESTIONS = Path(__file__).parents[1] / "fixtures" / "tasks.jsonl"


# Questions --------------------------------------------------------------------------------------


def test_the_sample_has_every_kind():
    assert {question.kind for question in read_questions(QUESTIONS)} == set(KINDS)
    assert set(judge.CRITERIA) == set(KINDS)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("closed\xa0qa", "closed qa"),
        ("Closed_QA", "closed qa"),
        ("open-qa", "open qa"),
        ("ＭＡＴＨ ", "math"),
        ("Brainstorming", "brainstorming"),
        ("chain of thought", "cot"),
        ("poetry  of love", "poetry of love"),
        ("诗歌", "诗歌"),
    ],
)
def test_kinds_however_they_are_spelled(name, kind):
    assert kind_of(name) == kind


def test_belles_own_file_as_it_is(tmp_path):
    """Empty and missing answers, a no-break space, a byte order mark, a line separator in a text,
    an empty last line."""
    path = tmp_path / "eval_set.json"
    lines = [
        {"question": "写诗", "class": "generation", "std_answer": ""},
        {"question": "a\u2028b", "class": "closed\xa0qa"},
        {"question": "1+1", "class": "math", "std_answer": None},
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    path.write_text(text + "\n", encoding="utf-8-sig")
    assert read_questions(path) == [
        Question("写诗", "generation", ""),
        Question("a\u2028b", "closed qa", ""),
        Question("1+1", "math", ""),
    ]


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("[]", "holds no questions"),
        ("", "holds no questions"),
        ("[1]", "record 1: lacks"),
        ('{"question": "a", "class": "math", "std_answer": "b"}\n{"question": "a"}', ":2: lacks"),
        ('{"question": "a", "class": "math", "std_answer": 3}', ":1: std_answer is no text"),
        ('{"question": " ", "class": "math"}', ":1: lacks a question"),
        ("question", ":1: is no JSON"),
        ("[1", "is no JSON"),
    ],
)
def test_files_that_are_none(text, wrong, tmp_path):
    path = tmp_path / "q.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=wrong):
        read_questions(path)


def test_a_list_and_lines_are_the_same(tmp_path):
    records = [json.loads(line) for line in QUESTIONS.read_text(encoding="utf-8").splitlines()]
    path = tmp_path / "list.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    assert read_questions(path) == read_questions(QUESTIONS)


def test_the_first_of_each_kind():
    asked = [Question(str(number), "ab"[number % 2], "") for number in range(6)]
    assert [it.question for it in first_of_each(asked, 2)] == ["0", "1", "2", "3"]
    assert first_of_each(asked, None) == asked


# Measures ---------------------------------------------------------------------------------------


def test_log_likelihood_is_that_of_a_straight_loop(llama_dir):
    model = AutoModelForCausalLM.from_pretrained(llama_dir, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(llama_dir)
    asked = Question("the cat", "open qa", "sat on a mat")
    prompt = tokenizer("Human: the cat\n\nAssistant:")["input_ids"]
    whole = tokenizer("Human: the cat\n\nAssistant: sat on a mat")["input_ids"]
    assert whole[: len(prompt)] == prompt
    total = 0.0
    for position in range(len(prompt), len(whole)):
        with torch.no_grad():
            logits = model(torch.tensor([whole[:position]])).logits[0, -1]
        total += float(logits.log_softmax(-1)[whole[position]])
    expected = total / (len(whole) - len(prompt))
    assert log_likelihood(model, tokenizer, asked) == pytest.approx(expected, abs=1e-4)


def test_answers_known_beforehand():
    assert measures.compare("The  cat.", "the cat") == pytest.approx(
        {"exact match": 1, "ROUGE-L": 1, "chrF": 0.7}, abs=0.3
    )
    # The longest common subsequence of 4 and 5 characters is 4: precision 1, recall 0.8.
    assert measures.compare("今天很好", "今天真很好")["ROUGE-L"] == pytest.approx(2 * 0.8 / 1.8)
    assert set(measures.compare("dog", "今天").values()) == {0.0}


def test_means_by_hand():
    scored = [
        Scored("m", "math", "", {"chrF": 1.0}),
        Scored("m", "math", "", {"chrF": 0.5}),
        Scored("m", "code", "", {"chrF": 0.0}),
        Scored("m", "code", "", {}),
    ]
    by_kind = means(scored)["chrF"]["m"]
    assert {kind: (mean.value, mean.count) for kind, mean in by_kind.items()} == {
        "math": (0.75, 2),
        "code": (0.0, 1),
        # The mean over kinds, not over questions.
        OVERALL: (0.375, 3),
    }


def test_intervals_are_those_of_the_normal_approximation():
    values = torch.rand(150, generator=torch.Generator().manual_seed(0)).tolist()
    scored = [Scored("m", "math", "", {"judge": value}) for value in values]
    mean = means(scored)["judge"]["m"]["math"]
    spread = 1.96 * float(torch.tensor(values).std()) / 150**0.5
    assert mean.high - mean.value == pytest.approx(spread, rel=0.1)
    assert mean.value - mean.low == pytest.approx(spread, rel=0.1)


def test_a_model_that_lacks_a_kind_has_an_empty_cell():
    scored = [
        Scored("a", "math", "", {"judge": 0.5}),
        Scored("a", "code", "", {"judge": 1.0}),
        Scored("b", "code", "", {"judge": 0.0}),
    ]
    lines = markdown(means(scored)).splitlines()
    assert "| math | 1 | 0.500 (0.500 to 0.500) |  |" in lines
    assert lines[-1].startswith("| Overall | 2 | 0.750")


def test_the_published_overall_is_the_mean_over_kinds():
    for scores in published.scores().values():
        overall = sum(scores[kind] for kind in KINDS) / len(KINDS)
        assert overall == pytest.approx(scores[OVERALL], abs=0.002)


def test_the_picture(tmp_path):
    scored = [
        Scored(model, kind, "", {"judge": value, "log-likelihood": -value})
        for model, kind, value in (
            ("a", "math", 0.2),
            ("模型", "math", 0.4),
            ("模型", "诗歌", 0.1),
        )
    ]
    for beside in ({}, published.scores()):
        draw(means(scored), tmp_path / "out.png", beside)
        assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


# The judge --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "kind", "score"),
    [
        ('{"score": 0.75}', "rewrite", 0.75),
        ('Surely.\n```json\n{"score": 1}\n```', "rewrite", 1.0),
        ("Score: 0.5", "rewrite", 0.5),
        ("评分：0.25", "rewrite", 0.25),
        ('A "score": 0 is for nothing. {"score": 0.9}', "rewrite", 0.9),
        ('{"score": 0.75}', "math", 1.0),
        ('{"score": 0.4}', "code", 0.0),
        ('{"score": 1e-1}', "rewrite", 0.1),
        ("**Score:** 0.5.", "rewrite", 0.5),
        ("**评分**：.5", "rewrite", 0.5),
    ],
)
def test_scores_are_read(text, kind, score):
    assert judge.read_score(text, kind) == score


@pytest.mark.parametrize(
    "text",
    [
        *("", "good", '{"score": 7}', '{"score": -1}', '{"score": 1.2.3}', '{"score": 0.2.3}'),
        *("Score: 1/10", "Score: 1 %"),
    ],
)
def test_replies_without_a_score(text):
    with pytest.raises(Unanswered):
        judge.read_score(text, "rewrite")


def test_a_kind_that_has_no_prompt_of_its_own():
    text = judge.prompt(Question("q", "poetry", ""), "w")
    assert judge.OTHER in text
    assert "no reference" in text
    assert "one good answer" in judge.prompt(Question("q", "math", "2"), "w")
    assert len(set(judge.CRITERIA.values())) == len(KINDS) == 12


def judged(endpoint, answers, **options):
    """The votes on each answer, in order."""

    async def all_of_them():
        one = judge.Judge(Endpoint(endpoint.url, "some-model", retries=0), **options)
        asked = [(n, Question("why?", "closed qa", "because"), it) for n, it in enumerate(answers)]
        return dict([it async for it in one.scores(asked)])

    votes = asyncio.run(all_of_them())
    return [votes[number] for number in range(len(answers))]


def given_in_the_answer(request):
    """A judge that gives what is asked of it in the answer to grade."""
    text = prompt_of(request).split("Answer to grade:\n")[1].split("\n")[0]
    # Long enough for others to arrive meanwhile.
    return reply(f'Surely.\n{{"score": {text}}}', delay=0.05)


def test_three_votes_on_each_answer():
    with ScriptedEndpoint(given_in_the_answer) as endpoint:
        answers = [f"0.{number}" for number in range(1, 9)]
        votes = judged(endpoint, answers, concurrency=3)
        assert votes == [[float(answer)] * 3 for answer in answers]
        assert len(endpoint.requests) == 24
        assert 1 < endpoint.most_at_once <= 3
        request = endpoint.requests[0]
        assert request["model"] == "some-model"
        assert all(part in prompt_of(request) for part in ("why?", "because"))


@pytest.mark.parametrize("fault", [*FAULTS.values(), reply("good")], ids=[*FAULTS, "no score"])
def test_a_bad_reply_loses_nothing(fault):
    with ScriptedEndpoint([fault, reply('{"score": 0.5}')]) as endpoint:
        assert judged(endpoint, ["x"]) == [[0.5] * 3]


def test_a_judge_that_never_scores():
    with ScriptedEndpoint([reply("good")]) as endpoint:
        assert judged(endpoint, ["x", "y"], votes=2) == [[], []]
        assert len(endpoint.requests) == 2 * 2 * judge.ATTEMPTS


# The command ------------------------------------------------------------------------------------


@pytest.fixture
def words(llama_dir, tmp_path):
    """A command line that compares a model with its 8-bit file."""
    file = tmp_path / "m-8bit.pt"
    config = QuantConfig(bits=8, group_size=64, method="rtn", scale_search="minmax")
    gptq.quantize(llama_dir, None, config, save=file)
    out = ("--out", str(tmp_path / "out" / "c"))
    return [str(QUESTIONS), str(llama_dir), "--checkpoints", str(file), "--limit", "1", *out]


def test_likelihoods(words, tmp_path, capsys):
    assert command.main([*words, "--max-new-tokens", "0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "| log-likelihood | questions | Tiny-Llama | m-8bit.pt |" in lines
    numbers = json.loads((tmp_path / "out/c.json").read_text(encoding="utf-8"))
    by_model = numbers["log-likelihood"]
    assert set(by_model["Tiny-Llama"]) == {*KINDS, OVERALL}
    full, quantized = (by_model[name][OVERALL]["value"] for name in ("Tiny-Llama", "m-8bit.pt"))
    # 8 bits change likelihoods by little; other weights altogether would by much.
    assert full == pytest.approx(quantized, abs=0.02)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("c.jsonl", "c.json", "c.md", "c.png")
    }


def test_it_goes_on_where_it_was_stopped(words, tmp_path, capsys, monkeypatch):
    """Stopped after each of its lines, it ends with the same numbers and asks nothing twice."""
    words = [*words, "--max-new-tokens", "3", "--votes", "1", "--judge-model", "m", "--judge"]

    def score(request):
        return reply(f'"score": 0.{len(prompt_of(request)) % 10}')

    with ScriptedEndpoint(score) as endpoint:
        assert command.main([*words, endpoint.url]) == 0
        asked = len(endpoint.requests)
        # Two models that write the same are judged once.
        assert 12 <= asked <= 24
        whole = (tmp_path / "out/c.json").read_bytes()
        journal = tmp_path / "out/c.jsonl"
        lines = journal.read_bytes().splitlines(keepends=True)
        assert len(lines) == 1 + 24 + asked
        for kept in (1, 2, 13, 20, 26, len(lines) - 1):
            torn = lines[kept][:7] if kept < len(lines) - 1 else b""
            journal.write_bytes(b"".join(lines[:kept]) + torn)
            before = len(endpoint.requests)
            assert command.main([*words, endpoint.url]) == 0
            assert len(endpoint.requests) - before == asked - max(0, kept - 25)
            assert (tmp_path / "out/c.json").read_bytes() == whole
        monkeypatch.setattr(gptq, "load", None)
        assert command.main([*words, endpoint.url]) == 0
    capsys.readouterr()
    assert command.main([*words[:-3], "--max-new-tokens", "5"]) == 2
    assert "is of a run that differs in max_new_tokens" in capsys.readouterr().err


def test_answers_without_a_score_are_said(words, tmp_path, capsys):
    words = [*words, "--max-new-tokens", "2", "--judge-model", "m", "--judge"]
    with ScriptedEndpoint([reply("good")]) as endpoint:
        assert command.main([*words, endpoint.url]) == 0
    assert "24 answers have no score of the judge" in capsys.readouterr().out
    assert "judge" not in json.loads((tmp_path / "out/c.json").read_text())
    with ScriptedEndpoint([reply('{"score": 1}')]) as endpoint:
        assert command.main([*words, endpoint.url, "--published"]) == 0
    numbers = json.loads((tmp_path / "out/c.json").read_text())
    assert numbers["judge"]["Tiny-Llama"][OVERALL]["value"] == 1


def test_other_weights_of_the_same_name_answer_anew(llama_dir, tmp_path):
    """Of the same size, at the same place: nothing of the file before is told of this one."""
    file = tmp_path / "m.safetensors"
    config = QuantConfig(bits=8, group_size=64, method="rtn", scale_search="minmax")
    gptq.quantize(llama_dir, None, config, save_safetensors=file)
    words = [str(QUESTIONS), str(llama_dir), "--checkpoints", str(file), "--max-new-tokens", "0"]
    words += ["--limit", "1", "--out", str(tmp_path / "c")]

    def likelihoods() -> dict:
        assert command.main(words) == 0
        return json.loads((tmp_path / "c.json").read_text())["log-likelihood"]

    before = likelihoods()
    content = bytearray(file.read_bytes())
    start = len(content) // 2
    content[start : start + 1000] = bytes(it ^ 0x55 for it in content[start : start + 1000])
    file.write_bytes(content)
    after = likelihoods()
    assert after["Tiny-Llama"] == before["Tiny-Llama"]
    assert after["m.safetensors"] != before["m.safetensors"]


@pytest.mark.parametrize("ending", [".json", ".jsonl"])
def test_the_questions_are_never_overwritten(ending, llama_dir, tmp_path, capsys):
    file = tmp_path / f"eval{ending}"
    file.write_text('[{"question": "a", "class": "code", "std_answer": "b"}]')
    assert command.main([str(file), str(llama_dir), "--out", str(tmp_path / "eval")]) == 2
    assert "is read and would be replaced" in capsys.readouterr().err
    assert len(read_questions(file)) == 1
    assert list(tmp_path.iterdir()) == [file]


def test_nothing_to_compare_with(words, tmp_path, capsys):
    file = tmp_path / "open.json"
    file.write_text('[{"question": "a", "class": "code"}]')
    words = [str(file), *words[1:], "--max-new-tokens", "2"]
    assert command.main(words) == 2
    assert "has no std_answer to compare with" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with ScriptedEndpoint([reply("good")]) as endpoint:
        assert command.main([*words, "--judge", endpoint.url, "--judge-model", "m"]) == 2
    assert "the judge scored no answer" in capsys.readouterr().err
    with ScriptedEndpoint([reply('{"score": 1}')]) as endpoint:
        assert command.main([*words, "--judge", endpoint.url, "--judge-model", "m"]) == 0


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["--judge", "http://x"], "--judge and --judge-model go together"),
        (["--judge", "x", "--judge-model", "m"], "x: is no address of an endpoint"),
        (
            ["--judge", "http://x", "--judge-model", "m", "--max-new-tokens", "0"],
            "a judge needs answers",
        ),
        (["--votes", "0"], "--votes 0: give 1 or more"),
        (["--limit", "0"], "--limit 0: give 1 or more"),
        (["--names", "a,a"], "2 models are called a, a"),
        (["--names", "a"], "2 models are called a;"),
        (["--names", "a,b", "--out", "/proc/x"], "/proc/x"),
    ],
)
def test_mistakes_are_one_line(more, line, capsys):
    words = [str(QUESTIONS), "here/none", "--checkpoints", "none.pt", *more]
    assert command.main(words) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert line in err
    assert err.count("\n") == 1
