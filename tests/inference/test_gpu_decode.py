"""Single tokens through all blocks by CUDA kernels, under emulation and on a GPU, against a forward
of all tokens in float32."""

import inspect

import pytest
import torch
from conftest import SIZES, make_model
from transformers import AutoConfig, DynamicCache, StaticCache
from transformers.models.bloom import modeling_bloom
from transformers.models.llama import modeling_llama

import gptq
from gptq import QuantConfig
from gptq.inference import compiled_decode, decoding
from gptq.inference.architectures import CODES
from gptq.inference.cuda_graph import stepper
from gptq.nn import QuantLinear
from quant_cuda.cuda import decoder_block, operator
from quant_cuda.cuda import library as gpu_library

# transformers 5.24 has renamed it, and warns of the old name.
CACHE = (
    "cache"
    if "cache" in inspect.signature(modeling_llama.LlamaForCausalLM.forward).parameters
    else "past_key_values"
)
TOLERANCE = {"rtol": 2e-2, "atol": 2e-2}
WINDOWS = {"sliding_window": 12, "use_sliding_window": True, "max_window_layers": 1}
KINDS = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 12},
    "qwen2": {"num_key_value_heads": 1, **WINDOWS},
    "qwen3": {"bits": 8},
    "bloom": {},
}
NARROW = {**KINDS["llama"], "intermediate_size": 64}
PREFIX = 5


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A packed model of each kind."""
    made = {}
    for name, changes in {**KINDS, "narrow": NARROW}.items():
        kind = "llama" if name == "narrow" else name
        base = tmp_path_factory.mktemp(kind)
        bits = changes.get("bits", 4)
        rest = {key: value for key, value in changes.items() if key != "bits"}
        sizes = {**SIZES, "head_dim": 32, "hidden_size": 128, **rest}
        if kind == "bloom":
            sizes = {"vocab_size": 320, "hidden_size": 128, "n_layer": 2, "n_head": 4}
        config = AutoConfig.for_model(kind, **sizes)
        source = make_model(base / "model", config)
        config = QuantConfig(bits=bits, group_size=32, method="rtn")
        gptq.quantize(source, None, config, save_dir=base / "packed", device="cpu")
        made[name] = base / "packed"
    return made


@pytest.fixture
def calls(kernels, monkeypatch):
    """Blocks and tokens that went through the kernels."""
    made, run = [], decoder_block.run

    def counted(blocks, *args, **kwargs):
        made.extend(blocks)
        return run(blocks, *args, **kwargs)

    monkeypatch.setattr(decoder_block, "run", counted)
    if kernels.device == "cpu":
        monkeypatch.setattr(gpu_library, "available", lambda: True)
        monkeypatch.setattr(decoder_block, "current", lambda _: kernels.launch(8))
    return made


def exact(folder, tokens):
    """Logits of all tokens, float32."""
    model, _ = gptq.load(folder, device="cpu", dtype="float32")
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


def some_tokens(rows, count):
    return torch.randint(2, 300, (rows, count), generator=torch.Generator().manual_seed(4))


@torch.no_grad()
def begun(folder, kernels, tokens, cache, dtype="float16"):
    """A model that has read the first tokens, by transformers' modules, into the cache, and whose
    weights are as the kernels read them."""
    model, _ = gptq.load(folder, device=kernels.device, dtype=dtype)
    first = tokens[:, :PREFIX].to(kernels.device)
    # BLOOM of transformers 5.17 would take the tokens so far for the whole cache.
    room = cache.layers[0].max_cache_len if isinstance(cache, StaticCache) else PREFIX
    mask = torch.ones((len(first), room), device=first.device) if "bloom" in str(folder) else None
    model(input_ids=first, attention_mask=mask, **{CACHE: cache}, use_cache=True)
    for linear in model.modules():
        if isinstance(linear, QuantLinear) and kernels.device == "cpu":
            linear._prepared = operator.prepare(linear.packed())
    return model


@torch.no_grad()
def steps(model, tokens, cache, **arguments):
    """Logits of the tokens after the first, one at a time."""
    rest = tokens[:, PREFIX:].to(model.device).split(1, 1)
    results = [
        model(input_ids=token, **{CACHE: cache}, use_cache=True, **arguments).logits
        for token in rest
    ]
    return torch.cat(results, 1).float().cpu()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_growing_caches(kind, dtype, folders, kernels, calls):
    tokens, cache = some_tokens(1, 30), DynamicCache()
    model = begun(folders[kind], kernels, tokens, cache, dtype)
    result = steps(model, tokens, cache)
    assert len(calls) == 25 * 2
    assert cache.get_seq_length() == 30
    wanted = exact(folders[kind], tokens)[:, PREFIX:]
    factor = 8 if dtype == "bfloat16" else 1
    torch.testing.assert_close(result, wanted, **{k: v * factor for k, v in TOLERANCE.items()})


@pytest.mark.parametrize("kind", ["llama", "bloom"])
@pytest.mark.parametrize("rows", [2, 8])
def test_several_sequences(rows, kind, folders, kernels, calls):
    tokens, cache = some_tokens(rows, 9), DynamicCache()
    model = begun(folders[kind], kernels, tokens, cache)
    result = steps(model, tokens, cache)
    assert len(calls) == 4 * 2
    torch.testing.assert_close(result, exact(folders[kind], tokens)[:, PREFIX:], **TOLERANCE)


def test_a_cache_of_fixed_size(folders, kernels, calls):
    tokens = some_tokens(2, 12)
    for kind, count in (("llama", 14), ("qwen3", 14), ("bloom", 14), ("mistral", 0)):
        calls.clear()
        folder = folders[kind]
        config = gptq.load(folder, device="cpu", dtype="float32")[0].config
        cache = StaticCache(config=config, max_cache_len=20)
        model = begun(folder, kernels, tokens, cache)
        if count == 0 and kernels.device == "cpu":
            continue  # modules do not run on what the kernels read
        result = steps(model, tokens, cache)
        assert len(calls) == count
        assert int(cache.get_seq_length()) == 12
        torch.testing.assert_close(result, exact(folder, tokens)[:, PREFIX:], **TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.gpu
def test_a_captured_step_on_a_gpu(kind, folders, monkeypatch):
    run, calls = decoder_block.run, []
    monkeypatch.setattr(decoder_block, "run", lambda *args: calls.append(args) or run(*args))
    tokens = some_tokens(1, 30)
    model, _ = gptq.load(folders[kind], device="cuda", dtype="float16")
    step = stepper(model, 30)
    got = [step(token.cuda()).clone() for token in tokens.split(1, 1)]
    result = torch.cat(got, 1).float().cpu()
    torch.testing.assert_close(result, exact(folders[kind], tokens), **TOLERANCE)
    # A warm-up step and the captured one; a cache of fixed size with windows is left to modules.
    assert len(calls) == (0 if kind in ("mistral", "qwen2") else 2)


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("kind", ["llama", "bloom"])
def test_generate(kind, captured, folders, calls, kernels):
    if kernels.device == "cpu":
        pytest.skip("generate begins with transformers' modules, which need the other layout")
    model, _ = gptq.load(folders[kind], device="cuda", dtype="float16")
    prompt = some_tokens(1, 6).cuda()
    arguments = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None}
    more = decoding.arguments(model)
    assert more != {}
    ids = model.generate(prompt, **arguments, **(more if captured else {}))
    # A warm-up step and the captured one, of two blocks each; the first step is by modules.
    assert len(calls) == (2 if captured else 29) * 2
    assert ids.shape == (1, 36)
    # Greedy tokens may differ where two logits are nearly equal; the scores of ours do not.
    logits = exact(folders[kind], ids.cpu())[0, 5:-1]
    chosen = logits.gather(1, ids[0, 6:, None].cpu())[:, 0]
    assert float((logits.max(1).values - chosen).max()) < 0.05


@pytest.mark.parametrize(
    ("kind", "change", "takes"),
    [
        ("llama", "", True),
        ("bloom", "", True),
        ("mistral", "", False),
        ("llama", "lm_head", False),
        ("llama", "model.norm", False),
        ("bloom", "transformer.word_embeddings_layernorm", False),
    ],
)
def test_what_can_be_captured(kind, change, takes, folders, kernels, calls):
    model = begun(folders[kind], kernels, some_tokens(1, 6), DynamicCache())
    if change:
        model.get_submodule(change).register_forward_hook(lambda *_: None)
    assert compiled_decode.takes_always(model) == takes


BLOOM_CHANGES = {
    "residual": ("transformer.h.1", "apply_residual_connection_post_layernorm", True),
    "slices": ("transformer.h.1.mlp", "slow_but_exact", True),
    "beta": ("transformer.h.0.self_attention", "beta", 0.5),
    "heads": ("transformer.h.1.self_attention", "num_heads", 2),
    "dropout": ("transformer.h.0.self_attention.attention_dropout", "training", True),
}


@pytest.mark.parametrize(
    "change", ["nothing", "hook", "function", "mask", "attention", *BLOOM_CHANGES]
)
def test_what_of_bloom_is_left_to_transformers(change, folders, kernels, calls, monkeypatch):
    tokens, cache = some_tokens(1, 7), DynamicCache()
    model = begun(folders["bloom"], kernels, tokens, cache)
    code = CODES[type(model).__bases__[0]]

    def step(position, **arguments):
        token = tokens[:, position : position + 1].to(model.device)
        return compiled_decode._one_token(model, code, token, **{CACHE: cache}, **arguments)

    with torch.no_grad():
        assert compiled_decode.takes(model)
        assert step(PREFIX) is not None
        arguments = {}
        if change in BLOOM_CHANGES:
            path, name, value = BLOOM_CHANGES[change]
            setattr(model.get_submodule(path), name, value)
        if change == "hook":
            model.transformer.h[1].mlp.gelu_impl.register_forward_hook(lambda *_: None)
        if change == "function":
            monkeypatch.setattr(modeling_bloom, "build_alibi_tensor", lambda *_: None)
        if change == "mask":
            arguments["attention_mask"] = torch.tensor([[0, *[1] * 6]], device=model.device)
        if change == "attention":
            model.config._attn_implementation = "sdpa"
        is_left = step(PREFIX + 1, **arguments) is None
        assert compiled_decode.takes(model) == (change in ("nothing", "mask"))
    assert is_left == (change != "nothing")
    assert len(calls) == (4 if change == "nothing" else 2)


@pytest.mark.parametrize(
    "change", ["nothing", "hook", "mask", "grad", "positions", "nine", "shape", "scale"]
)
def test_what_is_left_to_transformers(change, folders, kernels, calls):
    rows = {"nine": 9, "positions": 2}.get(change, 1)
    tokens, cache = some_tokens(rows, 6), DynamicCache()
    model = begun(folders["llama"], kernels, tokens, cache)
    arguments = {
        "mask": {"attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1]], device=model.device)},
        "positions": {"position_ids": torch.tensor([[5], [4]], device=model.device)},
    }.get(change, {})
    if change == "shape":
        # As a pruned model may have them: one layer is narrower.
        narrow = gptq.load(folders["narrow"], device=model.device, dtype="float16")[0]
        layer = narrow.model.layers[1]
        layer.self_attn.config = model.config
        for linear in layer.modules():
            if isinstance(linear, QuantLinear) and kernels.device == "cpu":
                linear._prepared = operator.prepare(linear.packed())
        model.model.layers[1] = layer
    if change == "scale":
        model.model.layers[1].self_attn.scaling *= 2
    if change == "hook":
        model.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    with torch.set_grad_enabled(change == "grad"):
        token = tokens[:, PREFIX:].to(model.device)
        code = CODES[type(model).__bases__[0]]
        # Not by the model's forward: modules on a CPU cannot run what the kernels read.
        made = compiled_decode._one_token(model, code, token, **{CACHE: cache}, **arguments)
    assert (made is None) == (change != "nothing")
    assert len(calls) == (2 if change == "nothing" else 0)
