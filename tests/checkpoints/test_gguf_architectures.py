"""Architectures like LLaMA as .gguf files: written, and read by us and by transformers."""

import gguf
import pytest
import torch
from helpers.gguf_models import (
    QUIRKS,
    SCALED,
    close,
    dense,
    logits,
    make_tiny,
    needs_tokenizer,
    with_scaled_positions,
    write_dense,
)
from transformers import AutoModelForCausalLM

import gptq
from gptq import QuantConfig, convert
from gptq.blockwise.gguf_config import gguf_config
from gptq.blockwise.gguf_model import open_gguf
from gptq.blockwise.source import open_model
from gptq.checkpoints import gguf_tokenizer
from gptq.errors import UserError
from gptq.models import SPECS
from gptq.nn import QuantLinear

# What transformers reads of these architectures, which leaves some settings at their defaults.
READ_BY_TRANSFORMERS: dict[str, dict[str, object]] = {
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 128},
    "stablelm": {"use_qkv_bias": True},
    "nemotron": {},
    "starcoder2": {"sliding_window": None},
    "phi3": {"sliding_window": None},
    "gemma2": {"head_dim": 256, "sliding_window": 8},
    "gemma3_text": {"head_dim": 256, "sliding_window": 8, "num_hidden_layers": 7},
}


def no_window(blocks: int) -> dict[str, object]:
    kinds = ["full_attention"] * blocks
    return {"sliding_window": None, "layer_types": kinds, "num_hidden_layers": blocks}


@pytest.mark.parametrize("arch", READ_BY_TRANSFORMERS)
def test_transformers_reads_other_architectures(arch, tmp_path):
    folder = make_tiny(tmp_path / "model", arch, READ_BY_TRANSFORMERS[arch])
    write_dense(folder, tmp_path / "m.gguf")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32
    ).eval()
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    close(logits(model), logits(expected), 1e-5)


@pytest.mark.parametrize(("arch", "kind"), SCALED)
def test_scaled_positions_come_back(arch, kind, tmp_path):
    folder = make_tiny(tmp_path / "model", arch, with_scaled_positions(arch, kind))
    write_dense(folder, tmp_path / "m.gguf")
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    close(logits(dense(tmp_path / "m.gguf")), logits(expected), 1e-5)


@pytest.mark.parametrize("arch", QUIRKS)
def test_a_full_model_comes_back(arch, tmp_path):
    folder = make_tiny(tmp_path / "model", arch)
    write_dense(folder, tmp_path / "m.gguf")
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    close(logits(dense(tmp_path / "m.gguf")), logits(expected), 1e-5)
    stored = open_gguf(tmp_path / "m.gguf", SPECS[arch])
    weights = expected.state_dict()
    tied = {"lm_head.weight"} if expected.config.tie_word_embeddings else set()
    assert stored.keys() == weights.keys() - tied
    for name, tensor in stored.items():
        # What is added to norms costs the last bits.
        torch.testing.assert_close(tensor.float(), weights[name], rtol=0, atol=1e-7)


@pytest.mark.parametrize("arch", QUIRKS)
def test_names_are_those_of_the_gguf_package(arch, tmp_path):
    folder = make_tiny(tmp_path / "model", arch)
    write_dense(folder, tmp_path / "m.gguf")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    name = reader.fields["general.architecture"].contents()
    (kind,) = [key for key, known in gguf.MODEL_ARCH_NAMES.items() if known == name]
    names = gguf.get_tensor_name_map(kind, reader.fields[f"{name}.block_count"].contents())
    weights = open_model(folder).tensors
    endings = (".weight", ".bias")
    expected = {names.get_name(full, endings) for full in weights if "act_fn" not in full}
    factors = {tensor.name for tensor in reader.tensors if tensor.name.startswith("rope_")}
    assert {tensor.name for tensor in reader.tensors} - factors == expected
    known = {
        text.replace("{arch}", name)
        for group in vars(gguf.constants.Keys).values()
        if isinstance(group, type)
        for text in vars(group).values()
        if isinstance(text, str)
    } | {"general.quantized_by", "quantize_config"}
    assert {key for key in reader.fields if not key.startswith("GGUF.")} <= known


