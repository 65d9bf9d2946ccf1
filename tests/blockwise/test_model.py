"""Blocks loaded one at a time against Hugging Face's own forward of the whole model."""

from dataclasses import replace

import pytest
import torch
from conftest import bloom_config, llama_config, make_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import gptq
from gptq.blockwise.activations import batches, check_tokens, embed
from gptq.blockwise.model import BlockwiseModel, free
from gptq.blockwise.source import open_model
from gptq.errors import UserError
from gptq.inference.generate import benchmark, text
from gptq.inference.perplexity import LOGIT_TOKENS, perplexity
from gptq.nn import QuantEmbedding

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


def opened(folder):
    return BlockwiseModel.from_source(open_model(folder), CPU, torch.float32)


@torch.no_grad()
def test_hidden_states_equal_hugging_face(folder):
    model = opened(folder)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected = whole(windows(), output_hidden_states=True, use_cache=False)
    activations = embed(model, batches(windows(), CPU))

    def hidden():
        return torch.cat([hidden for (hidden,) in activations.hidden])

    for index in range(2):
        torch.testing.assert_close(hidden(), expected.hidden_states[index])
        block = model.load_block(index)
        activations.through(block)
        free(block.module)
    norm, head = (model.load(name) for name in (model.spec.norm, model.spec.head))
    torch.testing.assert_close(head(norm(hidden())), expected.logits)


@torch.no_grad()
def test_perplexity_equals_a_plain_loop(folder):
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    total = 0.0
    for window in windows(count=3, length=40):
        total += whole(window[None], labels=window[None]).loss.item() * 40
    expected = torch.tensor(total / (3 * 40)).exp().item()
    found = perplexity(opened(folder), windows(3, 40))
    assert found == pytest.approx(expected, rel=1e-5)


def test_perplexity_tells_its_progress_and_frees_the_model(llama_dir):
    model, told = opened(llama_dir), []
    perplexity(model, windows(), lambda done, total: told.append((done, total)))
    assert told == [(1, 2), (2, 2)]
    assert all(weight.is_meta for weight in model.module.parameters())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_perplexity_that_is_no_number_is_refused(tmp_path, value):
    folder = make_model(tmp_path / "m", llama_config())
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"activations overflow in torch\.float32; try --dtype"):
        perplexity(opened(folder), windows())


@torch.no_grad()
@pytest.mark.parametrize("extra", [-1, 0, 1, 2, 500])
def test_windows_longer_than_the_logits_in_memory(tmp_path, extra):
    """Logits are made 1024 tokens at a time; a window can end at, before or after such a part."""
    length = LOGIT_TOKENS + extra
    folder = make_model(tmp_path / "m", llama_config(max_position_embeddings=2048))
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    # Tokens that the model finds likely and others: parts left out or counted twice would show.
    tokens = windows(2, length)
    tokens[:, 1000:] = 7
    losses = []
    for window in tokens:
        scores = whole(window[None]).logits[0, :-1].double().log_softmax(-1)
        losses.append(-scores.gather(1, window[1:, None]).mean())
    expected = torch.stack(losses).mean().exp().item()
    assert perplexity(opened(folder), tokens) == pytest.approx(expected, rel=1e-5)


def test_a_block_is_in_memory_only_while_it_is_loaded(llama_dir):
    model = opened(llama_dir)
    assert all(parameter.is_meta for parameter in model.module.parameters())
    block = model.load_block(1)
    assert [name for name, p in model.module.named_parameters() if not p.is_meta] == [
        f"{block.name}.{name}" for name, _ in block.module.named_parameters()
    ]
    free(block.module)
    assert all(parameter.is_meta for parameter in model.module.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, name: tensors.pop(name), "not in the checkpoint"),
        (lambda tensors, name: tensors.update({name: torch.zeros(3)}), "has shape"),
    ],
)
def test_tensors_that_do_not_fit(llama_dir, change, message):
    model = opened(llama_dir)
    tensors = dict(model.tensors)
    name = "model.layers.1.mlp.up_proj.weight"
    change(tensors, name)
    with pytest.raises(UserError, match=f"{name}: {message}"):
        replace(model, tensors=tensors).load_block(1)


def test_tokens_beyond_the_embedding(llama_dir):
    """As a tokenizer with tokens of its own has them; the rows are those of the model."""
    model = opened(llama_dir)
    rows = model.module.get_input_embeddings().num_embeddings
    tokens = windows()
    tokens[-1, -1] = rows - 1
    embed(model, batches(tokens, CPU))
    tokens[-1, -1] = rows
    message = (
        rf"token {rows} of the text, but the embedding has {rows} rows; give the model its own"
    )
    with pytest.raises(UserError, match=message):
        embed(model, batches(tokens, CPU))
    whole, tokenizer = gptq.load(llama_dir)
    tokenizer.add_tokens([f"<{number}>" for number in range(rows - len(tokenizer) + 1)])
    with pytest.raises(UserError, match=message):
        text(whole, tokenizer, tokenizer.decode([rows]), 1)
    with pytest.raises(UserError, match=message):
        benchmark(whole, torch.tensor([1, rows, 2]))


@pytest.mark.parametrize("packed", [True, False])
def test_a_token_beyond_either_kind_of_embedding(packed):
    embedding = QuantEmbedding(40, 8, 4, -1) if packed else torch.nn.Embedding(40, 8)
    check_tokens(torch.tensor([0, 39]), embedding)
    check_tokens(torch.tensor([], dtype=torch.int64), embedding)
    with pytest.raises(UserError, match=r"token 40 of the text, but the embedding has 40 rows"):
        check_tokens(torch.tensor([40, 0]), embedding)
