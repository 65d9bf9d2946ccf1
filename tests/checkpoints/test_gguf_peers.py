"""Our .gguf files in llama.cpp itself, in an environment of its own.

Run with `-m peers` and LLAMA_CPP_PYTHON, the path of that environment's Python (tried with
llama-cpp-python 0.3.36). llama.cpp rounds activations to 8 bits in blocks of 32.
"""

import json
import os
import subprocess

import pytest
import torch
from conftest import ROOT, bloom_config, llama_config, make_model
from helpers.gguf_models import (
    GEMMA_PIECES,
    QUIRKS,
    ROPES,
    SCALED,
    make_tiny,
    sentencepiece_model,
    with_scaled_positions,
    write_dense,
)
from helpers.mixed import mixed_widths
from transformers import AutoModelForCausalLM

import gptq
from gptq import QuantConfig
from gptq.blockwise.source import open_model
from gptq.checkpoints import gguf_tokenizer
from gptq.config import Width
from gptq.models import BLOOM, LLAMA

pytestmark = pytest.mark.peers

TOKENS = [number * 7 % 300 for number in range(100)]
TEXTS = ["the cat sat on a mat", "A  dog, 12345 dogs\nand naïve ones", "rain" * 9]


def in_llama_cpp(file, texts=()) -> dict:
    python = os.environ.get("LLAMA_CPP_PYTHON")
    assert python, "LLAMA_CPP_PYTHON must name the Python of an environment with llama-cpp-python"
    done = subprocess.run(
        [python, str(ROOT / "tests" / "helpers" / "run_llama_cpp.py")],
        input=json.dumps({"file": str(file), "tokens": TOKENS, "texts": list(texts)}),
        env={**os.environ, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@torch.no_grad()
def distance(model, answer) -> float:
    """Root mean square of the difference, in standard deviations; about 1 for a wrong order of rows
    or position."""
    expected = model(torch.tensor([TOKENS]), use_cache=False).logits[0]
    difference = (torch.tensor(answer["logits"]) - expected).square().mean().sqrt()
    return float(difference / expected.std())


def same_logits(file, answer) -> None:
    model, _ = gptq.load(file)
    assert distance(model, answer) < 0.05


@pytest.mark.parametrize("arch", ["llama", "tied", "biases", "bloom"])
@pytest.mark.parametrize(("bits", "sym"), [(4, True), (4, False), (8, True)])
def test_every_type(arch, bits, sym, text_file, tmp_path):
    changes = {
        "llama": {"hidden_size": 128},
        "tied": {"tie_word_embeddings": True},
        "biases": {"attention_bias": True, "mlp_bias": True},
    }
    config = bloom_config() if arch == "bloom" else llama_config(**changes[arch])
    folder = make_model(tmp_path / "model", config)
    settings = QuantConfig(bits=bits, sym=sym, group_size=32)
    file = tmp_path / "m.gguf"
    gptq.quantize(folder, text_file, settings, save=file, nsamples=4, seqlen=32)
    answer = in_llama_cpp(file, TEXTS)
    same_logits(file, answer)
    tokenizer = open_model(folder).tokenizer()
    assert answer["ids"] == [tokenizer(text)["input_ids"] for text in TEXTS]


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_an_embedding_and_a_head_of_4_bits(tied, sym, text_file, tmp_path):
    folder = make_model(tmp_path / "model", llama_config(tie_word_embeddings=tied))
    settings = QuantConfig(sym=sym, group_size=32, embedding_bits=4)
    file = tmp_path / "m.gguf"
    gptq.quantize(folder, text_file, settings, save=file, nsamples=4, seqlen=32)
    same_logits(file, in_llama_cpp(file))


@pytest.mark.parametrize("spec", [LLAMA, BLOOM], ids=lambda spec: spec.model_type)
def test_layers_of_different_widths(spec, text_file, tmp_path):
    config = {"llama": llama_config, "bloom": bloom_config}[spec.model_type](hidden_size=128)
    folder = make_model(tmp_path / "model", config)
    widths = mixed_widths(spec, widths=(Width(4, 32), Width(8, 32), Width(4, -1)))
    file, run = tmp_path / "m.gguf", {"nsamples": 4, "seqlen": 32}
    gptq.quantize(folder, text_file, QuantConfig(sym=True), widths=widths, save=file, **run)
    same_logits(file, in_llama_cpp(file))


@pytest.mark.parametrize("arch", QUIRKS)
def test_other_architectures(arch, tmp_path):
    """Of full models, whose only error is that of 16-bit activations."""
    folder = make_tiny(tmp_path / "model", arch)
    write_dense(folder, tmp_path / "m.gguf")
    full = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert distance(full, in_llama_cpp(tmp_path / "m.gguf")) < 0.005


# Rows in another order, fused layers, an embedding that is not packed.
@pytest.mark.parametrize("arch", ["mistral", "qwen3", "granite", "phi3", "gemma3_text"])
def test_packed_layers_of_other_architectures(arch, tmp_path, monkeypatch):
    # An architecture's own splitting is known by its vocabulary, which the test's is not.
    monkeypatch.setattr(gguf_tokenizer, "_splitting", lambda *_: "gpt-2")
    folder = make_tiny(tmp_path / "model", arch)
    settings = QuantConfig(sym=True, method="rtn", group_size=32)
    gptq.quantize(folder, None, settings, save=tmp_path / "m.gguf")
    same_logits(tmp_path / "m.gguf", in_llama_cpp(tmp_path / "m.gguf"))


@pytest.mark.parametrize("kind", ROPES)
def test_scaled_positions(kind, tmp_path):
    rope = {"rope_type": kind, "rope_theta": 500.0, **ROPES[kind]}
    folder = make_model(tmp_path / "model", llama_config(rope_parameters=rope))
    settings = QuantConfig(bits=8, sym=True, method="rtn", group_size=32)
    gptq.quantize(folder, None, settings, save=tmp_path / "m.gguf")
    same_logits(tmp_path / "m.gguf", in_llama_cpp(tmp_path / "m.gguf"))


@pytest.mark.parametrize(("arch", "kind"), SCALED)
def test_scaled_positions_of_other_architectures(arch, kind, tmp_path):
    folder = make_tiny(tmp_path / "model", arch, with_scaled_positions(arch, kind))
    write_dense(folder, tmp_path / "m.gguf")
    full = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert distance(full, in_llama_cpp(tmp_path / "m.gguf")) < 0.005


@pytest.mark.parametrize("with_model_file", [True, False])
@pytest.mark.parametrize(("arch", "training"), [("llama", {}), ("gemma2", GEMMA_PIECES)])
def test_sentencepiece(arch, training, with_model_file, tmp_path):
    folder = sentencepiece_model(tmp_path, arch, **training)
    tokenizer = open_model(folder).tokenizer()
    if not with_model_file:
        tokenizer.save_pretrained(folder)
        (folder / "tokenizer.model").unlink()
    settings = QuantConfig(sym=True, method="rtn", group_size=32)
    gptq.quantize(folder, None, settings, save=tmp_path / "m.gguf")
    answer = in_llama_cpp(tmp_path / "m.gguf", TEXTS)
    assert answer["ids"] == [tokenizer(text)["input_ids"] for text in TEXTS]
