"""Blocks filled one at a time against Hugging Face's own forward of the whole model."""

import pytest
import torch
from conftest import bloom_config, llama_config, make_model
from transformers import AutoModelForCausalLM

from gptq.blockwise import empty_model
from gptq.blockwise.source import open_model
from gptq.errors import UserError
from gptq.inference.perplexity import perplexity

CPU = torch.device("cpu")
CONFIGS = {
    "llama grouped heads": llama_config(),
    "llama tied": llama_config(tie_word_embeddings=True),
    "llama biases": llama_config(attention_bias=True, mlp_bias=True),
    "llama all heads": llama_config(num_key_value_heads=4, hidden_act="gelu"),
    "llama scaled rotary": llama_config(
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    ),
    "bloom tied": bloom_config(),
    "bloom untied": bloom_config(tie_word_embeddings=False),
    "bloom residual after norm": bloom_config(apply_residual_connection_post_layernorm=True),
}


@pytest.fixture(scope="module", params=CONFIGS, ids=lambda name: name.replace(" ", "-"))
def folder(request, tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model") / "m", CONFIGS[request.param])


def windows(count=5, length=24):
    return torch.randint(2, 300, (count, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_hidden_states_equal_hugging_face(folder):
    source = open_model(folder)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected = whole(windows(), output_hidden_states=True, use_cache=False)
    model = empty_model.build(source.config, source.spec, CPU)
    batches = empty_model.batches(windows(), CPU)
    stream = empty_model.embed(model, source.spec, source.tensors, batches, CPU, torch.float32)

    def hidden():
        return torch.cat([hidden for (hidden,) in stream.hidden])

    for index in range(2):
        torch.testing.assert_close(hidden(), expected.hidden_states[index])
        name = source.spec.block(index)
        block = empty_model.fill(model, source.spec, name, source.tensors, CPU, torch.float32)
        stream.through(block)
        empty_model.drop(block)
    norm, head = (
        empty_model.fill(model, source.spec, name, source.tensors, CPU, torch.float32)
        for name in (source.spec.norm, source.spec.head)
    )
    torch.testing.assert_close(head(norm(hidden())), expected.logits)


@torch.no_grad()
def test_perplexity_equals_a_plain_loop(folder):
    source = open_model(folder)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    total = 0.0
    for window in windows(count=3, length=40):
        total += whole(window[None], labels=window[None]).loss.item() * 40
    expected = torch.tensor(total / (3 * 40)).exp().item()
    model = empty_model.build(source.config, source.spec, CPU)
    found = perplexity(model, source.spec, source.tensors, windows(3, 40), CPU, torch.float32)
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_block_is_in_memory_only_while_it_is_filled(llama_dir):
    source = open_model(llama_dir)
    model = empty_model.build(source.config, source.spec, CPU)
    assert all(parameter.is_meta for parameter in model.parameters())
    block = empty_model.fill(
        model, source.spec, source.spec.block(1), source.tensors, CPU, torch.float32
    )
    assert [name for name, p in model.named_parameters() if not p.is_meta] == [
        f"{source.spec.block(1)}.{name}" for name, _ in block.named_parameters()
    ]
    empty_model.drop(block)
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, name: tensors.pop(name), "not in the checkpoint"),
        (lambda tensors, name: tensors.update({name: torch.zeros(3)}), "has shape"),
    ],
)
def test_tensors_that_do_not_fit(llama_dir, change, message):
    source = open_model(llama_dir)
    model = empty_model.build(source.config, source.spec, CPU)
    tensors = dict(source.tensors)
    name = "model.layers.1.mlp.up_proj.weight"
    change(tensors, name)
    with pytest.raises(UserError, match=f"{name}: {message}"):
        empty_model.fill(model, source.spec, "model.layers.1", tensors, CPU, torch.float32)
