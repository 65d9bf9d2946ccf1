"""Methods of transformers on models whose embedding, head and layers are packed."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import llama_config, make_model
from transformers import AutoModelForCausalLM

import gptq
from gptq import QuantConfig, hf

TOKENS = torch.tensor([[5, 80, 41, 200, 7]])


@pytest.fixture(scope="module", params=[True, False])
def base(request, tmp_path_factory):
    """A model, whose head is tied or is not; a folder and a file made from it."""
    base = tmp_path_factory.mktemp("overrides")
    make_model(base / "full", llama_config(tie_word_embeddings=request.param))
    outputs = {"save_dir": base / "packed", "save": base / "packed.pt"}
    config = QuantConfig(bits=4, group_size=32, method="rtn")
    gptq.quantize(base / "full", None, config, **outputs, device="cpu")
    return base


def loaded(base, kind):
    if kind == "transformers":
        hf.register()
        return AutoModelForCausalLM.from_pretrained(base / "packed", dtype="float32")
    path = base / ("packed" if kind == "folder" else "packed.pt")
    return gptq.load(base / "full", path, device="cpu", dtype="float32")[0]


@torch.no_grad()
def logits(model):
    return model(TOKENS, use_cache=False).logits


@pytest.mark.parametrize("kind", ["transformers", "folder", "file"])
@pytest.mark.parametrize("copied", [False, True])
def test_embeddings_are_resized(base, kind, copied):
    model = loaded(base, kind)
    before = logits(model)
    model = pickle.loads(pickle.dumps(copy.deepcopy(model))) if copied else model
    assert model.resize_token_embeddings() is model.get_input_embeddings()
    model.resize_token_embeddings(328)
    after = logits(model)
    assert after.shape == (1, 5, 328)
    torch.testing.assert_close(after[..., :320], before, rtol=1e-3, atol=1e-3)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert (head.weight is embedding.weight) == model.config.tie_word_embeddings


@pytest.mark.parametrize("kind", ["transformers", "folder", "file"])
@pytest.mark.parametrize("copied", [False, True])
def test_weights_are_tied_again(base, kind, copied):
    """As lm-eval and accelerate do with a model that they are given."""
    model = loaded(base, kind)
    model = pickle.loads(pickle.dumps(copy.deepcopy(model))) if copied else model
    before = logits(model)
    model.tie_weights()
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("kind", ["transformers", "folder", "file"])
def test_the_memory_of_prepared_weights_is_counted(base, kind):
    model = loaded(base, kind)
    logits(model)
    prepared = model.get_memory_footprint()
    for layer in model.modules():
        if hasattr(layer, "packed"):
            assert layer.qweight is not None  # which undoes the preparation
    assert model.get_memory_footprint() == pytest.approx(prepared, rel=0.1)


def test_loading_in_threads_leaves_the_default_dtype(base):
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda _: loaded(base, "folder") and None, range(12)))
        assert torch.get_default_dtype() == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