@pytest.mark.parametrize("arch", QUIRKS)
def test_packed_layers_of_other_architectures(arch, tmp_path, monkeypatch):
    needs_tokenizer(arch)
    # An architecture's own splitting is known by its vocabulary, which the test's is not.
    monkeypatch.setattr(gguf_tokenizer, "_splitting", lambda *_: "gpt-2")
    # Of 64 layers those of two blocks are enough.
    few = no_window(2) if arch == "exaone4" else None
    folder = make_tiny(tmp_path / "model", arch, few)
    config = QuantConfig(sym=True, method="rtn", group_size=32)
    outputs = {"save": tmp_path / "m.gguf", "save_safetensors": tmp_path / "m.safetensors"}
    gptq.quantize(folder, None, config, **outputs)
    model, _ = gptq.load(tmp_path / "m.gguf")
    expected, _ = gptq.load(folder, tmp_path / "m.safetensors")
    packed, same = (
        {name for name, module in it.named_modules() if isinstance(module, QuantLinear)}
        for it in (model, expected)
    )
    assert len(packed) > 7
    assert packed == same
    # Embeddings are rounded in groups of 32 here and of 64 there.
    close(logits(model), logits(expected), 0.2)
    close(logits(model), logits(dense(tmp_path / "m.gguf")))


@pytest.mark.parametrize("arch", ["mistral", "starcoder2"])
def test_a_context_ends_with_the_window_that_has_no_key(arch, tmp_path):
    folder = make_tiny(tmp_path / "model", arch, {"sliding_window": 20})
    with pytest.warns(UserWarning, match="context ends at 20 tokens"):
        write_dense(folder, tmp_path / "m.gguf")
    config = gguf_config(tmp_path / "m.gguf")
    assert config.max_position_embeddings == 20
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    close(logits(dense(tmp_path / "m.gguf"))[:, :20], logits(expected)[:, :20], 1e-5)


@pytest.mark.parametrize(
    ("arch", "changes", "words"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu', not 'silu'"),
        ("gemma2", {"query_pre_attn_scalar": 64}, "query_pre_attn_scalar is 64, not 32"),
        ("gemma2", {"attn_logit_softcapping": None}, "attn_logit_softcapping is None"),
        ("gemma2", {"layer_types": ["full_attention"] * 3}, "sliding_window is None"),
        ("gemma", {"tie_word_embeddings": False}, "not tied to the embedding"),
        ("olmo2", {"tie_word_embeddings": True}, "is tied to the embedding"),
        ("smollm3", {"no_rope_layers": [1, 1, 0, 1, 1]}, "not 0 for each 4th layer"),
        ("exaone4", {"num_hidden_layers": 2}, "2 layers and sliding_window is 8"),
        ("exaone4", no_window(64), "64 layers and sliding_window is None"),
        ("starcoder2", {"head_dim": 32}, "heads have 32 channels"),
        ("ministral3", {}, "format gguf is not known for ministral3"),
    ],
)
def test_settings_that_llama_cpp_does_not_compute(arch, changes, words, tmp_path):
    folder = make_tiny(tmp_path / "model", arch, {**QUIRKS.get(arch, {}), **changes})
    with pytest.raises(UserError, match=words) as caught:
        write_dense(folder, tmp_path / "m.gguf")
    assert "use another --format" in str(caught.value)
    assert not (tmp_path / "m.gguf").exists()


@pytest.mark.parametrize("arch", ["helium", "granite", "phi3", "apertus", "gemma3_text"])
def test_other_architectures_to_a_folder_and_back(arch, tmp_path, monkeypatch):
    needs_tokenizer(arch)
    monkeypatch.setattr(gguf_tokenizer, "_splitting", lambda *_: "gpt-2")
    config = QuantConfig(sym=True, method="rtn", group_size=32)
    gptq.quantize(make_tiny(tmp_path / "model", arch), None, config, save=tmp_path / "m.gguf")
    convert.convert(tmp_path / "m.gguf", tmp_path / "folder")
    convert.convert(tmp_path / "folder", tmp_path / "again.gguf")
    before, after = (gptq.load(tmp_path / name)[0] for name in ("m.gguf", "again.gguf"))
    close(logits(after), logits(before), 1e-5)
