"""Our own server as the endpoint. Run with `-m extras` where `.[serve]` is installed."""

import dataclasses
import signal
import socket
import threading

import pytest
from conftest import llama_config, make_model, make_tokenizer

import gptq
from belle.generation import run
from belle.generation.command import FUNCTION, JOURNAL, main
from gptq import QuantConfig

pytestmark = pytest.mark.extras

TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
TOKENS = 8192


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    from gptq.inference.answers import Served
    from gptq.serving.app import Server, make_app
    from gptq.serving.jobs import Limits

    where = tmp_path_factory.mktemp("serving")
    source = make_model(where / "full", llama_config(max_position_embeddings=TOKENS))
    tokenizer = make_tokenizer(source)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(source)
    config = QuantConfig(bits=4, group_size=32, method="rtn")
    gptq.quantize(source, None, config, save_dir=where / "packed")
    served = dataclasses.replace(Served.of(*gptq.load(where / "packed")), ends=[])
    running = Server(make_app(served, ["packed"], Limits(TOKENS, TOKENS, 8)))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        running.handle_exit(signal.SIGTERM, None)
        thread.join(30)


@pytest.mark.parametrize("flags", [["--api=chat"], ["--two_stage"], ["--seed=3"]], ids=str)
def test_our_server_answers(flags, url, tmp_path, capsys, monkeypatch):
    """A random model is of no use as a teacher, which is what the run then says."""
    monkeypatch.setattr(run, "MOST_FRUITLESS", 3)
    arguments = [f"--base_url={url}", f"--output_dir={tmp_path}", "--model_name=packed"]
    assert main([FUNCTION, *arguments, "--max_tokens=8", *flags]) == 2
    assert "packed: its last 3 replies had no task to accept" in capsys.readouterr().err
    assert len((tmp_path / JOURNAL).read_text(encoding="utf-8").splitlines()) >= 4


def test_a_model_that_our_server_does_not_know(url, tmp_path, capsys):
    arguments = [f"--base_url={url}", f"--output_dir={tmp_path}"]
    assert main([FUNCTION, *arguments]) == 2
    error = capsys.readouterr().err
    assert "text-davinci-003" in error
    assert error.count("\n") == 1
