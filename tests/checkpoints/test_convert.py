"""Conversion from any layout to any format: what is read again is the same model."""

import json
import shutil
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from conftest import bloom_config, llama_config, make_model
from helpers.old_tools import PROBE, write
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import gptq
from gptq import convert
from gptq.checkpoints import gptq_format
from gptq.errors import UserError


@pytest.fixture(scope="module")
def dirs(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "llama": make_model(folder / "llama", llama_config(num_hidden_layers=1)),
        "tied": make_model(folder / "tied", llama_config(tie_word_embeddings=True)),
        "bloom": make_model(folder / "bloom", bloom_config(n_layer=1)),
    }


def saved(state, path: Path) -> Path:
    torch.save(OrderedDict(state), path)
    return path


def check(logits: torch.Tensor, folder: Path, checkpoint: Path | None) -> None:
    model, _ = gptq.load(folder, checkpoint)
    with torch.no_grad():
        again = model(PROBE, use_cache=False).logits
    torch.testing.assert_close(again, logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("arch", "stored", "bits", "size", "sym", "out", "layout"),
    [
        ("llama", "float_zeros", 3, -1, False, "m.pt", "gptq"),
        ("llama", "float_zeros", 4, -1, True, "folder", "gptq"),
        ("bloom", "without_g_idx", 4, 32, False, "m.safetensors", "gptq_v2"),
        ("bloom", "without_g_idx", 8, 32, False, "m.pt", "gptq"),
        ("tied", "v1", 4, 32, False, "m.pt", "gptq"),
        ("tied", "v1", 4, 32, False, "folder", "gptq_v2"),
        ("llama", "v2", 2, 32, False, "folder", "gptq"),
        ("llama", "v1", 4, 32, True, "folder", "gptq"),
    ],
)
def test_layout_to_format(arch, stored, bits, size, sym, out, layout, dirs, tmp_path):
    made = write(dirs[arch], stored, bits, size, sym=sym, act=stored[0] == "v")
    said = {"quantize_config": json.dumps({"bits": bits, "checkpoint_format": "gptq_v2"})}
    made.state._metadata = said if stored == "v2" else {}
    torch.save(made.state, tmp_path / "old.pt")
    target = tmp_path / out
    asked = layout if (stored, sym, out) == ("v2", False, "folder") else None
    count = convert.convert(tmp_path / "old.pt", target, model=dirs[arch], format=asked)
    assert count == len(made.layers)
    check(made.logits, dirs[arch], target)
    if out == "folder":
        said = json.loads((target / "quantize_config.json").read_text())
        check(made.logits, target, None)
        assert (said["checkpoint_format"], said["format"], said["sym"]) == (layout, layout, sym)
        assert (said["bits"], said["group_size"]) == (bits, size)
        assert said["desc_act"] == (stored[0] == "v")
        assert said["meta"]["quantizer"] == [f"belle-gptq:{gptq.__version__}"]
        state = load_file(target / "model.safetensors")
        assert ("lm_head.weight" in state) == (arch == "llama")
    elif out.endswith(".pt"):
        state = torch.load(target, weights_only=True)
        assert next(iter(state)) == next(iter(made.state))
        if arch != "llama":
            embedding = next(tensor for name, tensor in state.items() if "embed" in name)
            assert state["lm_head.weight"].data_ptr() == embedding.data_ptr()
        assert (
            target.stat().st_size
            < 1.1 * sum(tensor.nbytes for name, tensor in state.items() if name != "lm_head.weight")
            + 80 * 320 * 2
            + 40_000
        )
    else:
        state = load_file(target)
    for name, layer in made.layers.items():
        assert state[f"{name}.scales"].dtype == torch.float16
        assert state[f"{name}.g_idx"].tolist() == layer.g_idx.tolist()
        # A bias of zeros where the model has none is dropped.
        assert (f"{name}.bias" in state) == (layer.bias is not None)


@pytest.mark.parametrize("arch", ["llama", "tied", "bloom"])
@pytest.mark.parametrize("out", ["folder", "m.safetensors"])
def test_to_a_full_model(arch, out, dirs, tmp_path):
    made = write(dirs[arch], "v1", 4, 32, act=True)
    saved(made.state, tmp_path / "old.pt")
    target = tmp_path / out
    convert.convert(tmp_path / "old.pt", target, model=dirs[arch], format="dense")
    file = target / "model.safetensors" if out == "folder" else target
    state = load_file(file)
    for name, layer in made.layers.items():
        expected = torch.from_numpy(layer.dense().T).float().half()
        assert torch.equal(state[f"{name}.weight"], expected), name
    if out == "folder":
        model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
        with torch.no_grad():
            again = model(PROBE, use_cache=False).logits
        # The weights were rounded to float16.
        assert (again - made.logits).abs().max() < 0.02 * made.logits.std()
        assert not (target / "quantize_config.json").exists()


