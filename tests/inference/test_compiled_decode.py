"""Single tokens through all blocks in one native call, against transformers' own forward."""

import copy
import inspect
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import SIZES, bloom_config, make_model
from transformers import AttentionInterface, AutoConfig, DynamicCache
from transformers.activations import ACT2FN
from transformers.integrations import sdpa_attention
from transformers.models.bloom import modeling_bloom
from transformers.models.llama import modeling_llama

import gptq
from gptq import QuantConfig
from gptq.inference import compiled_decode
from gptq.nn import QuantLinear
from quant_cuda.cpu import decoder_block, library
from quant_cuda.cuda import library as gpu_library

pytestmark = pytest.mark.skipif(not library.compiled(), reason="the CPU code was not built")
# transformers 5.24 has renamed it, and warns of the old name.
CACHE = (
    "cache"
    if "cache" in inspect.signature(modeling_llama.LlamaForCausalLM.forward).parameters
    else "past_key_values"
)
PROMPT = torch.tensor([[5, 80, 41, 200, 7]])
torch_compiles = pytest.mark.skipif(
    torch.__version__ < (2, 7), reason="torch 2.6 compiles no model of transformers"
)
TOLERANCE = {"rtol": 2e-3, "atol": 2e-3}  # activations are rounded to 16 bits on either way


# Architectures besides LLaMA, with what is particular in each.
WINDOW = {"sliding_window": 12}
BY_LAYER = {**WINDOW, "use_sliding_window": True, "max_window_layers": 1}
OTHERS = {
    "mistral": {"sliding_window": None},
    "mistral with windows": WINDOW,
    "qwen2": {"num_attention_heads": 4, "num_key_value_heads": 1},
    "qwen2 with windows": BY_LAYER,
    "qwen3": {"head_dim": 32},
    "qwen3 with windows": {**BY_LAYER, "attention_bias": True},
}


def packed_folder(base, bits=4, model_type="llama", **changes):
    config = AutoConfig.for_model(model_type, **{**SIZES, **changes})
    source = make_model(base / "model", config)
    config = QuantConfig(bits=bits, group_size=32, method="rtn")
    gptq.quantize(source, None, config, save_dir=base / "packed", device="cpu")
    return base / "packed"


def loaded(folder, **settings):
    model, _ = gptq.load(folder, device="cpu", dtype="float32", **settings)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return packed_folder(tmp_path_factory.mktemp("packed"), attention_bias=True, mlp_bias=True)


@pytest.fixture
def model(folder):
    return loaded(folder)


