"""Questions to an endpoint that has every fault of a real one."""

import asyncio
import socket

import pytest
from helpers.scripted_endpoint import FAULTS, Answer, ScriptedEndpoint, error, reply

from belle.endpoint import OPENAI, Endpoint, Reply, Unanswered, connect
from gptq.errors import UserError

QUESTION = [{"role": "user", "content": "why?"}]


def ask(endpoint: Endpoint, **sampling) -> Reply:
    async def once() -> Reply:
        async with connect(endpoint) as connection:
            return await connection.ask(QUESTION, **sampling)

    return asyncio.run(once())


def ask_scripted(*answers: Answer, **options) -> tuple[Reply, ScriptedEndpoint]:
    with ScriptedEndpoint(answers) as scripted:
        return ask(Endpoint(scripted.url, "m", **options)), scripted


def test_chat():
    answer, scripted = ask_scripted(reply("because"))
    assert answer == Reply("because", "stop", 10)
    assert not answer.cut
    assert scripted.paths == ["/v1/chat/completions"]
    assert scripted.requests == [{"model": "m", "messages": QUESTION}]


def test_completion():
    answer, scripted = ask_scripted(reply("because", "length"), api="completion")
    assert answer.text == "because"
    assert answer.cut
    assert scripted.paths == ["/v1/completions"]
    assert scripted.requests == [{"model": "m", "prompt": "why?"}]


def test_sampling_is_sent_as_far_as_it_is_given():
    with ScriptedEndpoint([reply("because")]) as scripted:
        ask(Endpoint(scripted.url, "m"), temperature=0.5, seed=None, stop="###")
    assert scripted.requests[0].items() >= {"temperature": 0.5, "stop": "###"}.items()
    assert "seed" not in scripted.requests[0]


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_fault_that_may_pass_is_unanswered(fault):
    with pytest.raises(Unanswered) as caught:
        ask_scripted(fault, retries=0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["429", "500"])
def test_the_same_question_is_asked_again(name):
    answer, scripted = ask_scripted(FAULTS[name], FAULTS[name], reply("at last"), retries=2)
    assert answer.text == "at last"
    assert len(scripted.requests) == 3


@pytest.mark.parametrize("how", [{"delay": 1}, {"drip": 0.01}], ids=str)
def test_a_slow_answer_is_given_up(how):
    """One that drips has more than a hundred bytes, each in time."""
    with pytest.raises(Unanswered, match="timed out"):
        ask_scripted(reply("late", **how), time_limit=0.3, retries=0)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_what_will_not_pass_is_one_line_at_once(status):
    with ScriptedEndpoint([error(status, "no such thing")]) as scripted:
        with pytest.raises(UserError) as caught:
            ask(Endpoint(scripted.url, "m"))
        assert len(scripted.requests) == 1
    message = str(caught.value)
    assert message.startswith(f"{scripted.url}: ")
    assert "no such thing" in message
    assert "\n" not in message
    assert ("OPENAI_API_KEY" in message) == (status in (401, 403))


def test_a_filter_refuses_one_question():
    body = b'{"error": {"message": "filtered", "code": "content_filter"}}'
    with pytest.raises(Unanswered, match="filtered"):
        ask_scripted(Answer(body, 400))


@pytest.mark.parametrize(("variable", "sent"), [("sk-1", "Bearer sk-1"), ("", "Bearer none")])
def test_the_key_is_sent(variable, sent, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", variable)
    assert ask_scripted(reply("because"))[1].keys == [sent]


def test_openai_needs_a_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(UserError, match="set OPENAI_API_KEY"):
        ask(Endpoint(OPENAI, "m"))


def test_an_endpoint_that_is_not_there_is_one_line_at_once():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(UserError, match=f"127.0.0.1:{port}/v1: cannot be reached"):
        ask(Endpoint(f"http://127.0.0.1:{port}/v1", "m"))


@pytest.mark.parametrize(
    "fields",
    [
        {"base_url": "localhost:8000/v1"},
        {"base_url": "http://"},
        {"base_url": "http://[::1/v1"},
        {"base_url": "http://x:port/v1"},
        {"base_url": "http://x", "api": "chats"},
    ],
)
def test_an_endpoint_that_cannot_be_asked(fields):
    with pytest.raises(UserError):
        Endpoint(model="m", **fields)


def test_half_a_character_is_replaced():
    """JSON can hold one half of a surrogate pair, which no file can."""
    body = reply("broken").body.replace(b"broken", b"broken \\ud83d")
    assert ask_scripted(Answer(body))[0].text == "broken \ufffd"
