"""Models whose layers have different widths, at work: one token at a time, and in transformers."""

import json

import pytest
import torch
from conftest import bloom_config, llama_config, make_model
from helpers.mixed import mixed_widths
from helpers.old_tools import PROBE, write
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import gptq
from gptq import QuantConfig, QuantLinear, hf
from gptq.config import Width
from gptq.inference.cuda_graph import stepper
from gptq.inference.generate import benchmark
from gptq.models import BLOOM, LLAMA
from quant_cuda.cpu import library

RUN = {"nsamples": 4, "seqlen": 32}
TOLERANCE = {"rtol": 2e-3, "atol": 2e-3}  # activations are rounded to 16 bits on either way
STEP = {"rtol": 2e-2, "atol": 2e-2}
TOKENS = torch.randint(2, 300, (1, 40), generator=torch.Generator().manual_seed(4))
# Of every layer its own, so that no two that share an input are alike.
UNLIKE = {
    "q_proj": 2,
    "k_proj": 3,
    "v_proj": 8,
    "o_proj": 4,
    "gate_proj": 3,
    "up_proj": 2,
    "down_proj": 8,
}


def widths_of(model):
    return {
        name: Width(it.bits, it.group_size)
        for name, it in model.named_modules()
        if isinstance(it, QuantLinear) and name != "lm_head"
    }


@torch.no_grad()
def whole(model, tokens=TOKENS):
    return model(input_ids=tokens, use_cache=False).logits


@pytest.fixture(scope="module")
def folders(text_file, tmp_path_factory):
    """LLaMA's folders by their format, "gptq_v2" with scattered groups; and one of BLOOM."""
    base = tmp_path_factory.mktemp("mixed")
    llama_dir = make_model(base / "llama", llama_config(hidden_size=128, intermediate_size=256))
    bloom_dir = make_model(base / "model", bloom_config(hidden_size=128))
    config, widths = QuantConfig(refine=1), mixed_widths(LLAMA)
    cases = {
        "compressed-tensors": (llama_dir, config, widths),
        "gptq": (llama_dir, QuantConfig(sym=True, refine=1), widths),
        "gptq_v2": (llama_dir, QuantConfig(order="act", refine=1), widths),
        "bloom": (bloom_dir, config, mixed_widths(BLOOM)),
    }
    for name, (model, settings, table) in cases.items():
        form = None if name == "bloom" else name
        out = {"save_dir": base / name, "format": form}
        gptq.quantize(model, text_file, settings, widths=table, **out, **RUN)
    return {name: base / name for name in cases}


def one_by_one(model):
    step = stepper(model, TOKENS.shape[1])
    return torch.cat([step(token).clone() for token in TOKENS.split(1, 1)], 1)


@pytest.mark.skipif(not library.compiled(), reason="the CPU code was not built")
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("name", ["compressed-tensors", "gptq", "gptq_v2"])
def test_compiled_blocks(name, int8, folders, compiled_steps):
    model, _ = gptq.load(folders[name], device="cpu", dtype="float32", int8_activations=int8)
    expected = whole(model)
    found = one_by_one(model)
    assert len(compiled_steps) == 2 * TOKENS.shape[1]
    # Where an input lies between two of 255 steps, a difference in the last bit is one step. Few
    # inputs do.
    torch.testing.assert_close(found, expected, **(STEP if int8 else TOLERANCE))
    assert torch.isclose(found, expected, **TOLERANCE).double().mean() > 0.98
    dense, _ = gptq.load(folders[name], device="cpu", dtype="float32")
    hf.PackedQuantizer._dequantize(None, dense, torch.float32)
    error = (found - whole(dense)).abs().max() / found.std()
    assert error < (0.2 if int8 else 5e-3)


@pytest.mark.skipif(not library.compiled(), reason="the CPU code was not built")
@pytest.mark.parametrize("size", [16, 32, -1])
def test_compiled_blocks_whose_every_layer_is_unlike(size, llama_dir, tmp_path, compiled_steps):
    """Files of other tools can have layers of one input at different widths."""
    made = write(llama_dir, "v2", 4, size, other=UNLIKE)
    rules = {f"+:.*{name}": {"bits": bits} for name, bits in UNLIKE.items()}
    said = {"bits": 4, "group_size": size, "checkpoint_format": "gptq_v2", "dynamic": rules}
    file = tmp_path / "m.safetensors"
    save_file(made.state, file, {"quantize_config": json.dumps(said)})
    model, _ = gptq.load(llama_dir, file, device="cpu", dtype="float32")
    torch.testing.assert_close(whole(model, PROBE), made.logits, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(one_by_one(model), whole(model), **TOLERANCE)
    assert len(compiled_steps) == 2 * TOKENS.shape[1]


def test_module_by_module(folders):
    """BLOOM has no compiled blocks."""
    model, _ = gptq.load(folders["bloom"], device="cpu", dtype="float32")
    assert widths_of(model) == mixed_widths(BLOOM)
    torch.testing.assert_close(one_by_one(model), whole(model), **TOLERANCE)


@pytest.mark.parametrize("name", ["compressed-tensors", "gptq_v2", "bloom"])
@pytest.mark.gpu
def test_cuda_graph(name, folders):
    model, _ = gptq.load(folders[name], device="cuda", dtype="float16")
    expected = whole(model, TOKENS.cuda())
    step = stepper(model, TOKENS.shape[1])
    found = torch.cat([step(token.cuda()).clone() for token in TOKENS.split(1, 1)], 1)
    assert (found - expected).abs().max() / expected.float().std() < 0.05


@pytest.mark.parametrize("name", ["compressed-tensors", "bloom"])
def test_benchmark_checks(name, folders):
    model, _ = gptq.load(folders[name], device="cpu", dtype="float32")
    result = benchmark(model, TOKENS[0], check=True)
    with torch.no_grad():
        expected = float(model(TOKENS, labels=TOKENS, use_cache=False).loss.exp())
    assert result.perplexity == pytest.approx(expected, rel=5e-3)


@pytest.mark.parametrize("name", ["compressed-tensors", "gptq", "gptq_v2", "bloom"])
def test_transformers_reads_and_saves_them(name, folders, tmp_path):
    hf.register()
    ours, _ = gptq.load(folders[name], device="cpu", dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(folders[name], dtype=torch.float32).eval()
    assert widths_of(model) == widths_of(ours) == mixed_widths(BLOOM if name == "bloom" else LLAMA)
    assert torch.equal(whole(model), whole(ours))
    model.save_pretrained(tmp_path / "transformers")
    ours.save_pretrained(tmp_path / "ours")
    for folder in ("transformers", "ours"):
        again = AutoModelForCausalLM.from_pretrained(tmp_path / folder, dtype=torch.float32).eval()
        assert widths_of(again) == widths_of(ours), folder
        assert torch.equal(whole(again), whole(ours))


def test_adapters(folders):
    pytest.importorskip("peft")
    from peft import LoraConfig, get_peft_model

    model, _ = gptq.load(folders["compressed-tensors"], device="cpu", dtype="float32")
    before = whole(model)
    targets = ["q_proj", "down_proj"]
    adapted = get_peft_model(model, hf.lora(LoraConfig(r=4, target_modules=targets)))
    torch.testing.assert_close(whole(adapted), before, rtol=1e-4, atol=1e-4)
    adapted.train()
    adapted(input_ids=TOKENS, labels=TOKENS).loss.backward()
    gradients = [p.grad for n, p in adapted.named_parameters() if "lora_B" in n]
    assert len(gradients) == 4
    assert all(bool(gradient.any()) for gradient in gradients)
