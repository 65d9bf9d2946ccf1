"""What needs the optional packages: training adapters, lm-evaluation-harness.

Run with `-m extras` in an environment that has `.[train]` and lm_eval.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import PACKAGES, ROOT, llama_config, make_model, make_tokenizer
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
        env={**os.environ, "PYTHONPATH": str(PACKAGES)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    losses = [float(line.split()[-1]) for line in done.stdout.splitlines()]
    assert len(losses) == 30
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
