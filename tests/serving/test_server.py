"""The server, spoken to by clients over sockets of this machine.

Run with `-m extras` in an environment that has `.[serve]`, openai and httpx.
"""

import dataclasses
import gc
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
from conftest import ROOT, llama_config, make_model, make_tokenizer

import gptq
from gptq import QuantConfig

pytestmark = pytest.mark.extras

TEMPLATE = (
    "{% if messages[0]['content'] == 'fail' %}{{ raise_exception('no such turn') }}{% endif %}"
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
ASKED = [{"role": "user", "content": "the cat"}]
CHAT = "/v1/chat/completions"
GREEDY = {"max_tokens": 12, "temperature": 0}
TOKENS = 512  # of a prompt and its answer, at most
REQUESTS = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    where = tmp_path_factory.mktemp("serving")
    source = make_model(where / "full", llama_config(max_position_embeddings=TOKENS))
    tokenizer = make_tokenizer(source)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(source)
    config = QuantConfig(bits=4, group_size=32, method="rtn")
    gptq.quantize(source, None, config, save_dir=where / "packed")
    return where / "packed"


@pytest.fixture(scope="module")
def served(folder):
    """No token ends its answers: they are as long as they may be."""
    from gptq.inference.answers import Served

    return dataclasses.replace(Served.of(*gptq.load(folder)), ends=[])


@pytest.fixture(scope="module")
def server(served, folder):
    """The server's address."""
    from gptq.serving.app import Server, make_app
    from gptq.serving.jobs import Limits

    app = make_app(served, ["packed", str(folder)], Limits(TOKENS, 400, REQUESTS))
    running = Server(app)
    with socket.create_server(("127.0.0.1", 0), backlog=256) as listening:
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        running.handle_exit(signal.SIGTERM, None)
        thread.join(30)


@pytest.fixture(scope="module")
def openai_client(server):
    from openai import OpenAI

    with OpenAI(base_url=f"{server}/v1", api_key="none", timeout=120, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def http(server):
    import httpx

    with httpx.Client(base_url=server, timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def post(http):
    """Posts a body to a path below /v1; returns the status and the JSON of the response."""

    def call(path="chat/completions", /, **body):
        response = http.post(f"/v1/{path}", json=body)
        return response.status_code, response.json()

    return call


@pytest.fixture(scope="module")
def expected(folder):
    """The tokens of a greedy answer, by transformers alone."""
    model, tokenizer = gptq.load(folder)
    text = tokenizer.apply_chat_template(ASKED, tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
    options = {"do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    tokens = model.generate(**prompt, max_new_tokens=12, **options)
    return tokens[0, prompt["input_ids"].shape[1] :].tolist()


@pytest.fixture(scope="module")
def expected_text(served, expected):
    return served.tokenizer.decode(expected, skip_special_tokens=True)


def text_of(answer) -> str:
    return answer["choices"][0]["message"]["content"]


def events(text: str) -> list[dict]:
    """Of a stream, without the last one."""
    *lines, last = [line for line in text.split("\n") if line]
    assert last == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


# Answers -------------------------------------------------------------------------------------


def test_the_openai_client(openai_client, expected_text):
    create = openai_client.chat.completions.create
    answer = create(model="packed", messages=ASKED, **GREEDY)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", expected_text)
    assert (choice.finish_reason, answer.model) == ("length", "packed")
    assert answer.usage.completion_tokens == 12
    options = {"include_usage": True}
    parts = list(
        create(model="packed", messages=ASKED, **GREEDY, stream=True, stream_options=options)
    )
    assert "".join(p.choices[0].delta.content for p in parts if p.choices) == expected_text
    assert sum(bool(p.choices and p.choices[0].delta.content) for p in parts) > 1
    assert [p.choices[0].finish_reason for p in parts if p.choices][-1] == "length"
    assert [p.choices[0].delta.role for p in parts if p.choices][:2] == ["assistant", None]
    assert parts[-1].usage == answer.usage


def test_completions(openai_client, served):
    create = openai_client.completions.create
    prompt = "the cat sat"
    tokens = served.tokenizer(prompt)["input_ids"]
    by_text = create(model="packed", prompt=[prompt, "one dog"], **GREEDY)
    by_tokens = create(model="packed", prompt=tokens, **GREEDY)
    assert create(model="packed", prompt=[tokens], **GREEDY).choices == by_tokens.choices
    assert [choice.index for choice in by_text.choices] == [0, 1]
    assert by_text.choices[0].text == by_tokens.choices[0].text != by_text.choices[1].text
    assert by_tokens.usage.prompt_tokens == len(tokens)
    stream = create(model="packed", prompt=prompt, **GREEDY, stream=True)
    assert "".join(part.choices[0].text for part in stream) == by_tokens.choices[0].text
    default = create(model="packed", prompt=prompt)
    assert default.usage.completion_tokens == 16


def test_models_and_health(openai_client, http):
    assert [model.id for model in openai_client.models.list()] == ["packed"]
    assert openai_client.models.retrieve("packed").id == "packed"
    assert http.get("/v1/models/gpt-4o").status_code == 404
    assert http.get("/health").json() == {"status": "ok"}


def test_names_of_the_model(post, folder):
    for name in ("packed", str(folder), f"{folder}/"):
        assert post(model=name, messages=ASKED, max_tokens=1)[0] == 200
    status, answer = post(model="gpt-4o", messages=ASKED)
    assert (status, answer["error"]["code"]) == (404, "model_not_found")


def test_content_in_parts(post, expected_text):
    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "cat"}]
    assert (
        text_of(post(messages=[{"role": "user", "content": parts}], **GREEDY)[1]) == expected_text
    )


# Sampling ------------------------------------------------------------------------------------


def test_sampling_parameters_have_an_effect(post, expected_text):
    def text(**settings):
        return text_of(post(messages=ASKED, max_tokens=12, **settings)[1])

    hot = [text(temperature=1.9, seed=seed) for seed in (1, 2, 1)]
    assert hot[0] != hot[1]
    assert hot[0] == hot[2]
    # OpenAI's default is 1, and no seed is another one each time.
    assert text(seed=1) == text(seed=1, temperature=1, top_p=1)
    assert len({text(temperature=2) for _ in range(4)}) > 1
    assert text(temperature=1.9, seed=1, top_p=1e-6) == expected_text
    assert text(temperature=1e-30, seed=1) == expected_text


def test_several_answers_differ(post):
    _, answer = post(messages=ASKED, max_tokens=12, temperature=1.9, seed=1, n=3)
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert texts[0] == text_of(post(messages=ASKED, max_tokens=12, temperature=1.9, seed=1)[1])
    assert answer["usage"]["completion_tokens"] == 36


def test_tokens_have_their_probabilities(served, monkeypatch):
    """At a temperature, and of all tokens: transformers' own default is the likeliest 50."""
    from gptq.inference.answers import Job

    prompt, chosen, draws = [5, 17, 200, 33], [], 300
    generate = served.model.generate

    def keep_token(*arguments, **options):
        chosen.append(int(generate(*arguments, **options)[0, -1]))

    monkeypatch.setattr(served.model, "generate", keep_token)
    with torch.no_grad():
        logits = served.model(torch.tensor([prompt])).logits[0, -1].double()
    unlikely = set(logits.argsort(descending=True)[50:].tolist())
    share, other = (float((logits / t).softmax(-1)[list(unlikely)].sum()) for t in (0.5, 1))
    deviation = (share * (1 - share) / draws) ** 0.5
    assert min(share, other - share) > 8 * deviation
    for seed in range(draws):
        job = Job(prompt, 1, temperature=0.5, top_p=1.0, seed=seed, stop=())
        served.answer(job, lambda _: None, lambda: False)
    assert abs(sum(token in unlikely for token in chosen) / draws - share) < 4 * deviation


def test_defaults_of_generation_config(served):
    from transformers import GenerationConfig

    from gptq.serving.jobs import Limits, jobs
    from gptq.serving.requests import CompletionRequest, check

    def settings(given, **declared):
        model = dataclasses.replace(served, defaults=GenerationConfig(**declared))
        request = check(CompletionRequest, json.dumps({"prompt": "a", **given}).encode())
        (job,) = jobs(model, request, [[1]], Limits(100, 50, 1))
        return job.temperature, job.top_p

    assert settings({}) == (1, 1)
    assert settings({}, temperature=0.6, top_p=0.9) == (0.6, 0.9)
    assert settings({"temperature": 0.3, "top_p": 0.2}, temperature=0.6, top_p=0.9) == (0.3, 0.2)
    assert settings({}, do_sample=False) == (0, 1)
    assert settings({"temperature": 0.7}, do_sample=False) == (0.7, 1)


def test_nothing_else_of_generation_config_is_used(served, folder):
    """Beams would make one answer of several, at many times the cost."""
    from gptq.inference.answers import Served

    model, tokenizer = gptq.load(folder)
    model.generation_config.update(num_beams=4, max_length=7, eos_token_id=[1, 9])
    fresh = Served.of(model, tokenizer)
    assert set(fresh.ends) == {1, 9}
    assert model.generation_config.num_beams is None


def test_an_answer_ends_at_its_end_token(served, expected):
    from gptq.inference.answers import Job

    pieces = []
    ends = dataclasses.replace(served, ends=[expected[4]])
    prompt = served.tokenizer("user: the cat\nassistant:")["input_ids"]
    count = ends.answer(Job(prompt, 12, 0.0, 1.0, None, ()), pieces.append, lambda: False)
    first = expected.index(expected[4])
    assert (count, pieces[-1].finish) == (first + 1, "stop")
    text = "".join(piece.text for piece in pieces)
    assert text == served.tokenizer.decode(expected[:first])


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_are_cut(http, post, expected_text, stream):
    stop = expected_text[4:6]
    cut = expected_text[: expected_text.index(stop)]
    body = {"messages": ASKED, **GREEDY, "stop": ["never", stop], "stream": stream}
    response = http.post(CHAT, json=body)
    if stream:
        choices = [event["choices"][0] for event in events(response.text)]
        text = "".join(choice["delta"]["content"] for choice in choices)
    else:
        choices = response.json()["choices"]
        text = choices[0]["message"]["content"]
        assert response.json()["usage"]["completion_tokens"] < 12
    assert (text, choices[-1]["finish_reason"]) == (cut, "stop")


# Refusals ------------------------------------------------------------------------------------

LONG = "the cat " * TOKENS


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "messages: Field required"),
        ({"messages": []}, "messages: .* at least 1 item"),
        ({"messages": "hi"}, "messages: .* valid"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role: "),
        ({"messages": [{"role": "user"}]}, "messages.0.content: Field required"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages.0.content",
        ),
        ({"messages": [{"role": "user", "content": "fail"}]}, "no such turn"),
        ({"messages": [{"role": "user", "content": LONG}]}, "both together may be at most 512"),
        ({"max_tokens": 0}, "max_tokens: .* greater than or equal to 1"),
        ({"max_tokens": "5"}, "max_tokens: .* integer"),
        ({"max_tokens": 401}, "max_tokens 401: an answer has at most 400"),
        ({"max_completion_tokens": 401}, "an answer has at most 400"),
        ({"temperature": -0.1}, "temperature: "),
        ({"temperature": 2.1}, "temperature: "),
        ({"top_p": 0}, "top_p: "),
        ({"seed": 2**63}, "seed: "),
        ({"n": 17}, "n: .* less than or equal to 16"),
        ({"stop": [""]}, "stop.0: .* at least 1 character"),
        ({"stop": 5}, "stop: .* valid"),
        ({"logprobs": True}, "logprobs is not supported"),
        ({"frequency_penalty": -1.0}, "frequency_penalty is not supported"),
        ({"logit_bias": {"5": 1}}, "logit_bias is not supported"),
        ({"tools": [{"type": "function"}]}, "tools is not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format is not supported"),
        ({"chat_template": "x"}, "chat_template is not supported"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs is not supported"),
        ({"generation_config": "[1"}, "generation_config is no JSON object"),
        ({"generation_config": '{"num_beams": 4}'}, "num_beams is not supported"),
    ],
)
def test_a_clients_mistake_is_told(post, body, message):
    asked = {"messages": ASKED} if body and "messages" not in body else {}
    status, answer = post(**asked, **body)
    assert status == 400
    assert re.search(message, answer["error"]["message"])
    assert answer["error"]["type"] == "invalid_request_error"
    assert set(answer["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": []}, "the prompt is empty"),
        ({"prompt": [[]]}, "the prompt is empty"),
        ({"prompt": [1, 320]}, "token ids must be less than 320"),
        ({"prompt": [-1]}, "prompt.*: "),
        ({"prompt": ["a"] * 6, "n": 3}, "more than 16 answers"),
        ({"prompt": "a", "logprobs": 1}, "logprobs is not supported"),
        ({"prompt": "a", "logprobs": 0}, "logprobs is not supported"),
        ({"prompt": "a", "echo": True}, "echo is not supported"),
        ({"prompt": "a", "best_of": 2}, "best_of is not supported"),
    ],
)
def test_mistakes_in_completions(post, body, message):
    status, answer = post("completions", **body)
    assert status == 400
    assert re.search(message, answer["error"]["message"])


