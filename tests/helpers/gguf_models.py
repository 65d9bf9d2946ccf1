"""What the tests of .gguf files share: models to write, and how a written one is checked."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
import transformers
from conftest import SIZES, WORDS, llama_config, make_model
from packaging.version import Version
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from gptq.blockwise.gguf_config import gguf_config
from gptq.blockwise.gguf_model import open_gguf
from gptq.blockwise.source import open_model
from gptq.checkpoints import gguf_format, gguf_tokenizer
from gptq.checkpoints.canonical import Canonical
from gptq.checkpoints.settings import Settings
from gptq.checkpoints.writing import Contents
from helpers.old_tools import PROBE

# Kinds of scaled positions with the settings that files have keys for.
ROPES = {
    "linear": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


# All that transformers 5.17 reads; 5.18 goes by the kind of tokenizer.
READ_BY_5_17 = (
    *("llama", "mistral", "helium", "bloom", "qwen2", "qwen3"),
    *("nemotron", "phi3", "stablelm", "starcoder2"),
)
READS_ALL = Version(transformers.__version__) >= Version("5.18")


def needs_tokenizer(arch: str) -> None:
    """Skip a test if transformers does not read the tokenizer of this architecture's files."""
    if not (READS_ALL or arch in READ_BY_5_17):
        pytest.skip(f"transformers {transformers.__version__} does not read its tokenizer")


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(PROBE, use_cache=False).logits


def close(got: Tensor, expected: Tensor, share: float = 1e-3) -> None:
    """Assert that the largest difference is less than a share of the standard deviation."""
    assert (got - expected).abs().max() < share * expected.std()


def dense(path: Path) -> nn.Module:
    """Hugging Face's model with the weights as the gguf package dequantizes them."""
    model = AutoModelForCausalLM.from_config(gguf_config(path), dtype=torch.float32)
    state = {name: tensor.float() for name, tensor in open_gguf(path).items()}
    result = model.load_state_dict(state, strict=False)
    assert not result.unexpected_keys
    model.tie_weights()
    return model.eval()


def sentencepiece_model(folder: Path, arch: str = "llama", **training: Any) -> Path:
    """A model whose tokenizer is a tokenizer.model alone: pieces 0..2 special, 3..258 bytes.

    training: other options of sentencepiece's trainer.
    """
    (folder / "text.txt").write_text(f"{WORDS}\n" * 20)
    options = {
        "vocab_size": 310,
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "minloglevel": 2,
        **training,
    }
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "tokenizer"), **options
    )
    config = llama_config(bos_token_id=1, eos_token_id=2)
    if arch != "llama":
        config = AutoConfig.for_model(arch, **{**_SIZES, **QUIRKS[arch]})
    model = make_model(folder / "model", config)
    for file in model.glob("tokenizer*"):
        file.unlink()
    shutil.copy(folder / "tokenizer.model", model)
    return model


