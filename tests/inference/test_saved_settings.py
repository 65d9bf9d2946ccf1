"""A loaded model is saved in any way, and read again: the same weights."""

import copy
import json

import pytest
import torch
from conftest import llama_config, make_model
from transformers import AutoModelForCausalLM

import gptq
from gptq import QuantConfig, hf
from gptq.convert import convert

TOLERANCE = {"rtol": 1e-3, "atol": 1e-3}  # transformers' head is not multiplied in 16 bits
TOKENS = torch.tensor([[5, 80, 41, 200, 7]])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model, `full`, and it packed: `packed` and `packed.pt` with zero points as they are, `v1`
    with those less 1."""
    base = tmp_path_factory.mktemp("saved")
    make_model(base / "full", llama_config())
    config = QuantConfig(bits=4, group_size=32, method="rtn", sym=False)
    outputs = {"save_dir": base / "packed", "save": base / "packed.pt", "format": "gptq_v2"}
    gptq.quantize(base / "full", None, config, **outputs, device="cpu")
    convert(base / "packed", base / "v1", format="gptq")
    return base


def loaded(*paths):
    return gptq.load(*paths, device="cpu", dtype="float32")[0]


@torch.no_grad()
def logits(model):
    return model(TOKENS, use_cache=False).logits


@pytest.mark.parametrize("name", ["packed", "v1", "packed.pt"])
def test_save_pretrained(base, name, tmp_path):
    model = loaded(base / "full", base / name)
    model.save_pretrained(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    offset = model.model.layers[0].mlp.up_proj.zero_offset
    assert offset == {"packed": 0, "v1": 1}.get(name, offset)
    assert said["checkpoint_format"] == ("gptq" if offset else "gptq_v2")
    assert (said["bits"], said["group_size"]) == (4, 32)
    hf.register()
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32")
    torch.testing.assert_close(logits(again), logits(model), **TOLERANCE)
    for file in (base / "full").glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert torch.equal(logits(loaded(tmp_path)), logits(model))


@pytest.mark.parametrize("ours", [True, False])
def test_a_state_dict_of_the_other_format(base, ours, tmp_path):
    hf.register()
    models = {
        name: loaded(base / name)
        if ours
        else AutoModelForCausalLM.from_pretrained(base / name, dtype="float32")
        for name in ("packed", "v1")
    }
    expected = logits(models["packed"])
    torch.save(models["packed"].state_dict(), tmp_path / "state.pt")
    assert torch.equal(logits(loaded(base / "full", tmp_path / "state.pt")), expected)
    twin = copy.deepcopy(models["v1"])
    twin.load_state_dict(models["packed"].state_dict())
    assert torch.equal(logits(twin), expected)
    twin.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="float32")
    torch.testing.assert_close(logits(again), expected, **TOLERANCE)


def test_layers_of_two_formats_are_refused(base, tmp_path):
    v1, v2 = loaded(base / "v1"), loaded(base / "packed")
    state = v2.state_dict()
    for name in [name for name in state if "layers.0" in name]:
        del state[name]
    with pytest.raises(ValueError, match="of format 'gptq' and some of"):
        v1.load_state_dict(state, strict=False)
    torch.save(v1.state_dict(), tmp_path / "state.pt")
    with pytest.raises(gptq.errors.UserError, match="not all of one format"):
        loaded(base / "full", tmp_path / "state.pt")
