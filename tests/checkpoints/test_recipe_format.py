"""A format that is added from outside, by a row of FORMATS alone: how to add one."""

import json
import re
from functools import partial

import pytest
import torch
from conftest import llama_config, make_model
from helpers.old_tools import write as made_by
from safetensors.torch import load_file

import gptq
from gptq import QuantConfig, convert
from gptq.checkpoints.canonical import layer_entries, with_modules, zero_points
from gptq.checkpoints.formats import FORMATS, Format
from gptq.checkpoints.writing import CONTAINERS, FOLDER
from gptq.errors import UserError
from gptq.files.lazy import Entry, as_lazy
from gptq.files.opening import open_tensors
from quant_cuda.packing import unpack as unpack_words

# The toy format: integers and zero points in bytes, scales in float32.


def refuses(facts):
    bits = facts.layer.bits
    return None if bits in (4, 8) else f"has {bits} bits; toy holds 4 and 8"


def tensors(canonical):
    modules = {}
    for layer in canonical.layers:
        entries = layer_entries(canonical.tensors, layer.name)
        q = Entry(partial(_integers, canonical, layer), (layer.inputs, layer.outputs), torch.uint8)
        zero = Entry(partial(_zeros, canonical, layer), (layer.groups, layer.outputs), torch.uint8)
        scale = partial(_scale, canonical, layer)
        scale = entries["scales"]._replace(read=scale, dtype=torch.float32)
        modules[layer.name] = {"q": q, "zero": zero, "scale": scale}
        modules[layer.name] |= {key: entries[key] for key in ("g_idx", "bias") if key in entries}
    return with_modules(canonical.tensors, modules)


def _integers(canonical, layer):
    return unpack_words(canonical.tensors[f"{layer.name}.qweight"], layer.bits, layer.inputs)


def _zeros(canonical, layer):
    return zero_points(canonical, layer).to(torch.uint8)


def _scale(canonical, layer):
    return canonical.tensors[f"{layer.name}.scales"].float()


def settings(canonical):
    return {"quant_method": "toy", "bits": canonical.settings.bits}


def read(target, _source):
    state = dict(open_tensors([target / "model.safetensors" if target.is_dir() else target]))
    for name in [name.removesuffix(".q") for name in state if name.endswith(".q")]:
        q, zero, scale = (state.pop(f"{name}.{key}").float() for key in ("q", "zero", "scale"))
        group = state.pop(f"{name}.g_idx").long()
        state[f"{name}.weight"] = ((q - zero[group]) * scale[group]).T
    return as_lazy(state)


FILE = {".safetensors": CONTAINERS[".safetensors"]}
TOY = Format("toy", tensors, settings, refuses=refuses, containers=FILE, read=read)


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setitem(FORMATS, "toy", TOY)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    return make_model(folder / "model", llama_config(num_hidden_layers=1))


def checkpoint(model, tmp_path, bits=4):
    """An old tool's checkpoint and the layers in it, by name."""
    made = made_by(model, "v1", bits, 32, act=True)
    torch.save(made.state, tmp_path / "old.pt")
    return tmp_path / "old.pt", made.layers


def test_it_is_written_by_its_name(model, tmp_path, capsys):
    old, layers = checkpoint(model, tmp_path)
    out = tmp_path / "new.safetensors"
    command = [str(old), str(out), "--model", str(model), "--format", "toy"]
    assert convert.main(command) == 0
    assert "7 layers, the same weights" in capsys.readouterr().out
    state = load_file(out)
    assert len(layers) == 7
    for name, layer in layers.items():
        assert state[f"{name}.q"].dtype == torch.uint8
        assert state[f"{name}.q"].tolist() == layer.q.tolist()
        assert state[f"{name}.zero"].tolist() == layer.zero.tolist()
        assert state[f"{name}.scale"].tolist() == layer.scale.tolist()
    assert "model.norm.weight" in state


def test_what_is_written_is_compared(model, tmp_path, monkeypatch):
    old, _ = checkpoint(model, tmp_path)
    monkeypatch.setattr(f"{__name__}._zeros", lambda *layer: 1 + zero_points(*layer).byte())
    with pytest.raises(RuntimeError, match="was not written as it was read"):
        convert.convert(old, tmp_path / "new.safetensors", model=model, format="toy")


@pytest.mark.parametrize(
    ("bits", "out", "message"),
    [
        (
            3,
            "new.safetensors",
            "old.pt: --format toy: model.layers.0.* has 3 bits; toy holds 4 and 8$",
        ),
        (4, "new.pt", "new.pt: format toy is written to a .safetensors, not to a .pt"),
        (4, "new", "new: format toy is written to a .safetensors, not to a folder"),
    ],
)
def test_what_it_cannot_hold_is_refused(bits, out, message, model, tmp_path, capsys):
    old, _ = checkpoint(model, tmp_path, bits)
    command = [str(old), str(tmp_path / out), "--model", str(model), "--format", "toy"]
    capsys.readouterr()
    assert convert.main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line)
    assert [file.name for file in tmp_path.iterdir()] == ["old.pt"]


def test_a_file_of_its_own_needs_no_format(model, tmp_path, monkeypatch):
    own = Format(
        "toy", tensors, settings, containers={".toy": CONTAINERS[".safetensors"]}, read=None
    )
    monkeypatch.setitem(FORMATS, "toy", own)
    old, _ = checkpoint(model, tmp_path, 3)
    convert.convert(old, tmp_path / "new.toy", model=model)
    assert "model.layers.0.mlp.up_proj.q" in load_file(tmp_path / "new.toy")


def test_a_quantization_writes_it_to_a_folder(model, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="format 'toy' is not known"):
        gptq.quantize(model, None, QuantConfig(method="rtn"), save_dir=tmp_path, format="toy")
    folder = Format("toy", tensors, settings, containers=CONTAINERS, read=read)
    monkeypatch.setitem(FORMATS, "toy", folder)
    config = QuantConfig(method="rtn", scale_search="minmax", group_size=32)
    outputs = {"save_safetensors": tmp_path / "m.safetensors", "save_dir": tmp_path / "toy"}
    gptq.quantize(model, None, config, **outputs, format="toy")
    declared = json.loads((tmp_path / "toy" / "config.json").read_text())
    assert declared["quantization_config"] == {"quant_method": "toy", "bits": 4}
    full = read(tmp_path / "toy", None)
    convert.convert(tmp_path / "m.safetensors", tmp_path / "dense", model=model, format="dense")
    expected = load_file(tmp_path / "dense" / "model.safetensors")
    for name in expected:
        if "_proj" in name:
            assert torch.equal(full[name].half(), expected[name])


def test_the_table_lists_it_in_help(capsys):
    with pytest.raises(SystemExit):
        convert.main(["--help"])
    assert "dense,toy}" in capsys.readouterr().out
    assert FOLDER not in TOY.containers
