"""Folders that other programs wrote: ours computes the logits that they do.

Run with `-m peers`, after `bash benchmarks/peers/setup.sh PROGRAM`; programs without an environment
are skipped. BLOOM is not here for AutoRound and AWQ, whose writers fail on it.
"""

from pathlib import Path

import pytest
import torch
from conftest import bloom_config, llama_config, make_model
from helpers.old_tools import PROBE
from helpers.peers import distance, exchange, logits

import gptq

pytestmark = pytest.mark.peers

GROUP = {"strategy": "group", "group_size": 64}
CHANNEL = {"strategy": "channel"}

# Writer: by name the model, its settings, and who reads the folder to tell its logits.
WRITTEN: dict[str, dict[str, tuple[str, dict, str]]] = {
    "gptqmodel": {
        "gptq-sym4": ("llama", {"bits": 4, "sym": True, "format": "gptq"}, "gptqmodel"),
        "gptq-asym4": ("llama", {"bits": 4, "sym": False, "format": "gptq"}, "gptqmodel"),
        "gptq-sym2-bloom": ("bloom", {"bits": 2, "sym": True, "format": "gptq"}, "gptqmodel"),
        "v2-asym3": ("llama", {"bits": 3, "sym": False, "format": "gptq_v2"}, "gptqmodel"),
        "v2-asym4-bloom": ("bloom", {"bits": 4, "sym": False, "format": "gptq_v2"}, "gptqmodel"),
        "v2-sym8-act": (
            "llama",
            {"bits": 8, "sym": True, "format": "gptq_v2", "desc_act": True},
            "gptqmodel",
        ),
        "v2-asym-mixed": (
            "llama",
            {
                "bits": 4,
                "sym": False,
                "format": "gptq_v2",
                "dynamic": {
                    r"+:.*\.0\.mlp\.down_proj": {"bits": 8, "group_size": 32},
                    r"+:.*self_attn.*": {"bits": 3, "group_size": 128},
                },
            },
            "gptqmodel",
        ),
        "awq": (
            "llama",
            {"bits": 4, "sym": False, "format": "gemm", "quant_method": "awq"},
            "gptqmodel",
        ),
    },
    "llm_compressor": {
        f"{'sym' if sym else 'asym'}{bits}-{arch}-{name}": (
            arch,
            {"num_bits": bits, "symmetric": sym, **settings},
            "llm_compressor",
        )
        for arch, bits, sym, name, settings in [
            ("llama", 4, False, "group", GROUP),
            ("llama", 4, True, "group", GROUP),
            ("llama", 8, True, "channel", CHANNEL),
            ("llama", 4, False, "static", {**GROUP, "actorder": "static"}),
            ("llama", 2, False, "group", GROUP),
            ("llama", 3, False, "group", GROUP),
            ("tied", 4, True, "group", GROUP),
            ("bloom", 4, False, "group", GROUP),
            ("bloom", 8, True, "channel", CHANNEL),
        ]
    },
    "auto_round": {
        "gptq-sym4": ("llama", {"bits": 4, "sym": True, "format": "auto_gptq"}, "gptqmodel"),
        "awq-asym4": ("llama", {"bits": 4, "sym": False, "format": "auto_awq"}, "gptqmodel"),
        "awq-sym4": ("llama", {"bits": 4, "sym": True, "format": "auto_awq"}, "gptqmodel"),
        "ct-asym4": (
            "llama",
            {"bits": 4, "sym": False, "format": "llm_compressor"},
            "llm_compressor",
        ),
        "mlx-asym4": ("llama", {"bits": 4, "sym": False, "format": "mlx"}, "mlx"),
        "mlx-asym4-tied": ("tied", {"bits": 4, "sym": False, "format": "mlx"}, "mlx"),
    },
    "mlx": {
        f"{bits}-{arch}-g{size}": (arch, {"q_bits": bits, "q_group_size": size}, "mlx")
        for arch, bits, size in [
            ("llama", 2, 32),
            ("llama", 3, 128),
            ("llama", 4, 64),
            ("llama", 8, 32),
            ("tied", 4, 64),
        ]
    },
}
COMMON = {
    "gptqmodel": {"group_size": 64, "desc_act": False},
    "auto_round": {"group_size": 64, "iters": 2},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    sizes = {"hidden_size": 128, "intermediate_size": 256}
    return {
        "llama": make_model(folder / "llama", llama_config(**sizes)),
        "tied": make_model(folder / "tied", llama_config(**sizes, tie_word_embeddings=True)),
        "bloom": make_model(folder / "bloom", bloom_config(hidden_size=128)),
    }


@pytest.fixture(scope="module")
def folders(models, tmp_path_factory):
    """The folders of a writer, each with its reader's logits beside it; made when asked for."""
    known: dict[str, Path] = {}
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(2, 300, (16, 64), generator=generator).tolist()

    def run(writer: str) -> Path:
        if writer not in known:
            where = tmp_path_factory.mktemp(writer)
            cases = WRITTEN[writer]
            make = [
                {
                    "source": str(models[arch]),
                    "target": str(where / name),
                    "tokens": tokens,
                    **COMMON.get(writer, {}),
                    **settings,
                }
                for name, (arch, settings, _) in cases.items()
            ]
            assert not any(exchange(writer, where, make=make).values())
            for reader in {reader for _, _, reader in cases.values()}:
                read = [str(where / name) for name, it in cases.items() if it[2] == reader]
                assert not any(exchange(reader, where, read=read).values())
            known[writer] = where
        return known[writer]

    return run


@pytest.mark.parametrize(
    ("writer", "name"), [(writer, name) for writer, it in WRITTEN.items() for name in it]
)
def test_ours_computes_the_same(writer, name, folders):
    folder = folders(writer) / name
    model, _ = gptq.load(folder, dtype="float32")
    with torch.no_grad():
        ours = model(PROBE, use_cache=False).logits
    assert distance(ours, logits(WRITTEN[writer][name][2], folder)) < 2e-3
