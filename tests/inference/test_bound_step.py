"""One token after another on a CPU, bound once, against transformers' forward and its loop."""

import pytest
import torch
from conftest import SIZES, bloom_config, make_model
from transformers import AutoConfig, DynamicCache

import gptq
from gptq import QuantConfig
from gptq.errors import UserError
from gptq.inference import decoding
from gptq.inference.bound_step import BoundStep, can_bind
from gptq.inference.compiled_decode import CACHE_NAME
from gptq.inference.cuda_graph import stepper
from gptq.inference.generate import text
from quant_cuda.cpu import library

pytestmark = pytest.mark.skipif(not library.compiled(), reason="the CPU code was not built")
# The ways to compute differ in the order of sums, and round activations to 16 bits.
TOLERANCE = {"rtol": 2e-3, "atol": 2e-3}
KINDS = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": None},
    "qwen2": {"num_attention_heads": 4, "num_key_value_heads": 1},
    "qwen3": {"head_dim": 32},
}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 500.0}
OTHERS = {
    "window": ("mistral", {"sliding_window": 12}),
    "dynamic": ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 16}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A packed model of each kind."""
    made = {}
    kinds = {name: (name, changes) for name, changes in KINDS.items()} | OTHERS
    for name, (kind, changes) in kinds.items():
        made[name] = AutoConfig.for_model(kind, **{**SIZES, **changes})
    made["bloom"] = bloom_config()
    for name, config in made.items():
        base = tmp_path_factory.mktemp(name)
        source = make_model(base / "model", config)
        settings = QuantConfig(group_size=32, method="rtn", embedding_bits=8)
        gptq.quantize(source, None, settings, save_dir=base / "packed", device="cpu")
        made[name] = base / "packed"
    return made


def loaded(folder):
    return gptq.load(folder, device="cpu", dtype="float32")[0]


def some_tokens(count):
    return torch.randint(2, 300, (1, count), generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("kind", [*KINDS, "dynamic"])
def test_steps_are_those_of_one_pass(kind, folders):
    model, tokens = loaded(folders[kind]), some_tokens(30)
    step = stepper(model, 30)
    assert isinstance(step, BoundStep)
    result = torch.cat([step(token) for token in tokens.split(1, 1)], 1)
    with torch.no_grad():
        if kind == "dynamic":  # frequencies change with the length: one pass has other ones
            settings = {"use_cache": True, CACHE_NAME: DynamicCache(config=model.config)}
            parts = [model(input_ids=token, **settings).logits for token in tokens.split(1, 1)]
            expected = torch.cat(parts, 1)
        else:
            expected = model(input_ids=tokens, use_cache=False).logits
    torch.testing.assert_close(result, expected, **TOLERANCE)


@pytest.mark.parametrize("room", [None, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("samples", [False, True])
def test_tokens_are_those_of_generate(samples, kind, room, folders, monkeypatch):
    if room is not None:
        monkeypatch.setattr(BoundStep, "room", lambda _: room)
    model, prompt = loaded(folders[kind]), some_tokens(6)
    settings = {"max_new_tokens": 40, "do_sample": samples, "eos_token_id": None}
    more = decoding.arguments(model)
    assert more != {}
    found = []
    for own in ({}, more):
        torch.manual_seed(3)
        found.append(
            model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings, **own)
        )
    assert found[0].shape == (1, 46)
    # Logits are those of the same code, so that no token is chosen otherwise.
    assert torch.equal(*found)


@pytest.mark.parametrize("kind", [*KINDS, "dynamic", "window", "bloom"])
def test_which_models_are_bound(kind, folders):
    model = loaded(folders[kind])
    assert can_bind(model) == (kind not in ("window", "bloom"))
    assert (decoding.arguments(model) == {}) == (kind in ("window", "bloom"))


@pytest.mark.parametrize(
    "change", ["lm_head", "model.norm", "model", "model.layers.1.mlp", "model.rotary_emb", "type"]
)
def test_what_is_asked_before_each_answer(change, folders):
    model = loaded(folders["llama"])
    assert can_bind(model)
    if change == "type":
        model.model.embed_tokens.to(torch.bfloat16)
        model.model.embed_tokens.dtype = torch.bfloat16
    else:
        model.get_submodule(change).register_forward_hook(lambda *_: None)
    assert not can_bind(model)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_cache": False},
        {"stop_strings": ["a", "e"]},
        {"output_attentions": True},
        {"output_hidden_states": True},
        {"cache_implementation": "static", "disable_compile": True},
        {"prefill_chunk_size": 3},
        {"dola_layers": "low"},
        {"num_beams": 3},
        {"no_repeat_ngram_size": 2, "min_new_tokens": 4, "suppress_tokens": [50]},
    ],
)
def test_what_a_generation_config_asks_for(settings, folders, monkeypatch):
    model, tokenizer = gptq.load(folders["llama"], device="cpu", dtype="float32")
    for name, value in settings.items():
        setattr(model.generation_config, name, value)

    def outcome():
        try:
            return text(model, tokenizer, "some words", 24)
        except UserError as error:
            return str(error)

    found = outcome()
    monkeypatch.setattr(decoding, "arguments", lambda *_: {})
    assert found == outcome()


@pytest.mark.parametrize("settings", [{"use_cache": False}, {"output_attentions": True}])
def test_what_a_caller_asks_for(settings, folders):
    model, prompt = loaded(folders["llama"]), some_tokens(6)
    settings = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, **settings}
    settings["attention_mask"] = torch.ones_like(prompt)
    more = decoding.arguments(model)
    assert more != {}
    assert torch.equal(
        model.generate(prompt, **settings, **more), model.generate(prompt, **settings)
    )


def test_the_cache_has_a_type_of_its_own(folders, monkeypatch):
    model, tokenizer = gptq.load(folders["llama"], device="cpu", dtype="float32")
    found = text(model, tokenizer, "some words", 20)
    step = stepper(model, 4)
    try:
        torch.set_default_dtype(torch.float64)
        assert {it.dtype for pair in stepper(model, 4).cache for it in pair} == {torch.float32}
        assert step(some_tokens(1)).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
    assert text(model, tokenizer, "some words", 20) == found


def test_rotary_terms_of_a_part_of_a_head(folders):
    model = loaded(folders["llama"])
    assert can_bind(model)
    rotary = model.model.rotary_emb
    rotary.inv_freq = rotary.inv_freq[: len(rotary.inv_freq) // 2]
    assert not can_bind(model)


def test_text_is_generated_by_bound_steps(folders, monkeypatch):
    made = []
    init = BoundStep.__init__

    def watched(self, model, length):
        made.append(length)
        init(self, model, length)

    monkeypatch.setattr(BoundStep, "__init__", watched)
    model, tokenizer = gptq.load(folders["llama"], device="cpu", dtype="float32")
    found = text(model, tokenizer, "some words", 20)
    assert len(made) == 1
    monkeypatch.setattr(decoding, "_kind", lambda _: None)
    assert text(model, tokenizer, "some words", 20) == found
    assert len(made) == 1
