"""Folders of ours in other programs: their logits are those of the quantized weights.

Run with `-m peers`, after `bash benchmarks/peers/setup.sh PROGRAM`; programs without an environment
are skipped. helpers/old_tools.py rounds and packs the weights without the package's code; the
oracle is Hugging Face's model with the rounded weights, in float32.
"""

from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import bloom_config, llama_config, make_model
from helpers.old_tools import write
from helpers.peers import distance, exchange, logits

from gptq import convert
from gptq.errors import UserError

pytestmark = pytest.mark.peers


class Case(NamedTuple):
    format: str
    arch: str
    bits: int
    sym: bool
    size: int
    act: bool = False

    def __str__(self) -> str:
        size = "column" if self.size == -1 else f"g{self.size}"
        words = (self.format, self.arch, self.bits, "sym" if self.sym else "asym", size)
        return "-".join(str(word) for word in words) + ("-act" if self.act else "")


def every(format: str, bits=(2, 3, 4, 8), sym=(True, False), sizes=(32, 64, 128, -1)) -> list[Case]:
    return [Case(format, "llama", *rest) for rest in product(bits, sym, sizes)]


# What each program reads.
READ = {
    "transformers": [
        *every("compressed-tensors"),
        Case("compressed-tensors", "tied", 4, False, 64),
        Case("compressed-tensors", "bloom", 4, False, 64),
        Case("compressed-tensors", "bloom", 8, True, -1),
    ],
    "mlx": [
        *every("mlx", sizes=(32, 64, 128)),
        Case("mlx", "tied", 4, False, 64),
        *every("awq", bits=(4,), sym=(False,), sizes=(64, 128)),
    ],
    "gptqmodel": [
        *every("gptq", sym=(True,)),
        *every("gptq_v2"),
        Case("gptq", "llama", 4, True, 64, act=True),
        Case("gptq", "bloom", 8, True, -1),
        Case("gptq_v2", "llama", 3, False, 64, act=True),
        Case("gptq_v2", "short", 4, False, 64),
        Case("gptq_v2", "bloom", 4, False, 64),
        *every("awq", bits=(4,)),
        Case("awq", "bloom", 4, False, 64),
    ],
    "vllm": [
        *every("gptq", bits=(4,), sym=(True,), sizes=(64, -1)),
        *every("compressed-tensors", bits=(4,), sizes=(32, 128)),
        Case("compressed-tensors", "tied", 4, False, 64),
        *every("awq", bits=(4,), sym=(False,), sizes=(64, -1)),
    ],
}

# What each program refuses, with a piece of the reason as it says it.
REFUSED = {
    "gptqmodel": {
        # It believes no other tool's zero points in format gptq.
        Case("gptq", "llama", 4, False, 64): "sym=False",
    },
    "mlx": {
        Case("gptq", "llama", 4, True, 64): "g_idx",
        Case("gptq_v2", "llama", 8, True, 64): "bits",
    },
    "vllm": {
        Case("gptq_v2", "llama", 4, False, 64): "Unsupported quantization config",
        Case("gptq", "llama", 3, True, 64): "Unsupported quantization config",
        # Its build for CPUs multiplies 4 bits alone.
        Case("gptq", "llama", 8, True, 64): "uint8b128",
        # It reorders the rows of the fused layer's tensors, which are not its outputs.
        Case("gptq", "bloom", 4, True, 64): "shape",
        Case("compressed-tensors", "bloom", 4, False, 64): "shape",
    },
}

DTYPE = {"vllm": "bfloat16"}
# bfloat16 rounds these models' logits by 4% of their spread; another model is off by all of it.
# MLX's biases, and GPTQModel's weights in AWQ, are rounded to float16.
LIMIT = {"vllm": 0.06, "mlx": 3e-3, "gptqmodel": 3e-3}


def cases(table) -> list:
    return [
        pytest.param(program, case, id=f"{program}-{case}")
        for program, of_program in table.items()
        for case in of_program
    ]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """Sizes that every program takes: heads of 64, and outputs in whole groups of 32."""
    folder = tmp_path_factory.mktemp("models")
    sizes = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
    llama = {**sizes, "intermediate_size": 256}
    return {
        "llama": make_model(folder / "llama", llama_config(**llama)),
        "tied": make_model(folder / "tied", llama_config(**llama, tie_word_embeddings=True)),
        "short": make_model(folder / "short", llama_config(**sizes, intermediate_size=160)),
        "bloom": make_model(folder / "bloom", bloom_config(hidden_size=128, n_head=2)),
    }


@pytest.fixture(scope="module")
def results(models, tmp_path_factory):
    """Of a program: its errors by folder, and the expected logits by folder; run when asked for."""
    known: dict[str, tuple[Path, dict[str, str | None], dict[str, torch.Tensor]]] = {}

    def run(program: str):
        if program not in known:
            where = tmp_path_factory.mktemp(program)
            expected, errors = {}, {}
            for case in [*READ[program], *REFUSED.get(program, ())]:
                try:
                    expected[str(case)] = put(where / str(case), models[case.arch], case)
                except UserError as error:
                    errors[str(where / str(case))] = f"not written: {error}"
            folders = [str(where / name) for name in expected]
            errors |= exchange(program, where, DTYPE.get(program, "float32"), read=folders)
            known[program] = where, errors, expected
        return known[program]

    return run


def put(folder: Path, model: Path, case: Case) -> torch.Tensor:
    """Convert a checkpoint of these settings to a folder; returns the logits it should have."""
    # Zero points of format gptq start at 1.
    least = int(case.format == "gptq")
    made = write(model, "v2", case.bits, case.size, case.sym, case.act, least_zero=least)
    said = f'{{"bits": {case.bits}, "group_size": {case.size}, "checkpoint_format": "gptq_v2"}}'
    made.state._metadata = {"quantize_config": said}
    torch.save(made.state, f"{folder}.pt")
    convert.convert(f"{folder}.pt", folder, model=model, format=case.format)
    return made.logits


@pytest.mark.parametrize(("program", "case"), cases(READ))
def test_it_computes_with_the_quantized_weights(program, case, results):
    where, errors, expected = results(program)
    folder = where / str(case)
    assert errors[str(folder)] is None
    assert distance(logits(program, folder), expected[str(case)]) < LIMIT.get(program, 1e-3)


@pytest.mark.parametrize(("program", "case"), cases(REFUSED))
def test_what_it_does_not_read(program, case, results):
    where, errors, _ = results(program)
    reason = errors[str(where / str(case))]
    assert reason is not None
    assert REFUSED[program][case] in reason