def test_shards(dirs, tmp_path):
    made = write(dirs["tied"], "v1", 4, 32)
    saved(made.state, tmp_path / "old.pt")
    target = tmp_path / "folder"
    convert.convert(tmp_path / "old.pt", target, model=dirs["tied"], shard_bytes=30_000)
    files = sorted(target.glob("model-*.safetensors"))
    count = len(files)
    assert count > 2
    assert [file.name for file in files] == [
        f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)
    ]
    index = json.loads((target / "model.safetensors.index.json").read_text())
    total, held = 0, {}
    for file in files:
        state = load_file(file)
        used = sum(tensor.nbytes for tensor in state.values())
        assert used <= 30_000 or len(state) == 1
        total += used
        held |= dict.fromkeys(state, file.name)
        with safe_open(file, "pt") as opened:
            assert opened.metadata()["format"] == "pt"
    assert index == {"metadata": {"total_size": total}, "weight_map": held}
    check(made.logits, target, None)
    # Back into one file.
    convert.convert(target, tmp_path / "whole.pt")
    check(made.logits, dirs["tied"], tmp_path / "whole.pt")


@pytest.mark.parametrize("format", ["gptq", "dense"])
def test_a_head_of_its_own_that_the_configuration_ties(format, dirs, tmp_path):
    made = write(dirs["tied"], "v1", 4, 32)
    head = torch.randn(made.state["lm_head.weight"].shape).half()
    path = saved({**made.state, "lm_head.weight": head}, tmp_path / "old.pt")
    convert.convert(path, tmp_path / "new", model=dirs["tied"], format=format)
    assert torch.equal(load_file(tmp_path / "new" / "model.safetensors")["lm_head.weight"], head)
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False


def test_exceptions_for_some_layers_are_kept(dirs, tmp_path):
    made = write(dirs["llama"], "v1", 4, 32, other={"down_proj": 8})
    said = {"bits": 4, "group_size": 32, "dynamic": {"+:.*down_proj": {"bits": 8}}}
    made.state._metadata = {"quantize_config": json.dumps(said)}
    torch.save(made.state, tmp_path / "old.pt")
    convert.convert(tmp_path / "old.pt", tmp_path / "new", model=dirs["llama"], format="gptq_v2")
    check(made.logits, tmp_path / "new", None)
    written = json.loads((tmp_path / "new" / "quantize_config.json").read_text())
    # As its layers have them: the rules of other tools do not fit the layers that servers fuse.
    layer = {"bits": 8, "group_size": 32}
    assert written["dynamic"] == {r"+:^model\.layers\.\d+\.mlp\.down_proj$": layer}


def refused(message: str, *arguments, **flags) -> None:
    with pytest.raises(UserError, match=message) as caught:
        convert.convert(*arguments, **flags)
    assert "\n" not in str(caught.value)


def test_what_cannot_be(dirs, tmp_path):
    made = write(dirs["llama"], "float_zeros", 3, -1, least_zero=0)
    name = "model.layers.0.mlp.up_proj.zeros"
    made.state[name][0] = 0
    path = saved(made.state, tmp_path / "old.pt")
    refused("add --model", path, tmp_path / "new")
    refused("none.pt: no such checkpoint", tmp_path / "none.pt", tmp_path / "new")
    refused("zero point of 0", path, tmp_path / "new", model=dirs["llama"], format="gptq")
    assert not (tmp_path / "new").exists()
    refused("--format x: choose one of", path, tmp_path / "new", model=dirs["llama"], format="x")
    refused("is read and would be replaced", path, path, model=dirs["llama"])
    full = tmp_path / "full"
    shutil.copytree(dirs["llama"], full)
    refused("is no quantized checkpoint", path, full, model=dirs["llama"])
    refused("holds no packed weights", dirs["llama"], tmp_path / "new")
    del made.state["model.norm.weight"]
    path = saved(made.state, tmp_path / "short.pt")
    out = tmp_path / "new.safetensors"
    refused("model.norm.weight is absent", path, out, model=dirs["llama"])
    assert {file.name for file in tmp_path.iterdir()} == {"old.pt", "short.pt", "full"}


def test_a_written_file_that_differs_is_noticed(dirs, tmp_path, monkeypatch):
    made = write(dirs["llama"], "v1", 4, 32)
    path = saved(made.state, tmp_path / "old.pt")
    right = gptq_format.pack_zeros
    monkeypatch.setattr(
        gptq_format, "pack_zeros", lambda zeros, bits, offset: right(zeros % 3 + 2, bits, offset)
    )
    with pytest.raises(RuntimeError, match="not written as it was read"):
        convert.convert(path, tmp_path / "new", model=dirs["llama"], format="gptq_v2")


def test_the_command_line(dirs, tmp_path, capsys):
    made = write(dirs["llama"], "without_g_idx", 4, 32)
    path = saved(made.state, tmp_path / "old.pt")
    flags = ["--model", str(dirs["llama"]), "--wbits", "4", "--groupsize", "32"]
    assert convert.main([str(path), str(tmp_path / "new"), *flags]) == 0
    printed = capsys.readouterr().out
    assert f"{tmp_path / 'new'}: 7 layers, the same weights as in {path}" in printed
    assert "format compressed-tensors: loads in this package" in printed
    assert "run it with: vllm serve" in printed
    assert convert.main([str(path), str(tmp_path / "other")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert convert.main([str(path)]) == 2
    assert "the following arguments are required" in capsys.readouterr().err