@torch.no_grad()
def logits(model, tokens, cache=None, **arguments):
    """Logits of every token, one at a time after the first five; and the cache."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    start = cache.get_seq_length()
    cuts = [5, *([1] * (tokens.shape[1] - 5))] if start == 0 else [1] * tokens.shape[1]
    result = [
        model(input_ids=part, **{CACHE: cache}, use_cache=True, **arguments).logits
        for part in tokens.split(cuts, 1)
    ]
    return torch.cat(result, 1), cache


@torch.no_grad()
def whole(model, tokens):
    return model(input_ids=tokens, use_cache=False).logits


def some_tokens(count):
    return torch.randint(2, 300, (1, count), generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_against_a_forward_of_all_tokens(bits, tmp_path, compiled_steps):
    model = loaded(packed_folder(tmp_path, bits))
    tokens = some_tokens(80)  # more than the first buffer holds
    result, cache = logits(model, tokens)
    assert len(compiled_steps) == 75 * 2
    assert cache.get_seq_length() == 80
    torch.testing.assert_close(result, whole(model, tokens), **TOLERANCE)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_attention_heads": 8, "num_key_value_heads": 8},
        {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 40},
        {"hidden_size": 72, "head_dim": 24, "intermediate_size": 104, "attention_bias": True},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}},
    ],
)
def test_shapes(changes, tmp_path, compiled_steps):
    model = loaded(packed_folder(tmp_path, **changes))
    tokens = some_tokens(12)
    result, _ = logits(model, tokens)
    assert len(compiled_steps) == 14
    torch.testing.assert_close(result, whole(model, tokens), **TOLERANCE)


@pytest.fixture(scope="module")
def other(request, tmp_path_factory):
    base = tmp_path_factory.mktemp("other")
    return packed_folder(base, model_type=request.param.split()[0], **OTHERS[request.param])


@pytest.mark.parametrize("is_told", [True, False], ids=["cache of windows", "cache of all"])
@pytest.mark.parametrize("other", OTHERS, indirect=True)
def test_other_architectures(other, is_told, compiled_steps):
    """A window of 12 tokens, of which the first buffer has room for 64."""
    model, tokens = loaded(other), some_tokens(150)
    cache = DynamicCache(config=model.config) if is_told else DynamicCache()
    result, cache = logits(model, tokens, cache)
    assert len(compiled_steps) == 145 * 2
    assert cache.get_seq_length() == 150
    torch.testing.assert_close(result, whole(model, tokens), **TOLERANCE)
    # transformers goes on with what it finds in the cache.
    result = model(input_ids=PROMPT, **{CACHE: cache}).logits
    exact = whole(model, torch.cat([tokens, PROMPT], 1))[:, 150:]
    torch.testing.assert_close(result, exact, **TOLERANCE)
    compiled_steps.clear()
    result, _ = logits(model, PROMPT, cache)
    exact = whole(model, torch.cat([tokens, PROMPT, PROMPT], 1))[:, 155:]
    torch.testing.assert_close(result, exact, **TOLERANCE)
    assert len(compiled_steps) == 10


@pytest.mark.parametrize("other", OTHERS, indirect=True)
def test_other_architectures_generate_and_are_copied(other, compiled_steps):
    model = loaded(other)
    arguments = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None}
    native_ids = model.generate(PROMPT, **arguments)
    assert len(compiled_steps) == 29 * 2
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(native_ids, twin.generate(PROMPT, **arguments))
    assert len(compiled_steps) == 3 * 29 * 2
    (theirs,) = type(model).__bases__
    assert theirs.__name__ == type(model).__name__ == model.config.architectures[0]
    model.__class__ = theirs
    assert torch.equal(native_ids, model.generate(PROMPT, **arguments))
    assert len(compiled_steps) == 3 * 29 * 2


@pytest.mark.parametrize("other", ["mistral with windows"], indirect=True)
def test_a_cache_of_windows_that_is_copied(other):
    model, tokens = loaded(other), some_tokens(40)
    _, cache = logits(model, tokens)
    shallow = copy.copy(cache)
    shallow.layers = [copy.copy(layer) for layer in cache.layers]
    for number, branch in ((9, cache), (150, shallow), (77, copy.deepcopy(cache))):
        end = torch.full((1, 15), number)
        result, _ = logits(model, end, branch)
        exact = whole(model, torch.cat([tokens, end], 1))[:, 40:]
        torch.testing.assert_close(result, exact, **TOLERANCE)


@pytest.mark.parametrize("other", ["mistral with windows"], indirect=True)
@pytest.mark.parametrize("window", [1, 8])
def test_windows_that_a_cache_keeps_otherwise(other, window, compiled_steps):
    """Of one token, which transformers' slices cannot say, and another than the model's."""
    model, config = loaded(other), copy.deepcopy(loaded(other).config)
    config.sliding_window = window
    logits(model, some_tokens(20), DynamicCache(config=config))
    assert not compiled_steps


@pytest.mark.parametrize("other", ["qwen3"], indirect=True)
@pytest.mark.parametrize("change", ["weight", "epsilon", "class"])
def test_what_people_change_in_norms_of_heads_counts(other, change, compiled_steps, monkeypatch):
    model, tokens = loaded(other), some_tokens(9)
    before = logits(model, tokens)[0]
    for layer in model.model.layers:
        norm = layer.self_attn.k_norm
        if change == "weight":
            norm.weight = torch.nn.Parameter(norm.weight.detach() * 3)
        elif change == "epsilon":
            norm.variance_epsilon = 0.5
        else:
            monkeypatch.setattr(type(norm), "forward", scaled(type(norm).forward))
    after = logits(model, tokens)[0]
    torch.testing.assert_close(after, whole(model, tokens), **TOLERANCE)
    assert not torch.allclose(after, before, **TOLERANCE)


@pytest.mark.parametrize("name", library.compiled())
def test_every_instruction_set(name, model, monkeypatch):
    if name not in library.instruction_sets():
        pytest.skip(f"this processor has no {name}")
    exact = whole(model, some_tokens(20))
    run = decoder_block.run
    index = library.compiled().index(name)
    monkeypatch.setattr(decoder_block, "run", lambda *args: run(*args, backend=index))
    result, _ = logits(model, some_tokens(20))
    torch.testing.assert_close(result, exact, **TOLERANCE)


def test_many_threads(model):
    tokens, before = some_tokens(40), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(logits(model, tokens)[0][:, 5:])
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(results[0], results[1], **TOLERANCE)


def test_large_scores_and_gates(folder, compiled_steps):
    model = loaded(folder)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight.mul_(300)
            layer.post_attention_layernorm.weight.mul_(300)
    tokens = some_tokens(12)
    result, _ = logits(model, tokens)
    assert compiled_steps
    exact = whole(model, tokens)
    assert bool(torch.isfinite(result).all())
    torch.testing.assert_close(result, exact, rtol=0.02, atol=0.02 * float(exact.abs().max()))


def test_generate(model, compiled_steps):
    arguments = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None}
    native_ids = model.generate(PROMPT, **arguments)
    assert len(compiled_steps) == 29 * 2
    model.__class__ = modeling_llama.LlamaForCausalLM
    assert torch.equal(native_ids, model.generate(PROMPT, **arguments))


def test_it_takes_what_transformers_takes(model):
    theirs = inspect.signature(modeling_llama.LlamaForCausalLM.forward)
    assert inspect.signature(compiled_decode.LlamaForCausalLM.forward) == theirs
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate(PROMPT, max_new_tokens=3, do_sample=False, eos_token_id=None)
        ids = model(PROMPT).logits.argmax(-1)
        assert model(ids[:, :1]).logits.shape == (1, 1, 320)
        with pytest.raises(ValueError, match="nonsense"):
            model.generate(PROMPT, nonsense=1)


def test_int8_activations(folder, compiled_steps):
    rounded = loaded(folder, int8_activations=True)
    result, _ = logits(rounded, some_tokens(20))
    assert len(compiled_steps) == 30
    torch.testing.assert_close(result, whole(rounded, some_tokens(20)), rtol=0.1, atol=0.1)


def test_a_cache_that_is_cropped_and_copied(model):
    tokens = some_tokens(24)
    _, cache = logits(model, tokens)
    cache.crop(-10)
    deep = copy.deepcopy(cache)
    shallow = copy.copy(cache)
    shallow.layers = [copy.copy(layer) for layer in cache.layers]
    results = []
    for name, branch in (("first", cache), ("deep", deep), ("shallow", shallow)):
        end = torch.full((1, 3), {"first": 9, "deep": 77, "shallow": 150}[name])
        results.append((end, branch, logits(model, end, branch)[0]))
    for end, branch, result in results:
        exact = whole(model, torch.cat([tokens[:, :14], end], 1))[:, 14:]
        torch.testing.assert_close(result, exact, **TOLERANCE)
        again, _ = logits(model, torch.tensor([[3]]), branch)
        exact = whole(model, torch.cat([tokens[:, :14], end, torch.tensor([[3]])], 1))[:, -1:]
        torch.testing.assert_close(again, exact, **TOLERANCE)


def test_what_it_leaves_to_transformers(model, compiled_steps):
    tokens = some_tokens(8)
    two = tokens.repeat(2, 1)
    torch.testing.assert_close(logits(model, two)[0], whole(model, two), **TOLERANCE)
    mask = torch.ones(1, 6, dtype=torch.long)
    mask[0, :2] = 0
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(input_ids=tokens[:, :5], attention_mask=mask[:, :5], **{CACHE: cache})
        model(input_ids=tokens[:, 5:6], attention_mask=mask, **{CACHE: cache})
    model.generate(PROMPT, max_new_tokens=3, num_beams=2, do_sample=False)
    model.generate(PROMPT, max_new_tokens=3, cache_implementation="static", disable_compile=True)
    assert not compiled_steps
    _, cache = logits(model, tokens)
    before = len(compiled_steps)
    model(input_ids=tokens[:, :1], **{CACHE: cache})  # outside of no_grad
    assert len(compiled_steps) == before


@torch_compiles
def test_what_is_traced_is_transformers_own(model, compiled_steps):
    traced = torch.compile(model, backend="eager")
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        traced(input_ids=PROMPT, **{CACHE: cache})
        result = traced(input_ids=PROMPT[:, :1], **{CACHE: cache}).logits
    assert not compiled_steps
    exact = whole(model, torch.cat([PROMPT, PROMPT[:, :1]], 1))[:, -1:]
    torch.testing.assert_close(result, exact, **TOLERANCE)


def test_layers_are_found_as_ever(model, compiled_steps):
    """Alone and in part, also while a token is decoded: modules are shared with other threads."""
    layers, found = model.model.layers, []

    def look(*_):
        found.append(model.get_submodule("model.layers.0.mlp") is layers[0].mlp)
        found.append(list(model.model.layers) == list(layers) and len(layers[:2]) == 2)
        found.append("layers" not in vars(model.model))

    model.model.norm.register_forward_hook(look)
    logits(model, some_tokens(7))
    assert len(compiled_steps) == 4
    assert len(found) == 9
    assert all(found)


def on_class(owner, name, change):
    """Replace a function of a class or module for one test; `change` makes the new from the old."""

    def apply(model, monkeypatch):
        monkeypatch.setattr(owner, name, change(getattr(owner, name)))

    return apply


def on_layers(path, name, value):
    """Set an attribute of a module of every layer."""

    def apply(model, monkeypatch):
        for layer in model.model.layers:
            setattr(layer.get_submodule(path), name, value)

    return apply


def scaled(old):
    return lambda self, x: old(self, x) * 0.3


def new_norms(model, monkeypatch):
    for layer in model.model.layers:
        layer.input_layernorm.weight.data = layer.input_layernorm.weight.data * 2


def another_attention(model, monkeypatch):
    def attention(*args, **kwargs):
        states, weights = sdpa_attention.sdpa_attention_forward(*args, **kwargs)
        return states * 0.5, weights

    AttentionInterface.register("half_of_sdpa", attention)
    model.set_attn_implementation("half_of_sdpa")


def another_class(model, monkeypatch):
    class Loud(modeling_llama.LlamaMLP):
        def forward(self, x):
            return super().forward(x) * 3

    model.model.layers[1].mlp.__class__ = Loud


CHANGES = {
    "mlp class": on_class(modeling_llama.LlamaMLP, "forward", scaled),
    "norm class": on_class(modeling_llama.LlamaRMSNorm, "forward", scaled),
    "packed class": on_class(QuantLinear, "forward", scaled),
    "act class": on_class(type(ACT2FN["silu"]), "forward", scaled),
    "layer class": on_class(
        modeling_llama.LlamaDecoderLayer,
        "forward",
        lambda old: lambda self, *args, **kwargs: old(self, *args, **kwargs) * 1.3,
    ),
    "call": on_class(
        modeling_llama.LlamaAttention,
        "__call__",
        lambda old: lambda self, *args, **kwargs: (old(self, *args, **kwargs)[0] * 0.2, None),
    ),
    "rotary": on_class(
        modeling_llama, "apply_rotary_pos_emb", lambda _: lambda q, k, *args, **kwargs: (q, k)
    ),
    "torch": on_class(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda old: lambda *args, **kwargs: old(*args, **kwargs) * 0.5,
    ),
    "act_fn": on_layers("mlp", "act_fn", torch.nn.Tanh()),
    "scaling": on_layers("self_attn", "scaling", 0.9),
    "epsilon": on_layers("input_layernorm", "variance_epsilon", 0.5),
    "norm storage": new_norms,
    "attention": another_attention,
    "class of one": another_class,
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_people_change_counts_for_every_token(name, model, monkeypatch):
    tokens = some_tokens(9)
    before = logits(model, tokens)[0]
    CHANGES[name](model, monkeypatch)
    after = logits(model, tokens)[0]
    torch.testing.assert_close(after, whole(model, tokens), **TOLERANCE)
    assert not torch.allclose(after, before, **TOLERANCE)


def test_a_hook_on_an_activation_is_called(model, compiled_steps):
    calls = []
    logits(model, some_tokens(7))
    count = len(compiled_steps)
    model.model.layers[0].mlp.act_fn.register_forward_hook(lambda *args: calls.append(args))
    logits(model, some_tokens(7))
    assert len(calls) == 3
    assert len(compiled_steps) == count


@torch_compiles
def test_an_inner_model_is_compiled_or_replaced(model, compiled_steps):
    tokens = some_tokens(8)
    expected = logits(model, tokens)[0]
    count = len(compiled_steps)
    model.model = torch.compile(model.model, backend="eager")
    torch.testing.assert_close(logits(model, tokens)[0], expected, **TOLERANCE)
    assert len(compiled_steps) == count


@pytest.mark.parametrize("name", ["mask", "positions", "embeddings", "labels", "tuple", "autocast"])
def test_arguments_are_as_transformers_takes_them(name, model, compiled_steps):
    tokens, token = some_tokens(6), torch.tensor([[9]])
    arguments = {
        "mask": {"attention_mask": torch.ones(1, 7, dtype=torch.long)},
        "positions": {"position_ids": torch.tensor([[11]])},
        "embeddings": {"inputs_embeds": model.model.embed_tokens(token)},
        "labels": {"labels": token},
        "tuple": {"return_dict": False},
        "autocast": {},
    }[name]
    arguments = arguments if "inputs_embeds" in arguments else {"input_ids": token, **arguments}
    results = []
    for kind in (compiled_decode.LlamaForCausalLM, modeling_llama.LlamaForCausalLM):
        model.__class__ = kind
        cache = logits(model, tokens)[1]
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=name == "autocast"):
            results.append((model(**arguments, **{CACHE: cache}), cache.get_seq_length()))
    assert len(compiled_steps) == (4 if name in ("mask", "positions", "embeddings") else 2)
    (ours, length), (theirs, same_length) = results
    assert type(ours) is type(theirs)
    assert length == same_length == 7
    torch.testing.assert_close(ours[name == "labels"], theirs[name == "labels"], **TOLERANCE)
    assert list(getattr(ours, "keys", list)()) == list(getattr(theirs, "keys", list)())


@pytest.mark.parametrize(
    "arguments",
    [
        {"position_ids": torch.tensor([[11], [12]])},
        {"position_ids": torch.tensor([[11, 12]])},
        {"position_ids": torch.tensor([11])},
        {"attention_mask": torch.ones(1, 8, dtype=torch.long)},
        {"attention_mask": torch.tensor([[1, 1, 1, 0, 1, 1, 1]])},
        {"logits_to_keep": torch.tensor([0])},
        {"use_cache": False},
        {"output_attentions": True},
    ],
    # A tensor of two rows prints as two lines.
    ids=lambda arguments: " ".join(str(arguments).split()),
)
def test_unusual_arguments_are_left_to_transformers(arguments, model, compiled_steps):
    """Whatever it makes of them: a result, or its own error."""
    token = torch.tensor([[9]])

    @torch.no_grad()
    def step(kind, **arguments):
        # Caches of one kind, so that results can be equal: compiled code adds in another order.
        model.__class__ = modeling_llama.LlamaForCausalLM
        cache = logits(model, some_tokens(6))[1]
        model.__class__ = kind
        try:
            return model(input_ids=token, **arguments, **{CACHE: cache}).logits
        except (RuntimeError, IndexError, ValueError) as error:
            return str(error)

    step(compiled_decode.LlamaForCausalLM)
    assert compiled_steps  # without the arguments
    compiled_steps.clear()
    ours = step(compiled_decode.LlamaForCausalLM, **arguments)
    theirs = step(modeling_llama.LlamaForCausalLM, **arguments)
    assert not compiled_steps
    assert torch.equal(ours, theirs) if isinstance(theirs, torch.Tensor) else ours == theirs


def test_layers_in_another_order_or_repeated(tmp_path, compiled_steps):
    model = loaded(packed_folder(tmp_path, num_hidden_layers=3))
    layers = model.model.layers
    for order in ([1, 0, 2], [0, 1, 1]):
        model.model.layers = torch.nn.ModuleList([layers[index] for index in order])
        logits(model, some_tokens(7))
    assert not compiled_steps


def test_threads_take_tokens_of_their_own(model):
    """If one ends first, another may run transformers' own modules."""
    tokens = [torch.randint(2, 300, (1, 40)) for _ in range(4)]
    expected = [logits(model, row)[0] for row in tokens]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda row: logits(model, row)[0], tokens))
    for result, exact in zip(results, expected, strict=True):
        torch.testing.assert_close(result, exact, **TOLERANCE)


