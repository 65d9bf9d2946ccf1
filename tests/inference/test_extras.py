"""What needs the optional packages: serving, training adapters, lm-evaluation-harness.

Run with `-m extras` in an environment that has `.[serve,train]`, openai and lm_eval.
"""

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from conftest import ROOT, llama_config, make_model, make_tokenizer
from helpers.old_tools import PROBE

import gptq
from gptq import QuantConfig, QuantLinear, hf

pytestmark = pytest.mark.extras

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def folder(text_file, tmp_path_factory) -> Path:
    where = tmp_path_factory.mktemp("extras")
    source = make_model(where / "full", llama_config(max_position_embeddings=512))
    tokenizer = make_tokenizer(source)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(source)
    config = QuantConfig(bits=4, group_size=32)
    gptq.quantize(source, text_file, config, save_dir=where / "packed", nsamples=4, seqlen=32)
    return where / "packed"


# Serving -------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    port = free_port()
    words = [sys.executable, "-m", "gptq.serve", str(folder), "--host", "127.0.0.1"]
    process = subprocess.Popen(
        [*words, "--port", str(port), "--device", "cpu", "--dtype", "float32"],
        # Nothing was ever fetched from a hub: the place for it is not there.
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "HF_HOME": str(tmp_path_factory.mktemp("home") / "none"),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            if process.poll() is not None:
                pytest.fail(f"the server ended: {process.stdout.read()}")
            try:
                urllib.request.urlopen(f"{address}/health", timeout=1).read()
                break
            except OSError:
                time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture
def client(server):
    from openai import OpenAI

    return OpenAI(base_url=f"{server}/v1", api_key="none", timeout=120)


ASKED = [{"role": "user", "content": "the cat"}]
SETTINGS = {"max_tokens": 12, "temperature": 0.0, "seed": 0}


def expected_answer(folder: Path) -> str:
    model, tokenizer = gptq.load(folder)
    text = tokenizer.apply_chat_template(ASKED, tokenize=False, add_generation_prompt=True)
    tokens = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
    written = model.generate(**tokens, max_new_tokens=12, do_sample=False, pad_token_id=1)
    return tokenizer.decode(written[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True)


def test_the_openai_client(client, folder):
    answer = client.chat.completions.create(model=str(folder), messages=ASKED, **SETTINGS)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == expected_answer(folder)
    assert answer.usage.completion_tokens <= 12


def test_streaming(client, folder):
    stream = client.chat.completions.create(
        model=str(folder), messages=ASKED, stream=True, **SETTINGS
    )
    pieces = [piece.choices[0].delta.content or "" for piece in stream if piece.choices]
    assert len([piece for piece in pieces if piece]) > 1
    # An unfinished character at the end is not sent by every version of transformers.
    assert "".join(pieces).rstrip("\ufffd") == expected_answer(folder).rstrip("\ufffd")


def test_the_list_of_models(client):
    assert all(model.object == "model" for model in client.models.list())


def test_chat_in_a_terminal(server, folder):
    """The documented command, spoken to through a pipe."""
    text = (ROOT / "docs" / "integrations.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^ +(transformers chat .*)$", text, re.MULTILINE)
    words = line.replace("model-4bit", str(folder)).replace("http://localhost:8000", server)
    program = [sys.executable, "-c", "from transformers.cli.transformers import main; main()"]
    settings = ["max_new_tokens=12", "do_sample=false"]
    done = subprocess.run(
        [*program, *words.split()[1:], *settings],
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
    shown = "".join(done.stdout.split())
    assert "".join(expected_answer(folder).rstrip("\ufffd").split()) in shown


def test_a_folder_that_cannot_be_served(folder, tmp_path, capsys):
    from gptq import serve

    assert serve.main([str(tmp_path)]) == 2
    assert "is no model's folder" in capsys.readouterr().err


# Training ------------------------------------------------------------------------------------


def lora_config():
    from peft import LoraConfig

    return LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])


def test_lora_trains_saves_and_loads(folder, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    hf.register()
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    words = [module.qweight.clone() for module in base.modules() if isinstance(module, QuantLinear)]
    with torch.no_grad():
        before = base(PROBE).logits
    model = get_peft_model(base, hf.lora(lora_config()))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 3 * 2
    assert all("lora_" in name for name in trained)
    with torch.no_grad():
        assert torch.equal(model(PROBE).logits, before)  # B starts at zero.
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(input_ids=PROBE, labels=PROBE).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0]
    now = [module.qweight for module in base.modules() if isinstance(module, QuantLinear)]
    assert all(torch.equal(a, b) for a, b in zip(now, words, strict=True))
    model.save_pretrained(tmp_path)
    fresh = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    config = hf.lora(LoraConfig.from_pretrained(tmp_path))
    again = PeftModel.from_pretrained(fresh, tmp_path, config=config)
    with torch.no_grad():
        assert torch.equal(again(PROBE).logits, model.eval()(PROBE).logits)


def test_the_adapters_gradient(folder):
    """Against the same adapter on a dense model of the same weights."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    hf.register()
    grads = []
    for dense in (False, True):
        base = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
        model = get_peft_model(base.dequantize() if dense else base, hf.lora(lora_config()))
        generator = torch.Generator().manual_seed(3)
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                values = torch.randn(parameter.shape, generator=generator)
                parameter.data = 0.1 * values
        model(input_ids=PROBE, labels=PROBE).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert len(grads[0]) == 12
    for name, grad in grads[0].items():
        # An element near zero is a difference of large ones.
        atol = 1e-3 * float(grad.abs().max())
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-3, atol=atol)


# lm-evaluation-harness -----------------------------------------------------------------------

TASK = """task: local_words
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
"""


def test_lm_eval(folder, tmp_path):
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    questions = [
        {"question": f"the {a} sat on", "choices": [" a mat", " over hills"], "answer": i % 2}
        for i, a in enumerate(["cat", "dog", "rain", "night"])
    ]
    data = tmp_path / "words.jsonl"
    data.write_text("\n".join(map(json.dumps, questions)))
    (tmp_path / "words.yaml").write_text(TASK.format(data=data))

    model, tokenizer = gptq.load(folder)
    manager = TaskManager(include_path=str(tmp_path))
    results = lm_eval.simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer), tasks=["local_words"], task_manager=manager
    )
    right = 0
    for question in questions:
        scores = []
        for choice in question["choices"]:
            context = tokenizer(question["question"])["input_ids"]
            whole = tokenizer(question["question"] + choice)["input_ids"]
            with torch.no_grad():
                logits = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            rest = range(len(context), len(whole))
            scores.append(sum(float(logits[i - 1, whole[i]]) for i in rest))
        right += scores.index(max(scores)) == question["answer"]
    assert results["results"]["local_words"]["acc,none"] == right / len(questions)


# The documentation ---------------------------------------------------------------------------


def test_the_python_of_the_page_runs(folder, tmp_path, monkeypatch):
    """In one go, so that each part goes on from those before."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model-4bit").symlink_to(folder)
    text = (ROOT / "docs" / "integrations.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 4
    names: dict[str, object] = {}
    exec("\n".join(blocks), names)
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    assert type(names["evaluated"]).__name__ == "HFLM"


def test_the_lora_example(folder, tmp_path):
    """Both of BELLE's record shapes; the loss falls."""
    shapes = [
        {"instruction": "the cat", "input": "", "output": "sat on a mat"},
        {"input": "one dog", "target": "run over hills"},
    ]
    records = tmp_path / "records.jsonl"
    records.write_text("\n".join(map(json.dumps, shapes)))
    script = str(ROOT / "examples" / "lora.py")
    done = subprocess.run(
        [sys.executable, script, str(folder), str(records), str(tmp_path / "adapter")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    losses = [float(line.split()[-1]) for line in done.stdout.splitlines()]
    assert len(losses) == 30
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