def test_what_asks_for_nothing_is_taken(post, expected_text):
    neutral = {
        "user": "me",
        "logprobs": False,
        "top_logprobs": 0,
        "frequency_penalty": 0.0,
        "tools": None,
        "logit_bias": {},
        "stop": [],
        "seed": None,
    }
    assert text_of(post(messages=ASKED, **GREEDY, **neutral)[1]) == expected_text


@pytest.mark.parametrize(
    "body", [b"", b"{oops", b"[" * 60000, b"[]", b"\xff", b'"\\ud800"', b"1" * 9999]
)
def test_bodies_that_are_no_request(http, body):
    response = http.post(CHAT, content=body)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_a_client_that_leaves_while_it_sends(server, http, caplog):
    """It is told, if it still listens, and the log has nothing of it."""
    address = urlsplit(server)
    with socket.create_connection((address.hostname, address.port)) as client:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\n"
        client.sendall(f'{head}{{"a'.encode())
        client.shutdown(socket.SHUT_WR)
        client.recv(1000)
    assert http.get("/health").json() == {"status": "ok"}
    assert not caplog.records


def test_other_paths_have_errors_of_the_same_shape(http):
    for method, path, status in (
        ("POST", "/reset", 404),
        ("GET", "/v1/chat/completions", 405),
        ("GET", "/docs", 404),
    ):
        response = http.request(method, path)
        assert response.status_code == status
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_no_other_model_is_loaded(http, folder):
    assert http.post("/load_model", json={"model": str(folder.parent / "full")}).status_code == 404
    assert '"ready"' in http.post("/load_model", json={"model": str(folder)}).text