def test_dropout_is_left_to_transformers(model, compiled_steps):
    _, cache = logits(model, PROMPT)
    model.train()
    with torch.no_grad():
        model(input_ids=PROMPT[:, :1], **{CACHE: cache})
    assert not compiled_steps


def test_a_hook_sees_its_layer(model, compiled_steps):
    layer = model.model.layers[0]
    calls = []
    handle = layer.mlp.up_proj.register_forward_hook(lambda *args: calls.append(args))
    logits(model, some_tokens(7))
    assert len(calls) == 3
    assert not compiled_steps
    handle.remove()
    logits(model, some_tokens(7))
    assert len(calls) == 3
    assert len(compiled_steps) == 4


def test_changed_layers_are_noticed(model, compiled_steps):
    tokens = some_tokens(9)
    logits(model, tokens)
    before = len(compiled_steps)
    layer = model.model.layers[1].self_attn.q_proj
    layer.scales = layer.scales * 2
    result, _ = logits(model, tokens)
    assert len(compiled_steps) == 2 * before
    torch.testing.assert_close(result, whole(model, tokens), **TOLERANCE)
    layer.backend = "torch"
    result, _ = logits(model, tokens)
    assert len(compiled_steps) == 2 * before
    torch.testing.assert_close(result, whole(model, tokens), **TOLERANCE)
    model.model.layers[0].mlp.down_proj = torch.nn.Linear(96, 64)
    logits(model, tokens)
    assert len(compiled_steps) == 2 * before


