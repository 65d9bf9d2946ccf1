"""Text and latency, against transformers' own generate and plain forwards."""

import json
import shutil

import pytest
import torch
from helpers.spaced import spaced_tokenizer

import gptq
from gptq import QuantConfig, QuantLinear
from gptq.errors import UserError
from gptq.inference.generate import Latency, benchmark, text

NEW = 12


@pytest.fixture(scope="module", params=["llama", "bloom"])
def loaded(request, tmp_path_factory):
    """A 4-bit model of each architecture and its tokenizer."""
    folder = request.getfixturevalue(f"{request.param}_dir")
    path = tmp_path_factory.mktemp("generate") / "m.pt"
    gptq.quantize(
        folder,
        request.getfixturevalue("text_file"),
        QuantConfig(bits=4, group_size=32, order="act"),
        save=path,
        nsamples=4,
        seqlen=32,
    )
    model, tokenizer = gptq.load(folder, path)
    assert any(isinstance(module, QuantLinear) for module in model.modules())
    return model, tokenizer


@torch.no_grad()
def greedy(model, ids, count):
    """The most likely token after the last, again and again, without a cache."""
    ids = list(ids)
    for _ in range(count):
        logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
        ids.append(int(logits.argmax()))
        if ids[-1] == model.config.eos_token_id:
            break
    return ids


def test_text_is_greedy(loaded):
    model, tokenizer = loaded
    ids = tokenizer("the cat sat on")["input_ids"]
    expected = tokenizer.decode(greedy(model, ids, NEW)[len(ids) :], skip_special_tokens=True)
    assert text(model, tokenizer, "the cat sat on", NEW) == expected
    encoded = tokenizer("the cat sat on", return_tensors="pt", return_token_type_ids=False)
    generated = model.generate(**encoded, max_new_tokens=NEW, do_sample=False, pad_token_id=1)
    assert expected == tokenizer.decode(generated[0, len(ids) :], skip_special_tokens=True)


def test_text_ends_at_the_end_of_text(loaded):
    model, tokenizer = loaded
    ids = tokenizer("the cat sat on")["input_ids"]
    third = greedy(model, ids, 3)[-1]
    eos = model.generation_config.eos_token_id
    try:
        model.generation_config.eos_token_id = third
        written = text(model, tokenizer, "the cat sat on", NEW)
    finally:
        model.generation_config.eos_token_id = eos
    new = greedy(model, ids, 3)[len(ids) :]
    assert written == tokenizer.decode(new[: new.index(third) + 1], skip_special_tokens=True)


def test_settings_of_the_model_do_not_make_it_sample(loaded):
    """Published models come with temperatures of their own."""
    model, tokenizer = loaded
    expected = text(model, tokenizer, "the dog", NEW)
    model.generation_config.update(do_sample=True, temperature=5.0, top_p=0.9)
    try:
        assert all(text(model, tokenizer, "the dog", NEW) == expected for _ in range(3))
    finally:
        model.generation_config.update(do_sample=False, temperature=1.0, top_p=1.0)


@pytest.mark.parametrize("count", [0, -1])
def test_no_new_tokens(count, loaded):
    with pytest.raises(UserError, match=f"max_new_tokens {count}: give 1 or more"):
        text(*loaded, "the cat", count)


def test_an_empty_prompt(loaded):
    with pytest.raises(UserError, match="the prompt is empty"):
        text(*loaded, "", NEW)


class Fixed(torch.nn.Module):
    """A stand-in for a model: it always writes the same tokens, and keeps its prompts."""

    device = torch.device("cpu")

    def __init__(self, *new):
        super().__init__()
        self.new, self.prompts = new, []
        self.embedding = torch.nn.Embedding(320, 1)

    def get_input_embeddings(self):
        return self.embedding

    def generate(self, input_ids, attention_mask, max_new_tokens, **_):
        self.prompts.append(input_ids[0].tolist())
        return torch.cat([input_ids, torch.tensor([self.new[:max_new_tokens]])], dim=1)


@pytest.fixture
def spaced():
    return spaced_tokenizer()


def test_the_space_before_the_first_new_word_is_kept(spaced):
    model = Fixed(7, 8, 1)
    assert spaced.decode([7, 8]) == "b c"
    assert text(model, spaced, "hi a", 3) == " b c"
    assert model.prompts == [[0, 5, 6]]


# One token after another ---------------------------------------------------------------------


@torch.no_grad()
def test_cached_steps_equal_one_forward(loaded):
    model = loaded[0]
    tokens = torch.randint(2, 300, (1, 20), generator=torch.Generator().manual_seed(1))
    whole = model(tokens, use_cache=False).logits
    cache, steps = None, []
    for position in range(20):
        output = model(tokens[:, position : position + 1], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        steps.append(output.logits)
    # Products in integers round activations to 16 bits (docs/kernels.md): a last bit that differs
    # before it grows to 1.7e-4 of logits up to 2.4. Products in floats agree to 1e-5.
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=1e-4, atol=5e-4)


@torch.no_grad()
def test_benchmark(loaded):
    model = loaded[0]
    tokens = torch.randint(2, 300, (20,), generator=torch.Generator().manual_seed(1))
    calls = []
    result = benchmark(model, tokens, check=True, progress=lambda *step: calls.append(step))
    logits = model(tokens[None], use_cache=False).logits[0, :-1].double()
    chosen = logits.log_softmax(-1).gather(1, tokens[1:, None])
    assert result.perplexity == pytest.approx(float((-chosen.mean()).exp()), rel=1e-4)
    assert result.tokens == 20
    assert len(result.seconds) == 19
    assert all(second > 0 for second in result.seconds)
    assert calls == [(done, 20) for done in range(1, 21)]
    assert result.peak_memory > 2**26
    assert benchmark(model, tokens).perplexity is None


def test_latency_is_the_median():
    result = Latency(5, (0.5, 0.1, 0.2, 9.0), 0, None)
    assert result.median == pytest.approx(0.35)
    assert result.tokens_per_second == pytest.approx(1 / 0.35)


def test_one_token_is_timed(loaded):
    result = benchmark(loaded[0], torch.tensor([5]))
    assert (result.tokens, len(result.seconds)) == (1, 1)


def test_generation_settings_come_from_the_folder(llama_dir, tmp_path):
    folder = shutil.copytree(llama_dir, tmp_path / "model")
    settings = {"eos_token_id": [1, 9], "temperature": 0.9, "top_p": 0.6, "do_sample": True}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    model, _ = gptq.load(folder)
    assert model.generation_config.eos_token_id == [1, 9]
