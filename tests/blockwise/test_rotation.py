"""Rotated hidden states: the matrix itself, and runs whose model is rotated."""

import pytest
import torch
from conftest import llama_config, make_model
from transformers import AutoModelForCausalLM

import gptq
from gptq import QuantConfig
from gptq.blockwise.rotation import Rotation
from gptq.cli.run import main

PROBE = torch.randint(2, 300, (2, 24), generator=torch.Generator().manual_seed(3))
RUN = {"nsamples": 4, "seqlen": 32, "device": "cpu", "dtype": "float32"}


@pytest.mark.parametrize("size", [1, 2, 15, 64, 96, 576])
def test_the_matrix_is_orthogonal_and_mixes_all_channels(size):
    matrix = Rotation(size)(torch.eye(size))
    assert matrix.dtype == torch.float32
    assert torch.allclose(matrix @ matrix.T, torch.eye(size), atol=1e-5)
    assert bool((matrix != 0).all())
    # A power of two is mixed evenly.
    if size & (size - 1) == 0:
        assert torch.allclose(matrix.abs(), torch.full_like(matrix, size**-0.5))
    x = torch.randn(2, 3, size)
    assert torch.allclose(Rotation(size)(x), x @ matrix, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_every_file_has_the_rotated_model(tied, text_file, tmp_path):
    folder = make_model(tmp_path / "m", llama_config(tie_word_embeddings=tied))
    config = QuantConfig(bits=8, group_size=32, sym=True, rotate=True)
    outputs = {
        "save": tmp_path / "model.pt",
        "save_safetensors": tmp_path / "model.safetensors",
        "save_dir": tmp_path / "folder",
    }
    gptq.quantize(folder, text_file, config, **outputs, **RUN)
    gptq.quantize(folder, text_file, config, save=tmp_path / "model.gguf", **RUN)
    full = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = full(PROBE).logits
        for model, path in (
            (folder, outputs["save"]),
            (folder, outputs["save_safetensors"]),
            (outputs["save_dir"], None),
            (tmp_path / "model.gguf", None),
        ):
            loaded, _ = gptq.load(model, path, device="cpu", dtype="float32")
            error = (loaded(PROBE).logits - expected).square().mean().sqrt()
            assert error < 0.05 * expected.std(), path
            assert bool((loaded.model.norm.weight == 1).all())


def test_a_resumed_run_gives_the_same_bytes(llama_dir, text_file, tmp_path):
    config = QuantConfig(bits=3, group_size=32, rotate=True)
    whole, broken = tmp_path / "whole.pt", tmp_path / "broken.pt"
    gptq.quantize(llama_dir, text_file, config, save=whole, **RUN)

    def stop(layer, _total):
        if layer.block == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gptq.quantize(llama_dir, text_file, config, save=broken, progress=stop, **RUN)
    gptq.quantize(llama_dir, text_file, config, save=broken, resume=True, **RUN)
    assert broken.read_bytes() == whole.read_bytes()


def test_an_architecture_that_cannot_be_rotated_is_refused(bloom_dir, text_file, tmp_path, capsys):
    argv = [str(bloom_dir), str(text_file), "--wbits", "4", "--rotate", "--save"]
    assert main(argv=[*argv, str(tmp_path / "m.pt")]) == 2
    error = capsys.readouterr().err.strip()
    assert error == (
        "error: --rotate is not possible: the hidden states of 'bloom' models cannot be rotated; "
        "leave it out"
    )
    assert list(tmp_path.iterdir()) == []