# Whether the head is tied is what each architecture has it.
_SIZES = {k: it for k, it in SIZES.items() if k != "tie_word_embeddings"} | {"pad_token_id": 1}
_WINDOW = {"sliding_window": 8}
_GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "num_hidden_layers": 3, **_WINDOW}
_PARTIAL = {"partial_rotary_factor": 0.5, "rope_theta": 500.0, "rope_type": "default"}
# What makes a tiny model show the quirks of its architecture, as far as llama.cpp knows them.
QUIRKS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": None, "head_dim": 32},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "smollm3": {"num_hidden_layers": 5},
    "seed_oss": {"head_dim": 32},
    "ernie4_5": {"head_dim": 32},
    "hunyuan_v1_dense": {
        "head_dim": 32,
        "rope_parameters": {
            "rope_type": "dynamic",
            "rope_theta": 100.0,
            "alpha": 50.0,
            "factor": 1.0,
        },
    },
    "helium": {"head_dim": 16},
    "olmo": {"clip_qkv": 0.5},
    "stablelm": {"use_qkv_bias": True, "rope_parameters": _PARTIAL},
    "granite": {
        "attention_bias": True,
        "mlp_bias": True,
        "attention_multiplier": 0.1,
        "residual_multiplier": 0.5,
        "logits_scaling": 3.0,
        "embedding_multiplier": 2.0,
    },
    "arcee": {"head_dim": 32},
    "nemotron": {"mlp_bias": True, "rope_parameters": _PARTIAL},
    "starcoder2": {"sliding_window": None},
    "apertus": {"attention_bias": True, "head_dim": 32},
    "phi3": {
        "sliding_window": None,
        "original_max_position_embeddings": 64,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 500.0,
            "partial_rotary_factor": 0.5,
            "original_max_position_embeddings": 64,
            "long_factor": [1.0, 2.0, 3.0, 5.0],
            "short_factor": [1.0, 1.1, 1.2, 1.3],
        },
    },
    "glm": {"head_dim": 16, "rope_parameters": _PARTIAL},
    "glm4": {"head_dim": 32, "rope_parameters": _PARTIAL},
    "olmo2": {},
    "olmo3": {**_WINDOW, "num_hidden_layers": 5},
    # The windows are those of models of 64 layers.
    "exaone4": {**_WINDOW, "num_hidden_layers": 64},
    "gemma": {"head_dim": 32},
    "gemma2": {**_GEMMA, "attn_logit_softcapping": 0.5, "final_logit_softcapping": 0.3},
    "gemma3_text": {**_GEMMA, "num_hidden_layers": 7, "final_logit_softcapping": 0.3},
}

# How Gemma's tokenizer differs from LLaMA's.
GEMMA_PIECES = {"add_dummy_prefix": False, "user_defined_symbols": ["<start>", "▁▁", "▁▁▁"]}


def make_tiny(folder: Path, arch: str, changes: dict[str, Any] | None = None) -> Path:
    """A tiny random model with a tokenizer. changes: to the usual sizes; QUIRKS if None."""
    quirks = QUIRKS[arch] if changes is None else changes
    return make_model(folder, AutoConfig.for_model(arch, **{**_SIZES, **quirks}))


# The base of the rotation in layers with a window.
_NESTED = {"gemma3_text": 100.0, "olmo3": 500.0}
# Architectures with an order of rows, a partial rotation, windows or unrotated layers.
SCALED = [
    (arch, kind)
    for arch, kinds in {
        "granite": ROPES,
        "exaone4": ROPES,
        "stablelm": ("linear", "yarn"),
        "olmo3": ("linear", "yarn"),
        "gemma2": ("linear",),
        "gemma3_text": ("linear",),
    }.items()
    for kind in kinds
]


def with_scaled_positions(arch: str, kind: str) -> dict[str, Any]:
    """Changes for `make_tiny`. Where layers with a window have settings of their own, these do not
    scale."""
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 500.0, **ROPES[kind]}
    if arch == "stablelm":
        rope["partial_rotary_factor"] = 0.5
    if arch in _NESTED:
        inner = {"rope_type": "default", "rope_theta": _NESTED[arch]}
        rope = {"full_attention": rope, "sliding_attention": inner}
    return {**QUIRKS[arch], "rope_parameters": rope}


def write_dense(folder: Path, path: Path, splitting: str = "gpt-2") -> None:
    """Write a full model's weights as they are; the package itself writes packed layers only.

    splitting: of text, by llama.cpp's name for it. An architecture's own is known by its
        vocabulary, which that of tests is not.
    """
    source = open_model(folder)
    canonical = Canonical(source, folder, source.tensors, (), Settings(4, 32, True, False))
    with pytest.MonkeyPatch.context() as patch:
        # Else the embedding is rounded.
        patch.setattr(gguf_format, "_rounded", gguf_format._as_it_is)
        patch.setattr(gguf_tokenizer, "_splitting", lambda *_: splitting)
        tensors = gguf_format.tensors(canonical)
        gguf_format.write(path, Contents(source, tensors, None, {}))
