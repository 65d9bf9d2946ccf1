"""The permuted model computes what the original does, on other groups of weights."""

import torch
from conftest import llama_config, make_model
from transformers import AutoModelForCausalLM

from benchmarks.common.permuted import permuted_copy


@torch.no_grad()
def test_the_function_stays_and_the_groups_do_not(tmp_path):
    folder = make_model(tmp_path / "m", llama_config(tie_word_embeddings=True))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    copy = AutoModelForCausalLM.from_pretrained(permuted_copy(folder, tmp_path / "p"))
    tokens = torch.randint(2, 300, (2, 30), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(copy(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-4)
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    found = 0
    for (name, weight), (_, other) in zip(
        model.named_parameters(), copy.named_parameters(), strict=True
    ):
        if any(part in name for part in names):
            found += 1
            assert not torch.equal(weight, other)
            assert torch.equal(weight.flatten().sort().values, other.flatten().sort().values)
    assert found == 14
