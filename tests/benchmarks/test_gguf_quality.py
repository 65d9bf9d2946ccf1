"""The parts of the comparison with llama.cpp's quantizations that need no llama.cpp."""

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from benchmarks.gguf_quality import table
from benchmarks.llama_cpp_files import full_file, importance
from gptq.blockwise.gguf_model import open_gguf
from gptq.blockwise.source import open_model

ROWS = [
    {"name": "llama.cpp", "type": "q4_0", "bits": 4.5, "gap_llama_cpp": 0.25},
    {
        "name": "ours",
        "type": "q4_0",
        "bits": 4.5,
        "gap_llama_cpp": 0.125,
        "gap_ours": 0.1225,
        "greedy": {"equal_tokens": 31, "tokens": 32},
    },
]


def test_the_full_model_is_the_same(llama_dir, tmp_path):
    tensors = open_gguf(full_file(llama_dir, tmp_path / "full.gguf"))
    source = open_model(llama_dir)
    assert set(tensors) == set(source.tensors)
    for name in tensors:
        assert tensors.dtype(name) == torch.float32
        assert torch.equal(tensors[name], source.tensors[name].float()), name


def test_importance_is_the_mean_square_of_inputs(llama_dir, tmp_path):
    windows = torch.arange(40).reshape(2, 20)
    got = np.load(importance(llama_dir, windows, tmp_path / "i.npz"))
    assert len(got.files) == 14
    model = AutoModelForCausalLM.from_pretrained(llama_dir, dtype=torch.float32)
    with torch.no_grad():
        hidden = model.model.layers[0].input_layernorm(model.model.embed_tokens(windows))
    expected = (hidden**2).mean((0, 1))
    for name in ("attn_q", "attn_k", "attn_v"):
        np.testing.assert_allclose(got[f"blk.0.{name}.weight"], expected, rtol=1e-5)
    assert got["blk.1.ffn_down.weight"].shape == (96,)


def test_the_table(capsys):
    from rich.console import Console

    Console(width=100).print(table(ROWS))
    shown = [line for line in capsys.readouterr().out.splitlines() if "q4_0" in line]
    assert [line.split("│")[1].strip() for line in shown] == ["ours", "llama.cpp"]
    assert "0.1250" in shown[0]
    assert "31 of 32" in shown[0]
