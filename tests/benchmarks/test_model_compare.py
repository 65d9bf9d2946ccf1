"""Scores by kind of task, held to straight computations and to answers known beforehand."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import gptq
from benchmarks import judge, model_compare, scores
from benchmarks.model_compare import Question, Scored, log_likelihood, means, read_questions
from gptq.config import QuantConfig
from gptq.errors import UserError

QUESTIONS = Path(__file__).parents[1] / "fixtures" / "tasks.jsonl"


def test_the_sample_has_every_class():
    questions = read_questions(QUESTIONS)
    assert {question.kind for question in questions} == set(judge.CRITERIA)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("[]", "holds no questions"),
        ("[1]", "record 1 lacks"),
        ('{"question": "a", "class": "math", "std_answer": "b"}\n{"question": "a"}', "record 2"),
        ('{"question": "a", "class": "math", "std_answer": 3}', "record 1"),
        ("question", "no JSON"),
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


def test_means_by_hand():
    one = Scored("m", "math", "", {"chrF": 1.0})
    two = Scored("m", "math", "", {"chrF": 0.5})
    three = Scored("m", "code", "", {"chrF": 0.0})
    assert means([one, two, three]) == {"chrF": {"m": {"math": 0.75, "all": 0.5, "code": 0.0}}}


def test_the_command(llama_dir, tmp_path, capsys):
    file = tmp_path / "m-8bit.pt"
    config = QuantConfig(bits=8, group_size=64, method="rtn", scale_search="minmax")
    gptq.quantize(llama_dir, None, config, save=file)
    words = [str(QUESTIONS), str(llama_dir), "--checkpoints", str(file)]
    assert model_compare.main([*words, "--max-new-tokens", "0", "--limit", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "| log-likelihood | Tiny-Llama | m-8bit.pt |" in lines
    rows = {line.split(" | ")[0].strip("| "): line for line in lines if line.startswith("| ")}
    assert set(judge.CRITERIA) | {"all"} < set(rows)
    full, quantized = (float(value) for value in rows["all"].strip("| ").split(" | ")[1:])
    # 8 bits change likelihoods by little; other weights altogether would by much.
    assert full == pytest.approx(quantized, abs=0.02)
    assert model_compare.main([*words, "--judge", "http://x"]) == 2
    assert "go together" in capsys.readouterr().err


@pytest.fixture
def endpoint():
    """A judge that gives what is asked of it in the answer to grade."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((self.path, body))
            given = body["messages"][0]["content"].split("Answer to grade:\n")[1].split("\n")[0]
            reply = {"choices": [{"message": {"content": f'Surely.\n{{"score": {given}}}'}}]}
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(reply).encode())

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", asked
    server.shutdown()


def test_a_judge(endpoint):
    url, asked = endpoint
    judged = judge.Judge(url, "some-model")
    assert judged.score("Closed_QA", "why?", "because", "0.75") == 0.75
    path, body = asked[0]
    assert path == "/v1/chat/completions"
    assert body["model"] == "some-model"
    said = body["messages"][0]["content"]
    assert all(part in said for part in ("why?", "because", judge.CRITERIA["closed qa"]))
    with pytest.raises(UserError, match="no score from 0 to 1"):
        judged.score("math", "1 + 1", "2", "7")
    with pytest.raises(UserError, match="did not answer"):
        judge.Judge("http://127.0.0.1:1/v1", "m").score("math", "a", "b", "c")


def test_a_kind_that_has_no_prompt_of_its_own():
    assert judge.OTHER in judge.prompt("poetry", "q", "r", "w")
    assert len(set(judge.CRITERIA.values())) == len(judge.CRITERIA) == 12


@pytest.mark.extras
def test_answers_known_beforehand():
    assert scores.compare("The  cat.", "the cat") == pytest.approx(
        {"exact match": 1, "ROUGE-L": 1, "chrF": 0.7}, abs=0.3
    )
    # The longest common subsequence of 4 and 5 characters is 4: precision 1, recall 0.8.
    assert scores.compare("今天很好", "今天真很好")["ROUGE-L"] == pytest.approx(2 * 0.8 / 1.8)
    nothing = scores.compare("dog", "今天")
    assert set(nothing.values()) == {0.0}


@pytest.mark.extras
def test_the_picture(tmp_path):
    scored = [
        Scored(model, kind, "", {"chrF": value, "log-likelihood": -value})
        for model, kind, value in (
            ("a", "math", 0.2),
            ("a", "code", 0.5),
            ("b", "math", 0.4),
            ("b", "code", 0.1),
        )
    ]
    model_compare.write(tmp_path / "out", scored, means(scored))
    assert (tmp_path / "out.png").stat().st_size > 5000
    assert len((tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()) == 4
    assert "| math | 0.200 | 0.400 |" in (tmp_path / "out.md").read_text(encoding="utf-8")
