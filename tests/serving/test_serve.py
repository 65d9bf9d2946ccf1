"""`python -m gptq.serve`: its arguments, what it loads, and how it ends."""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request

import pytest
from conftest import PACKAGES, make_model, make_tokenizer
from transformers import OPTConfig

from gptq import serve
from gptq.errors import UserError


@pytest.fixture(scope="module")
def folder(llama_dir, tmp_path_factory):
    """A model that chats."""
    folder = shutil.copytree(llama_dir, tmp_path_factory.mktemp("served") / "model")
    (folder / "chat_template.jinja").write_text("{{ messages[-1].content }}")
    return folder


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "required: DIR; see python -m gptq.serve --help"),
        (["--nope", "DIR"], "unrecognized arguments: --nope; see python -m gptq.serve --help"),
        (["DIR", "more"], "unrecognized arguments: more"),
        (["DIR", "--port", "abc"], "--port: abc is no number from 0 to 65535"),
        (["DIR", "--port", "70000"], "--port: 70000 is no number"),
        (["DIR", "--port", "9" * 5000], "is no number"),
        (["DIR", "--max-tokens", "0"], "--max-tokens: 0 is no number from 1"),
        (["DIR", "--max-new-tokens", "-1"], "--max-new-tokens: "),
        (["DIR", "--max-requests", "²"], "--max-requests: ² is no number"),
        (["--device", "cpu", "/nowhere"], "/nowhere: is no model's folder"),
    ],
)
def test_a_wrong_command_line_is_one_line(argv, message, folder, capsys):
    argv = [str(folder) if word == "DIR" else word for word in argv]
    assert serve.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"error: [^\n]+\n", err)
    assert message in err


@pytest.mark.parametrize("flags", [[], ["--device", "cpu"]])
def test_a_folder_without_a_chat_template(flags, llama_dir, capsys):
    assert serve.main([*flags, str(llama_dir)]) == 2
    assert "has no chat template; write one to" in capsys.readouterr().err


@pytest.mark.parametrize("name", serve.EXTRA)
def test_a_missing_extra_is_named(name, folder, capsys, monkeypatch):
    for other in serve.EXTRA:
        monkeypatch.setitem(sys.modules, other, None if other == name else sys)
    assert serve.main([str(folder)]) == 2
    message = f"serving needs {name}, which is not here: pip install 'belle-gptq[serve]'"
    assert capsys.readouterr().err == f"error: {message}\n"


def test_other_architectures_are_loaded_by_transformers(tmp_path):
    sizes = {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    source = make_model(
        tmp_path / "opt", OPTConfig(vocab_size=320, word_embed_proj_dim=32, **sizes)
    )
    model, tokenizer = serve.load(source, "cpu", "bfloat16")
    assert type(model).__name__ == "OPTForCausalLM"
    assert str(model.dtype) == "torch.bfloat16"
    assert tokenizer.decode(tokenizer("the cat")["input_ids"]) == "the cat"
    assert not model.training


@pytest.mark.parametrize("config", ["{oops", "[]", "{}", '{"model_type": "no-such"}'])
def test_a_folder_that_cannot_be_loaded(config, tmp_path):
    (tmp_path / "config.json").write_text(config)
    make_tokenizer(tmp_path)
    with pytest.raises(UserError, match=re.escape(str(tmp_path))):
        serve.load(tmp_path, "cpu")


def test_weights_that_are_missing(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "opt"}))
    make_tokenizer(tmp_path)
    with pytest.raises(UserError, match="cannot be loaded"):
        serve.load(tmp_path, "cpu")


@pytest.mark.extras
def test_a_port_that_is_taken(folder, capsys, monkeypatch):
    """Found before the model is loaded."""
    monkeypatch.setattr(serve, "load", None)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert serve.main([str(folder), "--host", "127.0.0.1", "--port", str(port)]) == 2
    message = f"error: cannot listen at 127.0.0.1:{port} ("
    assert capsys.readouterr().err.startswith(message)


@pytest.mark.extras
def test_it_tells_how_to_ask_and_ends_on_ctrl_c(folder):
    """In the middle of an answer."""
    process = subprocess.Popen(
        [sys.executable, "-m", "gptq.serve", str(folder), "--port", "0", "--device", "cpu"],
        env={**os.environ, "PYTHONPATH": str(PACKAGES)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        first, second = process.stdout.readline(), process.stdout.readline()
        address = re.search(r"at (http://localhost:\d+)/v1, up to 128 tokens; Ctrl-C", first)[1]
        words = shlex.split(second.removeprefix("try it: "))
        assert words[:2] == ["curl", f"{address}/v1/chat/completions"]
        body = json.loads(words[words.index("-d") + 1])
        request = urllib.request.Request(words[1], json.dumps({**body, "stream": True}).encode())
        with urllib.request.urlopen(request, timeout=60) as response:
            assert response.readline().startswith(b"data: ")
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0
        assert process.stderr.read() == ""
    finally:
        process.kill()
        process.communicate()