def test_a_megabyte_is_refused_unread(http, served, monkeypatch):
    def never(*_arguments, **_options):
        raise AssertionError("it was tokenised")

    monkeypatch.setattr(type(served.tokenizer), "__call__", never)
    body = {"messages": [{"role": "user", "content": "a " * 500_000}]}
    response = http.post(CHAT, json=body)
    assert response.status_code == 413
    assert "more than 65536 bytes" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (RuntimeError("secret"), 500, "the server failed; its log says why"),
        (torch.OutOfMemoryError("2 GiB"), 503, "there is not enough memory"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_while_generating(http, served, monkeypatch, error, status, message, stream):
    """They are told, and the next request is answered."""

    def fail(*_arguments, **_options):
        raise error

    body = {"messages": ASKED, **GREEDY, "stream": stream}
    with monkeypatch.context() as patched:
        patched.setattr(served.model, "generate", fail)
        response = http.post(CHAT, json=body)
    found = events(response.text)[-1] if stream else response.json()
    assert response.status_code == (200 if stream else status)
    assert found["error"]["message"].startswith(message)
    assert found["error"]["type"] == "server_error"
    assert http.post(CHAT, json=body).status_code == 200


def test_logits_that_are_no_numbers(served, monkeypatch):
    from gptq.inference.answers import Job

    weight = served.model.get_output_embeddings().weight
    monkeypatch.setattr(weight, "data", torch.full_like(weight, torch.nan))
    with pytest.raises(FloatingPointError, match="not finite; try --dtype float32"):
        served.answer(Job([5], 2, 1.0, 1.0, None, ()), print, lambda: False)


# Many clients, and those that leave ----------------------------------------------------------


@pytest.fixture
def computed(served):
    """The number of forward passes, as a list of one entry for each."""
    passes = []
    handle = served.model.register_forward_hook(lambda *_: passes.append(1))
    yield passes
    handle.remove()


def leave_after(server, events: int, **body):
    """Reads so many events of a stream, or of a whole answer nothing, and goes."""
    import httpx

    body = {"messages": ASKED, "max_tokens": 400, "stream": events > 0, **body}
    timeout = httpx.Timeout(120, read=None if events else 0.2)
    with httpx.Client(timeout=timeout, verify=False) as client:  # Certificates take long to load.
        try:
            with client.stream("POST", f"{server}/v1/chat/completions", json=body) as response:
                lines = response.iter_lines()
                for _ in range(2 * events - 1):
                    next(lines)
        except httpx.ReadTimeout:
            assert not events


@pytest.mark.parametrize("events", [0, 3])
def test_what_nobody_waits_for_is_not_computed(server, post, computed, events):
    for _ in range(3):
        leave_after(server, events)
    assert post(messages=ASKED, max_tokens=2)[0] == 200
    assert len(computed) < 3 * 400


def test_fifty_clients(server, served, post, expected_text):
    """A third leaves; all others are answered, and nothing is left in memory."""

    def tensors():
        gc.collect()
        return sum(issubclass(type(it), torch.Tensor) for it in gc.get_objects())

    def visit(number):
        if number % 3 == 0:
            return leave_after(server, number % 2 * 2, temperature=1.5)
        return text_of(post(messages=ASKED, **GREEDY)[1])

    assert text_of(post(messages=ASKED, **GREEDY)[1]) == expected_text
    before = tensors()
    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(visit, range(50)))
    assert answers == [None if number % 3 == 0 else expected_text for number in range(50)]
    assert text_of(post(messages=ASKED, **GREEDY)[1]) == expected_text
    assert tensors() <= before


