"""Training the scales of a quantized model: nothing else changes, and the file stays plain."""

import json
from pathlib import Path

import pytest
import torch
from helpers.answering import with_large_head
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import gptq
import gptq.hf
from belle import records
from belle.finetune.__main__ import main
from belle.finetune.encoding import collate, encode_all
from belle.finetune.scales import ScaleLinear
from gptq.checkpoints.reading import open_checkpoint
from gptq.convert import main as convert
from gptq.nn import QuantLinear
from quant_cuda.packing import unpack, unpack_zeros

RECORDS = [("Say cat", "the cat"), ("Say dog", "the dog run"), ("Who?", "one man")]
SETTINGS = ("--batch", "3", "--rate", "3e-3", "--epochs", "40", "--schedule", "constant")
PROBE = torch.arange(20, 60).reshape(1, -1)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "records.json"
    path.write_text(json.dumps([{"input": asked, "target": said} for asked, said in RECORDS]))
    return path


@pytest.fixture(scope="module", params=["llama", "bloom"])
def base(request, tmp_path_factory) -> Path:
    model = request.getfixturevalue(f"{request.param}_dir")
    return with_large_head(model, tmp_path_factory.mktemp("base") / request.param)


@pytest.fixture(scope="module")
def quantized(base, tmp_path_factory) -> Path:
    """A folder and, in it, a file of the same model."""
    folder = tmp_path_factory.mktemp("quantized")
    config = gptq.QuantConfig(bits=4, group_size=32, method="rtn")
    gptq.quantize(base, None, config, save=folder / "q.pt", save_dir=folder / "q")
    return folder


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(PROBE).logits


@pytest.fixture
def layer(quantized) -> QuantLinear:
    model, _ = gptq.load(quantized / "q")
    return next(module for module in model.modules() if isinstance(module, QuantLinear))


def test_a_layer_computes_as_before_and_has_the_gradient_of_its_formula(layer):
    """Against float64 autograd through scale * (q - zero), written out."""
    trained = ScaleLinear(layer)
    x = torch.randn(3, layer.in_features, requires_grad=True)
    weights = torch.randn(3, layer.out_features)
    assert torch.allclose(trained(x), layer(x), rtol=1e-4, atol=1e-4)
    (trained(x) * weights).sum().backward()
    q = unpack(layer.qweight, layer.bits, layer.in_features).double()
    zeros = unpack_zeros(layer.qzeros, layer.bits, layer.out_features, layer.zero_offset).double()
    scales = layer.scales.double().requires_grad_()
    inputs = x.detach().double().requires_grad_()
    total = torch.zeros(3, layer.out_features, dtype=torch.float64)
    for index in range(layer.in_features):
        row = scales[index // 32] * (q[index] - zeros[index // 32])
        total = total + inputs[:, index : index + 1] * row
    (total * weights.double()).sum().backward()
    assert torch.allclose(trained.scales.grad.double(), scales.grad, rtol=1e-4, atol=1e-4)
    assert torch.allclose(x.grad.double(), inputs.grad, rtol=1e-4, atol=1e-4)
    assert [name for name, _ in trained.named_parameters()] == ["scales"]
    assert list(trained.state_dict()) == ["scales"]


@pytest.mark.parametrize("kind", ["folder", ".pt"])
def test_only_scales_change_and_the_file_loads_everywhere(kind, base, quantized, data, tmp_path):
    if kind == "folder":
        before, out = quantized / "q", tmp_path / "out"
        command = [before, data, out]
    else:
        before, out = quantized / "q.pt", tmp_path / "out.pt"
        command = [base, data, out, "--load", before]
    assert main([*map(str, command), "--train", "scales", *SETTINGS]) == 0
    old, new = (open_checkpoint(path)[0] for path in (before, out))
    assert {name for name in new if name not in old} <= {"lm_head.g_idx"}
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    # A packed embedding is no layer that multiplies.
    assert changed == {n for n in old if n.endswith(".scales") and "embed" not in n}
    assert all(old.dtype(name) == new.dtype(name) for name in old)
    model, tokenizer = gptq.load(base, out)
    again = tmp_path / f"again{out.suffix}"
    assert convert([str(out), str(again), "--model", str(base)]) == 0
    assert torch.equal(logits(gptq.load(base, again)[0]), logits(model))
    if kind == "folder":
        gptq.hf.register()
        theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        assert torch.allclose(logits(theirs), logits(model), rtol=1e-5, atol=1e-5)
        losses = json.loads((out / "training.json").read_text())["losses"]
        assert losses[-1] < 0.7 * losses[0]
        assert loss_of(model, tokenizer, data) < 0.7 * losses[0]


def loss_of(model, tokenizer, data: Path) -> float:
    """Of the tokens of all answers."""
    batch = collate(encode_all(records.read(data), tokenizer, 64).examples)
    with torch.no_grad():
        return float(model(**batch).loss)


def test_an_adapter_on_a_quantized_model(quantized, data, tmp_path):
    """The integers stay; the adapter loads with gptq.hf."""
    out = tmp_path / "out"
    assert main([*map(str, (quantized / "q", data, out)), "--lora", *SETTINGS]) == 0
    assert any(
        bool(tensor.any()) for tensor in load_file(out / "adapter_model.safetensors").values()
    )
    losses = json.loads((out / "training.json").read_text())["losses"]
    assert losses[-1] < losses[0]
    gptq.hf.register()
    base = AutoModelForCausalLM.from_pretrained(quantized / "q", dtype=torch.float32)
    plain = logits(base)
    model = PeftModel.from_pretrained(
        base, out, config=gptq.hf.lora(LoraConfig.from_pretrained(out))
    )
    assert not torch.allclose(logits(model), plain)


def test_a_quantized_model_is_not_trained_whole(quantized, data, tmp_path, capsys):
    argv = [*map(str, (quantized / "q", data, tmp_path / "out"))]
    assert main(argv) == 2
    assert "is quantized; pass --lora or --train scales" in capsys.readouterr().err
    assert main([*argv, "--lora", "--merge"]) == 2
    assert "--merge: the model is quantized" in capsys.readouterr().err