def test_hidden_states_are_recorded(model):
    _, cache = logits(model, PROMPT)
    with torch.no_grad():
        one = model(input_ids=PROMPT[:, :1], **{CACHE: cache}, output_hidden_states=True)
        tokens = torch.cat([PROMPT, PROMPT[:, :1]], 1)
        exact = model(input_ids=tokens, use_cache=False, output_hidden_states=True)
    assert len(one.hidden_states) == len(exact.hidden_states) == 3
    for states, expected in zip(one.hidden_states, exact.hidden_states, strict=True):
        torch.testing.assert_close(states, expected[:, -1:], **TOLERANCE)


def test_models_are_copied_and_pickled(model, compiled_steps):
    tokens = some_tokens(9)
    result, _ = logits(model, tokens)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        before = len(compiled_steps)
        assert torch.equal(logits(twin, tokens)[0], result)
        assert len(compiled_steps) == before + 8


def test_what_a_cpu_does_not_take_is_not_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_library, "available", lambda: False)
    source = make_model(tmp_path / "model", bloom_config())
    config = QuantConfig(bits=4, group_size=32, method="rtn")
    gptq.quantize(source, None, config, save_dir=tmp_path / "packed", device="cpu")
    assert type(loaded(tmp_path / "packed")) is modeling_bloom.BloomForCausalLM


def test_without_compiled_code_nothing_is_changed(folder, monkeypatch):
    monkeypatch.setattr(library, "compiled", lambda: ())
    model = loaded(folder)
    assert not isinstance(model, compiled_decode.LlamaForCausalLM)
