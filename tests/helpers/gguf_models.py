"""What the tests of .gguf files share: models to write, and how a written one is checked."""

import shutil
from pathlib import Path

import sentencepiece
import torch
from conftest import WORDS, llama_config, make_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from gptq.blockwise.gguf_model import gguf_config, open_gguf
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


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(PROBE, use_cache=False).logits


def dense(path: Path) -> nn.Module:
    """Hugging Face's model with the weights as the gguf package dequantizes them."""
    model = AutoModelForCausalLM.from_config(gguf_config(path), dtype=torch.float32)
    state = {name: tensor.float() for name, tensor in open_gguf(path).items()}
    result = model.load_state_dict(state, strict=False)
    assert not result.unexpected_keys
    model.tie_weights()
    return model.eval()


def sentencepiece_model(folder: Path) -> Path:
    """A model whose tokenizer is a tokenizer.model alone: pieces 0..2 special, 3..258 bytes."""
    (folder / "text.txt").write_text(f"{WORDS}\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=310,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    model = make_model(folder / "model", llama_config(bos_token_id=1, eos_token_id=2))
    for file in model.glob("tokenizer*"):
        file.unlink()
    shutil.copy(folder / "tokenizer.model", model)
    return model
