"""Every architecture of SPECS against transformers' own forward, on tiny random models."""

from typing import Any

import pytest
import torch
from conftest import SIZES as TINY
from conftest import make_model
from transformers import AutoConfig, AutoModelForCausalLM, StaticCache
from transformers.modeling_outputs import BaseModelOutputWithPast

import gptq
import gptq.pipeline.blocks
from gptq import QuantConfig, api, convert, hf
from gptq.api import open_weights, perplexity
from gptq.blockwise.logits import head_of_tokens, output_layers
from gptq.blockwise.rotation import rotated
from gptq.cli.run import main
from gptq.errors import UserError
from gptq.inference.compiled_decode import CACHE_NAME
from gptq.models import LLAMA, SPECS
from gptq.pipeline.blocks import quantize_blocks
from gptq.pipeline.journal import Journal

# Whether the head is tied is what each architecture has it.
SIZES = {k: it for k, it in TINY.items() if k != "tie_word_embeddings"} | {"pad_token_id": 1}
WINDOW = {"sliding_window": 8}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, **WINDOW}
# What makes a tiny model show the quirks of its architecture.
QUIRKS: dict[str, dict[str, Any]] = {
    "mistral": WINDOW,
    "qwen2": {**WINDOW, "use_sliding_window": True, "max_window_layers": 1},
    "qwen3": {"head_dim": 32},
    "gemma": {"head_dim": 16},
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "olmo": {"clip_qkv": 1.0},
    "olmo3": WINDOW,
    "exaone4": WINDOW,
    "granite": {"residual_multiplier": 0.5, "logits_scaling": 3.0, "embedding_multiplier": 2.0},
    "stablelm": {"use_qkv_bias": True},
    "glm": {"head_dim": 16},
    "glm4": {"head_dim": 16},
    "hunyuan_v1_dense": {"head_dim": 16},
    "helium": {"head_dim": 16},
    "seed_oss": {"head_dim": 16},
}
# Their norms subtract a mean, multiply by 1 + weight, have no weight, or follow a branch.
NOT_ROTATED = {"bloom", "exaone4", "gemma", "gemma2", "gemma3_text", "glm4", "nemotron", "olmo"}
NOT_ROTATED |= {"olmo2", "olmo3", "stablelm", "starcoder2"}
BLOOM = {"n_layer": 2, "n_head": 4, "hidden_size": 64, "vocab_size": 320}


@pytest.fixture(params=SPECS)
def folder(request, tmp_path):
    name = request.param
    sizes = BLOOM if name == "bloom" else {**SIZES, **QUIRKS.get(name, {})}
    return make_model(tmp_path / name, AutoConfig.for_model(name, **sizes))


