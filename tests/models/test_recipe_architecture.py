"""The recipe of docs/architecture.md: an architecture is one record and one row of SPECS.

Qwen2 and Mistral are added here from outside; sliding windows give their layers different masks.
"""

from dataclasses import replace

import pytest
import torch
from conftest import SIZES as TINY
from conftest import make_model
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
)

import gptq
from gptq.api import open_weights, perplexity
from gptq.errors import UserError
from gptq.models import LLAMA, SPECS

SIZES = {**TINY, "num_hidden_layers": 3}
WINDOW = {"sliding_window": 8}
CONFIGS: dict[str, PretrainedConfig] = {
    "mistral": MistralConfig(**SIZES, **WINDOW),
    # Layers from the second on have a sliding window, the first has none.
    "qwen2": Qwen2Config(**SIZES, **WINDOW, use_sliding_window=True, max_window_layers=1),
}


@pytest.fixture(params=CONFIGS)
def folder(request, tmp_path, monkeypatch):
    monkeypatch.setitem(SPECS, request.param, replace(LLAMA, model_type=request.param))
    return make_model(tmp_path / request.param, CONFIGS[request.param])


def windows(count=4, length=40):
    return torch.randint(2, 300, (count, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def hugging_face(folder, tokens, change=None):
    """Perplexity by transformers alone, with some weights changed before."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if change is not None:
        change(model)
    losses = [model(window[None], labels=window[None]).loss for window in tokens]
    return torch.stack(losses).mean().exp().item()


def test_perplexity_is_that_of_transformers(folder):
    found = perplexity(open_weights(folder, device="cpu"), windows())
    assert found == pytest.approx(hugging_face(folder, windows()), rel=1e-4)


def test_it_is_quantized_and_loaded(folder, text_file, tmp_path):
    config = gptq.QuantConfig(bits=4, group_size=32)
    path = tmp_path / "m.pt"
    gptq.quantize(
        folder, text_file, config, save=path, nsamples=6, seqlen=48, device="cpu", dtype="float32"
    )
    model, _ = gptq.load(folder, path, device="cpu")

    def packed(whole):
        for name, module in model.named_modules():
            if isinstance(module, gptq.QuantLinear):
                weight = dequantized(module.packed())
                whole.get_submodule(name).weight.copy_(weight)

    found = perplexity(open_weights(folder, path, device="cpu"), windows())
    expected = hugging_face(folder, windows(), packed)
    assert found == pytest.approx(expected, rel=0.02)  # the embedding and head have 8 bits


def dequantized(weight):
    from quant_cuda.reference import dequantize

    return dequantize(weight, torch.float32).T


def test_a_block_that_the_record_does_not_describe_is_refused(tmp_path, monkeypatch, text_file):
    """Gemma2 has two norms more in a block, and LLaMA's names for all the rest."""
    described = replace(SPECS["gemma2"], branches=LLAMA.branches)
    monkeypatch.setitem(SPECS, "gemma2", described)
    config = Gemma2Config(**SIZES, **WINDOW, head_dim=16, query_pre_attn_scalar=16)
    folder = make_model(tmp_path / "gemma2", config)
    with pytest.raises(UserError, match=r"model.layers.0: the description of 'gemma2' models"):
        gptq.quantize(
            folder,
            text_file,
            gptq.QuantConfig(group_size=32),
            save=tmp_path / "m.pt",
            nsamples=2,
            seqlen=32,
            device="cpu",
        )
    assert not (tmp_path / "m.pt").exists()


def test_a_buffer_that_the_record_does_not_describe_is_refused(tmp_path, monkeypatch):
    """Gemma2 multiplies its embeddings by a number that is no weight."""
    monkeypatch.setitem(SPECS, "gemma2", replace(SPECS["gemma2"], scalars=()))
    config = Gemma2Config(**SIZES, **WINDOW, head_dim=16, query_pre_attn_scalar=16)
    folder = make_model(tmp_path / "gemma2", config)
    with pytest.raises(UserError, match=r"embed_scale: the description of 'gemma2' models"):
        open_weights(folder, device="cpu")
