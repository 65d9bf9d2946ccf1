"""Random models of real shapes."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import shapes
from gptq.errors import UserError


def test_shapes_have_as_many_weights_as_the_papers_say():
    counts = {
        "llama-7b": 6.738e9,
        "llama-13b": 13.016e9,
        "bloom-560m": 559.2e6,
        "bloom-7b1": 7.069e9,
    }
    for name, expected in counts.items():
        tensors = shapes._random(shapes.SHAPES[name]())
        count = sum(tensors.nbytes(name) for name in tensors) / 2
        assert count == pytest.approx(expected, rel=1e-3), name


@pytest.mark.parametrize("kind", ["llama-tiny", "bloom-tiny"])
def test_written_models_load_in_transformers(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(shapes, "SHARD_BYTES", 50_000)
    folder = shapes.write_model(tmp_path / "three", kind, blocks=3)
    assert len(list(folder.glob("*.safetensors"))) > 1
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    assert model.dtype == torch.float16
    assert model.config.num_hidden_layers == 3
    fewer = AutoModelForCausalLM.from_pretrained(shapes.write_model(tmp_path / "two", kind, 2))
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in fewer.state_dict().items())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("今天 the cat")["input_ids"]) == "今天 the cat"


def test_what_cannot_be_written_is_one_line(tmp_path):
    with pytest.raises(UserError, match="no shape is called x: use one of llama-7b"):
        shapes.write_model(tmp_path / "m", "x")
    with pytest.raises(UserError, match="exists; give a new folder"):
        shapes.write_model(tmp_path, "llama-tiny")
