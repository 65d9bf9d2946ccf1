"""What would fail only when the outputs are written is refused before the first block."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import llama_config, make_model
from helpers.gguf_models import make_tiny
from safetensors.torch import load_file, save_file

import gptq
from gptq.errors import UserError
from quant_cuda.reference import dequantize

CONFIG = gptq.QuantConfig(bits=8, group_size=32, method="rtn", scale_search="minmax")
NORM, EMBEDDING = "model.norm.weight", "model.embed_tokens.weight"
BIAS = "model.layers.1.self_attn.q_proj.bias"


def rounded(model: Path, config: gptq.QuantConfig = CONFIG, **outputs):
    """Quantize; a layer that is solved before an error is a failure."""
    solved = []
    try:
        gptq.quantize(
            model, None, config, device="cpu", progress=lambda *_: solved.append(1), **outputs
        )
    except UserError:
        assert not solved
        raise


def changed(model: Path, folder: Path, name: str, change, dtype=None) -> Path:
    """A copy of a model with another tensor `name`, its floats of another type."""
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    if dtype is not None:
        tensors = {key: tensor.to(dtype) for key, tensor in tensors.items()}
        config = (folder / "config.json").read_text()
        kind = str(dtype).removeprefix("torch.")
        (folder / "config.json").write_text(config.replace('"float16"', f'"{kind}"'))
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def spoilt(value: float):
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[3] = value
        return tensor

    return change


@pytest.mark.parametrize("name", [NORM, EMBEDDING, "lm_head.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite(llama_dir, tmp_path, name, value):
    model = changed(llama_dir, tmp_path / "m", name, spoilt(value))
    with pytest.raises(UserError, match=f"^{name}: holds NaN or infinity"):
        rounded(model, save=tmp_path / "m.pt")


@pytest.mark.parametrize("name", [NORM, EMBEDDING, "lm_head.weight"])
def test_other_shapes(llama_dir, tmp_path, name):
    model = changed(llama_dir, tmp_path / "m", name, lambda tensor: tensor[:-1])
    with pytest.raises(UserError, match=f"^{name}: has shape .* configuration wants"):
        rounded(model, save_dir=tmp_path / "out")


def test_embedding_bits_that_do_not_fill_words(tmp_path):
    config = llama_config(
        hidden_size=36, intermediate_size=32, num_attention_heads=2, num_key_value_heads=2
    )
    model = make_model(tmp_path / "m", config)
    outputs = {"save_dir": tmp_path / "out", "quantize_embeddings": True}
    config = gptq.QuantConfig(bits=8, embedding_bits=4, group_size=32, method="rtn")
    with pytest.raises(UserError, match=r"36 inputs at 4 bits .* use --embedding-bits 16"):
        rounded(model, config, **outputs)
    rounded(model, config, save_dir=tmp_path / "out")


def test_tokenizer_files_that_cannot_be_read(llama_dir, tmp_path, monkeypatch):
    model = tmp_path / "m"
    shutil.copytree(llama_dir, model)
    refused, open_file = model / "generation_config.json", Path.open

    def refuse(path, mode="r", *arguments, **keywords):
        if path == refused and mode == "rb":
            raise PermissionError(13, "Permission denied", str(path))
        return open_file(path, mode, *arguments, **keywords)

    refused.write_text("{}")
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=r"generation_config.json: goes into --save-dir but"):
        rounded(model, save_dir=tmp_path / "out")
    rounded(model, save=tmp_path / "m.pt")  # no folder, no copy


# Values beyond float16 ---------------------------------------------------------------------------


def test_biases_beyond_float16_are_refused(tmp_path):
    model = make_model(tmp_path / "half", llama_config(attention_bias=True))
    model = changed(model, tmp_path / "m", BIAS, spoilt(1e5), torch.bfloat16)
    with pytest.raises(UserError, match=f"^{BIAS}: holds .* but biases of packed layers"):
        rounded(model, save=tmp_path / "m.pt")


@pytest.mark.parametrize("name", [NORM, EMBEDDING, "lm_head.weight"])
def test_tensors_beyond_float16_stay_float32(llama_dir, tmp_path, name):
    model = changed(llama_dir, tmp_path / "m", name, spoilt(-1e5), torch.float32)
    rounded(model, save_dir=tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    full = load_file(model / "model.safetensors")
    assert torch.equal(written[name], full[name])
    others = {key for key in (NORM, EMBEDDING, "lm_head.weight") if key != name}
    assert {written[key].dtype for key in others} == {torch.float16}
    loaded, _ = gptq.load(tmp_path / "out", device="cpu", dtype="float32")
    assert torch.equal(loaded.get_parameter(name), full[name])


def test_an_embedding_beyond_float16_is_packed(llama_dir, tmp_path):
    model = changed(llama_dir, tmp_path / "m", EMBEDDING, spoilt(1e5), torch.float32)
    rounded(model, save=tmp_path / "m.pt")
    loaded, _ = gptq.load(model, tmp_path / "m.pt", device="cpu", dtype="float32")
    with torch.no_grad():
        row = loaded.get_input_embeddings()(torch.tensor([0]))
    assert row[0, 3] == pytest.approx(1e5, rel=0.01)


# Narrow layers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [8, 16, 24])
def test_narrow_layers_are_read_back(tmp_path, width):
    config = llama_config(hidden_size=width, intermediate_size=64, num_key_value_heads=4)
    model = make_model(tmp_path / "m", config)
    rounded(model, gptq.QuantConfig(bits=4, group_size=32, method="rtn"), save=tmp_path / "m.pt")
    loaded, _ = gptq.load(model, tmp_path / "m.pt", device="cpu")
    assert loaded.model.layers[0].mlp.gate_proj.bits == 4


@pytest.mark.parametrize("name", [EMBEDDING, "lm_head.weight"])
@pytest.mark.parametrize("bits", [4, 8])
def test_values_that_packed_embeddings_cannot_hold(llama_dir, tmp_path, name, bits):
    """Half a step less is packed within half a step; half a step more is refused."""
    most = 65504 * (2**bits - 1) / 2
    config = gptq.QuantConfig(bits=8, embedding_bits=bits, group_size=32, method="rtn")
    fits = changed(llama_dir, tmp_path / "a", name, spoilt(most - 30_000), torch.float32)
    rounded(fits, config, save_safetensors=tmp_path / "a.safetensors")
    model, _ = gptq.load(fits, tmp_path / "a.safetensors", device="cpu")
    module = model.get_submodule(name.removesuffix(".weight"))
    held = dequantize(module.packed(), torch.float32).reshape(-1).abs().max()
    assert abs(float(held) - (most - 30_000)) <= 65504 / 2
    beyond = changed(llama_dir, tmp_path / "b", name, spoilt(-most - 30_000), torch.float32)
    with pytest.raises(UserError, match=f"^{name}: holds .* use --embedding-bits 16 or --plain"):
        rounded(beyond, config, save_safetensors=tmp_path / "b.safetensors")
    rounded(beyond, config, save_dir=tmp_path / "folder")


def test_an_embedding_that_stays_as_it_is(tmp_path):
    folder = make_tiny(tmp_path / "gemma", "gemma")
    config = gptq.QuantConfig(bits=8, group_size=32, method="rtn", embedding_bits=4)
    with pytest.raises(UserError, match="--embedding-bits 4: the model scales its embedding"):
        rounded(folder, config, save=tmp_path / "m.pt")
    rounded(folder, replace(config, embedding_bits=8), save=tmp_path / "m.pt")


def test_little_calibration_text_is_said(llama_dir, tmp_path, text_file, recwarn):
    """By the number of different tokens: 96 inputs, the widest layer's, want 192."""
    config = gptq.QuantConfig(bits=8, group_size=32, refine=0)

    def run(dataset: Path, method: str = "gptq", **windows) -> tuple[str, ...]:
        report = gptq.quantize(
            llama_dir,
            dataset,
            replace(config, method=method),
            save=tmp_path / "m.pt",
            device="cpu",
            **windows,
        )
        said = tuple(str(w.message) for w in recwarn if "different tokens" in str(w.message))
        recwarn.clear()
        assert said == report.warnings
        return said

    assert run(text_file, nsamples=16, seqlen=32) == ()
    (few,) = run(text_file, nsamples=2, seqlen=32)
    assert few.startswith(f"{text_file.name}: 50 different tokens are few for layers of 96 inputs")
    assert run(text_file, method="rtn", nsamples=2, seqlen=32) == ()
    again = tmp_path / "again.txt"
    again.write_text("the cat sat on a mat and saw that one dog " * 500)
    assert len(run(again, nsamples=16, seqlen=32)) == 1