def test_too_many_requests_are_refused(served):
    import asyncio

    from gptq.inference.answers import Job
    from gptq.serving.queue import RequestQueue
    from gptq.serving.requests import Refusal

    started, go = threading.Event(), threading.Event()

    class Waiting:
        def answer(self, job, send, unwanted):
            started.set()
            assert go.wait(30)
            return 1

    async def visit():
        queue = RequestQueue(Waiting(), most=3)
        jobs = [Job([5], 1, 0.0, 1.0, None, ())]
        running, left, waiting = (queue.add(jobs) for _ in range(3))
        await asyncio.to_thread(started.wait, 30)
        with pytest.raises(Refusal, match="too many requests") as refused:
            queue.add(jobs)
        assert refused.value.status == 503
        # One that leaves before its turn makes room at once.
        left.leave()
        queue.add(jobs)
        go.set()
        assert [piece async for piece in waiting] == []
        assert (running.tokens, left.tokens, waiting.tokens) == (1, 0, 1)
        queue.close()

    asyncio.run(visit())


def test_a_server_that_stops_ends_its_answers(served):
    import asyncio

    from gptq.inference.answers import Job
    from gptq.serving.queue import RequestQueue
    from gptq.serving.requests import Refusal

    async def visit():
        queue = RequestQueue(served, most=9)
        jobs = [Job([5], 400, 0.0, 1.0, None, ())] * 9
        running, waiting = queue.add(jobs), queue.add(jobs)
        pieces = aiter(running)
        assert (await anext(pieces))[0] == 0
        queue.close()
        for answers in (pieces, waiting):
            with pytest.raises(Refusal, match="the server was stopped"):
                assert len([piece async for piece in answers]) < 400
        with pytest.raises(Refusal, match="the server was stopped"):
            queue.add(jobs)

    asyncio.run(visit())


# Other programs ------------------------------------------------------------------------------


def test_chat_in_a_terminal(server, folder, expected_text):
    """The documented command, spoken to through a pipe."""
    text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^ +(transformers chat .*)$", text, re.MULTILINE)
    words = line.replace("model-4bit", str(folder)).replace("http://localhost:8000", server)
    program = [sys.executable, "-c", "from transformers.cli.transformers import main; main()"]
    done = subprocess.run(
        [*program, *words.split()[1:], "max_new_tokens=12", "do_sample=false"],
        # Offline, it would not reach for an address on this machine either.
        env={**os.environ, "HF_HUB_OFFLINE": "0", "COLUMNS": "200"},
        input=f"{ASKED[0]['content']}\nn\n!exit\n",
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # Shown as Markdown, which folds spaces.
    assert "".join(expected_text.split()) in "".join(done.stdout.split())
