"""Folders whose layers have different widths in other programs; see test_our_files.py."""

import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import bloom_config, llama_config, make_model
from helpers.old_tools import write
from helpers.peers import distance, exchange, logits

from gptq import convert

pytestmark = pytest.mark.peers

# By the ends of layers' names: bits and group size; the others have 4 bits in groups of 64.
LLAMA = {
    "0.self_attn.q_proj": (3, 32),
    "0.self_attn.k_proj": (3, 32),
    "0.self_attn.v_proj": (3, 32),
    "1.self_attn.o_proj": (2, 32),
    "1.mlp.gate_proj": (8, 128),
    "1.mlp.up_proj": (8, 128),
    "mlp.down_proj": (4, 128),
}
BLOOM = {
    "0.self_attention.query_key_value": (8, 32),
    "1.self_attention.dense": (3, 128),
    "mlp.dense_4h_to_h": (2, 32),
}
# Servers' kernels for symmetric models take 4 and 8 bits, vLLM's build for CPUs 4 alone.
FOUR = {end: (4, size) for end, (_, size) in LLAMA.items()}
WHOLE = {**LLAMA, "0.mlp.gate_proj": (8, -1), "0.mlp.up_proj": (8, -1)}


class Case(NamedTuple):
    format: str
    sym: bool
    widths: dict[str, tuple[int, int]]
    arch: str = "llama"
    act: bool = False


CASES = {
    "transformers": {
        "symmetric": Case("compressed-tensors", True, WHOLE),
        "bloom": Case("compressed-tensors", True, BLOOM, "bloom"),
    },
    "mlx": {"asymmetric": Case("mlx", False, LLAMA), "symmetric": Case("mlx", True, LLAMA)},
    "gptqmodel": {
        "symmetric": Case("gptq", True, WHOLE),
        "v2": Case("gptq_v2", False, WHOLE),
        "act": Case("gptq_v2", False, WHOLE, act=True),
        "bloom": Case("gptq_v2", False, BLOOM, "bloom"),
    },
    "vllm": {
        "compressed": Case("compressed-tensors", False, FOUR),
        "symmetric": Case("gptq", True, FOUR),
    },
}
# It would take zero points for those of another width, and says that their shapes do not fit.
REFUSED = {"transformers": {"asymmetric": Case("compressed-tensors", False, WHOLE)}}
DTYPE = {"vllm": "bfloat16"}
LIMIT = {"vllm": 0.06, "mlx": 3e-3, "gptqmodel": 3e-3}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    sizes = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
    llama = llama_config(**sizes, intermediate_size=256)
    return {
        "llama": make_model(folder / "llama", llama),
        "bloom": make_model(folder / "bloom", bloom_config(hidden_size=128, n_head=2)),
    }


@pytest.mark.parametrize("program", CASES)
def test_it_computes_with_the_quantized_weights(program, models, tmp_path):
    expected = {
        str(tmp_path / name): put(tmp_path / name, models[case.arch], case)
        for name, case in CASES[program].items()
    }
    dtype = DTYPE.get(program, "float32")
    errors = exchange(program, tmp_path, dtype, read=list(expected))
    assert errors == dict.fromkeys(expected)
    for folder, of_weights in expected.items():
        assert distance(logits(program, folder), of_weights) < LIMIT.get(program, 1e-3), folder


@pytest.mark.parametrize("program", REFUSED)
def test_what_it_does_not_read(program, models, tmp_path):
    for name, case in REFUSED[program].items():
        put(tmp_path / name, models[case.arch], case)
        (reason,) = exchange(program, tmp_path, read=[str(tmp_path / name)]).values()
        assert reason is not None


def put(folder: Path, model: Path, case: Case) -> torch.Tensor:
    """Convert a checkpoint of these widths to a folder; returns the logits it should have."""
    least = int(case.format == "gptq")
    made = write(model, "v2", 4, 64, case.sym, case.act, least_zero=least, other=case.widths)
    rules = {
        f"+:.*{end}": {"bits": bits, "group_size": size}
        for end, (bits, size) in case.widths.items()
    }
    said = {"bits": 4, "group_size": 64, "checkpoint_format": "gptq_v2", "dynamic": rules}
    made.state._metadata = {"quantize_config": json.dumps(said)}
    torch.save(made.state, f"{folder}.pt")
    convert.convert(f"{folder}.pt", folder, model=model, format=case.format)
    return made.logits
