"""A head that is tied, or only said to be, against transformers' own reading of the same folder."""

import json

import pytest
import torch
from conftest import bloom_config, llama_config, make_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import gptq
from gptq.api import open_weights, perplexity
from gptq.convert import convert
from gptq.errors import UserError

EMBEDDINGS = {
    "llama": "model.embed_tokens.weight",
    "bloom": "transformer.word_embeddings.weight",
}
TOKENS = torch.randint(2, 300, (2, 24), generator=torch.Generator().manual_seed(1))
QUICK = {"device": "cpu", "nsamples": 4, "seqlen": 32}


@pytest.fixture(params=["llama", "bloom"])
def kind(request):
    return request.param


@pytest.fixture(params=["own head", "equal head", "head alone", "head alone in bin"])
def folder(request, kind, tmp_path):
    config = llama_config if kind == "llama" else bloom_config
    folder = make_model(tmp_path / "model", config(tie_word_embeddings=True))
    file = folder / "model.safetensors"
    state = load_file(file)
    embedding = state[EMBEDDINGS[kind]]
    if request.param == "own head":
        state["lm_head.weight"] = torch.randn(embedding.shape).half()
    else:
        state["lm_head.weight"] = embedding.clone()
    if "alone" in request.param:
        del state[EMBEDDINGS[kind]]
    if "bin" in request.param:
        file.unlink()
        torch.save(state, folder / "pytorch_model.bin")
    else:
        save_file(state, file, metadata={"format": "pt"})
    return folder


@torch.no_grad()
def logits(model):
    return model(TOKENS, use_cache=False).logits


def hugging_face(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


def test_the_full_model_is_that_of_transformers(folder):
    whole = hugging_face(folder)
    model, _ = gptq.load(folder, device="cpu")
    torch.testing.assert_close(logits(model), logits(whole), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        losses = [whole(row[None], labels=row[None]).loss for row in TOKENS]
    found = perplexity(open_weights(folder, device="cpu"), TOKENS)
    assert found == pytest.approx(float(torch.stack(losses).mean().exp()), rel=1e-4)


@pytest.mark.parametrize("embedding_bits", [8, 16])
def test_a_quantized_model_is_close_to_it(folder, text_file, tmp_path, embedding_bits):
    config = gptq.QuantConfig(bits=8, group_size=32, embedding_bits=embedding_bits)
    outputs = {"save": tmp_path / "m.pt", "save_dir": tmp_path / "dir"}
    gptq.quantize(folder, text_file, config, **outputs, **QUICK)
    convert(tmp_path / "m.pt", tmp_path / "dense", model=folder, format="dense")
    expected = logits(hugging_face(folder))
    for model in (
        gptq.load(folder, tmp_path / "m.pt", device="cpu")[0],
        gptq.load(tmp_path / "dir", device="cpu")[0],
        gptq.load(tmp_path / "dense", device="cpu")[0],
        hugging_face(tmp_path / "dense"),
    ):
        assert relative(logits(model), expected) < 0.05


def refused(folder, changes, match):
    file = folder / "model.safetensors"
    state = load_file(file)
    changes(state)
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=match):
        gptq.load(folder, device="cpu")
    with pytest.raises(UserError, match=match):
        gptq.quantize(folder, None, gptq.QuantConfig(method="rtn"), save=folder / "m.pt")
    assert not (folder / "m.pt").exists()


@pytest.fixture
def llama(tmp_path):
    return make_model(tmp_path / "model", llama_config())


def test_tensors_without_a_place_are_refused(llama):
    """Biases in the file, attention_bias false in config.json."""

    def add(state):
        for name in ("q_proj", "k_proj"):
            state[f"model.layers.0.self_attn.{name}.bias"] = torch.ones(8)

    refused(llama, add, r"model.layers.0.self_attn.k_proj.bias and 1 more tensors have no place")


def test_a_block_too_many_is_refused(llama):
    def add(state):
        state["model.layers.2.input_layernorm.weight"] = torch.ones(64)

    refused(llama, add, r"model.layers.2.input_layernorm.weight has no place")


def test_biases_of_zeros_are_passed_over(llama):
    file = llama / "model.safetensors"
    expected = logits(gptq.load(llama, device="cpu")[0])
    state = load_file(file)
    state["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)
    save_file(state, file, metadata={"format": "pt"})
    assert torch.equal(logits(gptq.load(llama, device="cpu")[0]), expected)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_weights_that_are_no_plain_floats_are_refused(llama, dtype):
    def narrow(state):
        name = "model.layers.1.mlp.up_proj.weight"
        state[name] = state[name].to(dtype)

    refused(llama, narrow, r"model.layers.1.mlp.up_proj.weight is of type torch\.")


def test_a_scale_of_such_weights_is_refused(llama):
    def narrow(state):
        name = "model.layers.1.mlp.up_proj.weight"
        state[name] = state[name].to(torch.float8_e4m3fn)
        state[f"{name}_scale"] = torch.ones(1)

    refused(llama, narrow, r"model.layers.1.mlp.up_proj.weight_scale has no place")


def test_config_json_says_that_the_head_is_its_own(tmp_path, text_file):
    folder = make_model(tmp_path / "model", llama_config(tie_word_embeddings=True))
    file = folder / "model.safetensors"
    state = load_file(file)
    state["lm_head.weight"] = torch.randn(state[EMBEDDINGS["llama"]].shape).half()
    save_file(state, file, metadata={"format": "pt"})
    config = gptq.QuantConfig(bits=8, group_size=32)
    gptq.quantize(folder, text_file, config, save_dir=tmp_path / "dir", **QUICK)
    written = json.loads((tmp_path / "dir" / "config.json").read_text())
    assert written["tie_word_embeddings"] is False
