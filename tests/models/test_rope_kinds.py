"""Every kind of rotary scaling, below and above the length that the model was trained for."""

import pytest
import torch
from conftest import SIZES, make_model
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import gptq
from gptq.api import open_weights, perplexity
from gptq.inference.compiled_decode import CACHE_NAME

TRAINED = 32  # tokens
FACTORS = [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5]
KINDS = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": TRAINED},
    "longrope": {
        "factor": 4.0,
        "short_factor": FACTORS,
        "long_factor": FACTORS[::-1],
        "original_max_position_embeddings": TRAINED,
    },
    "llama3": {
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": TRAINED,
    },
}


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    kind = request.param
    config = AutoConfig.for_model(
        "llama",
        **{**SIZES, "max_position_embeddings": TRAINED if kind == "dynamic" else 4 * TRAINED},
        rope_parameters={"rope_type": kind, "rope_theta": 1e4, **KINDS[kind]},
    )
    return make_model(tmp_path_factory.mktemp(kind) / "m", config)


def windows(length):
    return torch.randint(2, 300, (3, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def own_perplexity(model, length):
    losses = [model(window[None], labels=window[None]).loss for window in windows(length)]
    return torch.stack(losses).mean().exp().item()


@pytest.mark.parametrize("length", [24, 100])
def test_perplexity(length, folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = perplexity(open_weights(folder, device="cpu"), windows(length))
    assert found == pytest.approx(own_perplexity(model, length), rel=1e-4)


@torch.no_grad()
def test_calibrated_on_long_windows_and_decoded_past_the_trained_length(
    folder, text_file, tmp_path
):
    path, config = tmp_path / "m.pt", gptq.QuantConfig(bits=8, group_size=32)
    gptq.quantize(folder, text_file, config, save=path, nsamples=2, seqlen=100, device="cpu")
    model, _ = gptq.load(folder, path, device="cpu", dtype="float32")
    full = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert own_perplexity(model, 100) == pytest.approx(own_perplexity(full, 100), rel=0.03)
    # One token after another, by transformers' own modules and by ours.
    results = []
    for kind in (type(model), type(full)):
        model.__class__ = kind
        cache = DynamicCache(config=model.config)
        steps = [
            model(input_ids=token, **{CACHE_NAME: cache}).logits
            for token in windows(50)[:1].split(1, 1)
        ]
        results.append(torch.cat(steps, 1))
    torch.testing.assert_close(results[0], results[1], rtol=2e-3, atol=2e-3)
