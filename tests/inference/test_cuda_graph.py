"""The cache of fixed size gives what the growing one does."""

import gc

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from gptq.inference.cuda_graph import has_fixed_frequencies, stepper


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("length", [1, 20])
def test_steps_are_those_of_one_pass(model_dir, device, length):
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).to(device).eval()
    tokens = torch.randint(2, 300, (1, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(input_ids=tokens.to(device)).logits
    for _ in range(2):  # a second stepper starts anew
        step = stepper(model, length)
        gc.collect()
        if device == "cuda":  # a captured graph alone keeps no tensor alive
            torch.cuda.empty_cache()
        got = [step(tokens[:, i : i + 1].to(device)).clone() for i in range(length)]
        torch.testing.assert_close(torch.cat(got, 1), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("rope", "is_fixed"),
    [
        ({"rope_type": "default"}, True),
        ({"rope_type": "linear", "factor": 2.0}, True),
        ({"rope_type": "dynamic", "factor": 2.0}, False),
        (
            {
                "rope_type": "longrope",
                "short_factor": [1.0] * 16,
                "long_factor": [2.0] * 16,
                "original_max_position_embeddings": 16,
            },
            False,
        ),
    ],
)
def test_frequencies_that_follow_the_length_are_not_captured(rope, is_fixed):
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1}
    sizes |= {"intermediate_size": 64, "vocab_size": 100, "head_dim": 32}
    rope = {"rope_theta": 10000.0, **rope}
    config = AutoConfig.for_model("llama", **sizes, rope_parameters=rope)
    assert has_fixed_frequencies(AutoModelForCausalLM.from_config(config)) == is_fixed