def windows(count=3, length=40):
    return torch.randint(2, 300, (count, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def own_perplexity(model):
    losses = [model(window[None], labels=window[None]).loss for window in windows()]
    return torch.stack(losses).mean().exp().item()


def test_it_is_evaluated_quantized_and_loaded(folder, text_file, tmp_path):
    full = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert type(full).__name__ == SPECS[folder.name].architecture
    found = perplexity(open_weights(folder, device="cpu"), windows())
    assert found == pytest.approx(own_perplexity(full), rel=1e-4)
    path, settings = tmp_path / "m.pt", {"nsamples": 3, "seqlen": 32, "device": "cpu"}
    config = gptq.QuantConfig(bits=8, group_size=32)
    report = gptq.quantize(folder, text_file, config, save=path, dtype="float32", **settings)
    assert len(report.layers) == 2 * len(SPECS[folder.name].linears)
    model, _ = gptq.load(folder, path, device="cpu")
    packed = [m for m in model.modules() if isinstance(m, gptq.QuantLinear)]
    assert len(packed) >= len(report.layers)
    # The head is packed in files, but where its embedding is scaled.
    block_by_block = perplexity(open_weights(folder, path, device="cpu"), windows())
    assert own_perplexity(model) == pytest.approx(block_by_block, rel=1e-4)
    assert own_perplexity(model) == pytest.approx(found, rel=0.03)


@torch.no_grad()
def test_logits_of_some_tokens_are_those_of_all(folder):
    """What an architecture does to its logits, scaling or capping, it does to these too."""
    full = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model = api.open_full(folder, "cpu", "float32")
    states = torch.randn((2, 5, 64), generator=torch.Generator().manual_seed(2))
    tokens = torch.randint(0, 320, (2, 5, 7), generator=torch.Generator().manual_seed(3))
    with output_layers(model) as logits:
        expected = logits(states)
        with head_of_tokens(model.module.get_submodule(model.spec.head), tokens):
            found = logits(states)
        assert torch.equal(logits(states), expected)
    torch.testing.assert_close(found, expected.gather(-1, tokens))
    last = getattr(full, full.base_model_prefix)
    norm = last.ln_f if folder.name == "bloom" else last.norm
    last.forward = lambda *_, **__: BaseModelOutputWithPast(last_hidden_state=norm(states))
    theirs = full(input_ids=tokens[..., 0]).logits
    torch.testing.assert_close(expected, theirs)


@torch.no_grad()
def test_it_is_resumed_read_by_transformers_and_decoded(folder, text_file, tmp_path):
    """The decoding is with a cache of fixed size, which a GPU's graph records."""
    config = gptq.QuantConfig(bits=4, group_size=32)
    settings = {"nsamples": 3, "seqlen": 32, "device": "cpu", "dtype": "float32"}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    gptq.quantize(folder, text_file, config, save_dir=whole, **settings)

    def stop(layer, _total):
        if layer.block == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gptq.quantize(folder, text_file, config, save_dir=broken, progress=stop, **settings)
    gptq.quantize(folder, text_file, config, save_dir=broken, resume=True, **settings)
    name = "model.safetensors"
    assert (broken / name).read_bytes() == (whole / name).read_bytes()

    hf.register()
    model, _ = gptq.load(whole, device="cpu", dtype="float32")
    tokens = windows(1, 20)
    expected = model(tokens).logits
    theirs = AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32)
    assert any(isinstance(module, gptq.QuantLinear) for module in theirs.modules())
    torch.testing.assert_close(theirs(tokens).logits, expected, rtol=1e-4, atol=1e-4)
    cache = StaticCache(config=model.config, max_cache_len=24)
    mask = torch.ones(1, 24, dtype=torch.long) if folder.name == "bloom" else None
    steps = [
        model(input_ids=token, attention_mask=mask, use_cache=True, **{CACHE_NAME: cache}).logits
        for token in tokens.split(1, 1)
    ]
    torch.testing.assert_close(torch.cat(steps, 1), expected, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("name", ["gptq_v2", "compressed-tensors", "awq", "mlx"])
def test_it_is_written_in_every_format_of_folders(name, folder, tmp_path, capsys):
    config = gptq.QuantConfig(bits=4, group_size=32, method="rtn", sym=True)
    first, other = tmp_path / "gptq", tmp_path / "other"
    gptq.quantize(folder, None, config, save_dir=first, device="cpu", dtype="float32")
    code = convert.main([str(first), str(other), "--format", name])
    if (folder.name, name) == ("bloom", "mlx"):
        assert code == 2
        assert "which mlx-lm does not run" in capsys.readouterr().err
        return
    assert code == 0
    tokens = windows(1, 20)
    results = []
    for packed in (first, other):
        model, _ = gptq.load(packed, device="cpu", dtype="float32")
        with torch.no_grad():
            results.append(model(tokens).logits)
    assert torch.equal(results[0], results[1])


def test_the_script_takes_all_of_its_kind(llama_dir, bloom_dir, text_file, tmp_path, capsys):
    sizes = {**SIZES, **QUIRKS["qwen3"]}
    qwen = make_model(tmp_path / "qwen3", AutoConfig.for_model("qwen3", **sizes))
    flags = ["--wbits", "4", "--groupsize", "32", "--nearest", "--save", str(tmp_path / "m.pt")]
    assert main(LLAMA, [str(qwen), *flags]) == 0
    assert main(SPECS["bloom"], [str(qwen), *flags]) == 2
    assert "is a qwen3 model; use llama.py" in capsys.readouterr().err
    assert main(LLAMA, [str(bloom_dir), *flags]) == 2
    assert "is a bloom model; use bloom.py" in capsys.readouterr().err


@pytest.mark.parametrize("true_sequential", [True, False])
def test_errors_are_fed_back_towards_the_full_models_own_hidden_states(
    folder, true_sequential, tmp_path, monkeypatch
):
    seen = []
    original = gptq.pipeline.blocks.advance_past

    def watched(activations, block, number):
        if number == 0:
            seen.append(activations.hidden.get(0))
        return original(activations, block, number)

    monkeypatch.setattr(gptq.pipeline.blocks, "advance_past", watched)
    tokens = windows()
    with torch.no_grad():
        whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        expected = whole(tokens, output_hidden_states=True).hidden_states
    config = QuantConfig(group_size=32, true_sequential=true_sequential)
    (tmp_path / "journal").mkdir()
    journal = Journal(tmp_path / "journal")
    model = gptq.api.open_full(folder, "cpu", "float32")
    for again in range(2):
        # The second time every block comes from the journal.
        assert len(list(quantize_blocks(model, tokens, config, journal))) > again
        assert len(seen) == 2
        for found, own in zip(seen, expected, strict=False):
            assert len(found) == 1
            torch.testing.assert_close(found[0], own, rtol=1e-4, atol=1e-4)
        seen.clear()


@torch.no_grad()
def test_rotated_hidden_states_give_the_same_logits(folder, tmp_path):
    full = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for number, (name, parameter) in enumerate(full.named_parameters()):
        if "norm" in name or name.endswith("bias"):
            generator = torch.Generator().manual_seed(number)
            parameter.add_(0.5 * torch.rand(parameter.shape, generator=generator))
    changed = tmp_path / "changed"
    full.save_pretrained(changed)
    model = gptq.api.open_full(changed, "cpu", "float32")
    if folder.name in NOT_ROTATED:
        with pytest.raises(UserError, match=f"hidden states of '{folder.name}' models cannot be"):
            rotated(model)
        return
    turned = rotated(model).source
    other = AutoModelForCausalLM.from_config(turned.config, dtype=torch.float32).eval()
    assert not turned.config.tie_word_embeddings
    missing, unexpected = other.load_state_dict(dict(turned.tensors), strict=False)
    assert (missing, unexpected) == ([], [])
    tokens = windows()
    torch.testing.assert_close(other(tokens).logits, full(tokens).logits, rtol=1e-3, atol=1e-4)
    hidden, own = (it(tokens, output_hidden_states=True).hidden_states[1] for it in (other, full))
    assert not torch.allclose(hidden, own, atol=1e-2)
    assert torch.allclose(hidden.norm(dim=-1), own.norm(dim=-1), rtol=1e-4)
