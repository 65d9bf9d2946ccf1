"""The cache of fixed size gives what the growing one does."""

import gc

import pytest
import torch
from transformers import AutoModelForCausalLM

from gptq.inference.cuda_graph import stepper


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("length", [1, 20])
def test_steps_are_those_of_one_pass(model_dir, device, length):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU here")
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
