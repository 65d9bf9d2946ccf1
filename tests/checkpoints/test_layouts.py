"""Checkpoints of every layout and tool, built bit by bit, hold the model they were made from."""

import json
import re
import shutil
import warnings
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, bloom_config, llama_config, make_model
from helpers.old_tools import PROBE, Fixture, words, write
from safetensors.torch import save_file

import gptq
from gptq import QuantLinear
from gptq.api import load_weights, open_weights
from gptq.checkpoints.settings import settings_folder
from gptq.errors import UserError


@pytest.fixture(scope="module")
def dirs(tmp_path_factory) -> dict[str, Path]:
    """Models of widths that the tools of March 2023 could pack, which want multiples of 256."""
    folder = tmp_path_factory.mktemp("wide")
    wide = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
    return {
        "llama": make_model(folder / "llama", llama_config(**wide, num_key_value_heads=4)),
        "bloom": make_model(folder / "bloom", bloom_config(hidden_size=256, n_layer=1)),
    }


def load(folder: Path, checkpoint: Path | None, **flags):
    return gptq.load(folder, checkpoint, **flags)[0]


def check(made: Fixture, folder: Path, checkpoint: Path | None = None, **flags):
    """The loaded model gives the oracle's logits; returns it."""
    model = load(folder, checkpoint, **flags)
    with torch.no_grad():
        logits = model(PROBE, use_cache=False).logits
    # Embeddings and norms of later tools are stored in float16, as the models of the tests are.
    torch.testing.assert_close(logits, made.logits, rtol=1e-3, atol=1e-3)
    return model


def saved(state, path: Path) -> Path:
    torch.save(OrderedDict(state), path)
    return path


def refused(folder: Path, checkpoint: Path | None, message: str, **flags) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load(folder, checkpoint, **flags)
    assert "\n" not in str(caught.value)


# Every layout at all widths, and both architectures at several.
CASES = [
    *[("float_zeros", bits, -1, False) for bits in (3, 4, 2, 8)],
    *[("without_g_idx", bits, 128, False) for bits in (4, 3, 8, 2)],
    *[("v1", bits, 32, True) for bits in (4, 3, 8, 2)],
    *[("v2", bits, 128, True) for bits in (4, 3, 8, 2)],
]
BOTH = [case for case in CASES if case[1] == 4]


@pytest.mark.parametrize(
    ("arch", "layout", "bits", "size", "act"),
    [
        *[(("llama", "bloom")[i % 2], *case) for i, case in enumerate(CASES)],
        *[(("bloom", "llama")[CASES.index(case) % 2], *case) for case in BOTH],
    ],
)
def test_every_layout(dirs, arch, bits, layout, size, act, tmp_path):
    # Only floating zeros and v2 can hold a zero point of 0.
    least = 0 if layout in ("float_zeros", "v2") else 1
    made = write(dirs[arch], layout, bits, size, act=act, least_zero=least)
    if layout == "v2":
        said = {"bits": bits, "group_size": size, "checkpoint_format": "gptq_v2"}
        path = tmp_path / "m.safetensors"
        state = {name: tensor for name, tensor in made.state.items() if name != "lm_head.weight"}
        state = state if arch == "bloom" else dict(made.state)
        save_file(state, path, metadata={"quantize_config": json.dumps(said)})
    else:
        path = saved(made.state, tmp_path / "m.pt")
    check(made, dirs[arch], path)


def test_what_belle_published_for_bloom(dirs, tmp_path):
    """One storage for the head and the embedding, everything that is not packed in float32."""
    made = write(dirs["bloom"], "without_g_idx", 4, 128)
    state = made.state
    assert state["transformer.word_embeddings.weight"].dtype == torch.float32
    assert (
        state["lm_head.weight"].data_ptr() == state["transformer.word_embeddings.weight"].data_ptr()
    )
    model = check(made, dirs["bloom"], saved(state, tmp_path / "bloom7b-2m-4bit-128g.pt"))
    layer = model.transformer.h[0].self_attention.query_key_value
    assert torch.equal(layer.bias, state["transformer.h.0.self_attention.query_key_value.bias"])
    assert (layer.g_idx, layer.scales.dtype, layer.group_size) == (None, torch.float32, 128)


@pytest.mark.parametrize("prefix", ["model.", "model.decoder."])
def test_early_llama(prefix, dirs, tmp_path):
    """Biases of zeros, frequencies in the file, and the names of the first Hugging Face port."""
    made = write(dirs["llama"], "without_g_idx", 4, 128)
    state = OrderedDict(
        (re.sub(r"^model\.", prefix, name), tensor) for name, tensor in made.state.items()
    )
    state[f"{prefix}layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(32)
    model = check(made, dirs["llama"], saved(state, tmp_path / "m.pt"))
    assert model.model.layers[0].self_attn.q_proj.bias is None


def test_a_nested_state_dict_and_the_oldest_file_format(dirs, tmp_path):
    made = write(dirs["llama"], "without_g_idx", 3, -1)
    path = tmp_path / "m.pt"
    torch.save({"state_dict": made.state}, path, _use_new_zipfile_serialization=False)
    check(made, dirs["llama"], path)


def test_names_without_the_base_model(dirs, tmp_path):
    """bigscience/bloom names its tensors from inside the base model."""
    made = write(dirs["bloom"], "v1", 4, 64)
    state = {name.removeprefix("transformer."): tensor for name, tensor in made.state.items()}
    check(made, dirs["bloom"], saved(state, tmp_path / "m.pt"))


def test_a_configuration_without_weights_is_enough(dirs, tmp_path):
    made = write(dirs["llama"], "v1")
    bare = tmp_path / "bare"
    shutil.copytree(dirs["llama"], bare, ignore=shutil.ignore_patterns("*.safetensors"))
    check(made, bare, saved(made.state, tmp_path / "m.pt"))
    refused(bare, None, "no weights in")


# Folders of other tools ----------------------------------------------------------------------


def folder_of(dirs, arch: str, made: Fixture, where: Path, name: str, **files) -> Path:
    """The model's own folder with packed weights, and JSON files besides."""
    shutil.copytree(dirs[arch], where, ignore=shutil.ignore_patterns("*.safetensors"))
    if name.endswith(".safetensors"):
        kept = {
            key: t for key, t in made.state.items() if arch != "bloom" or key != "lm_head.weight"
        }
        save_file(kept, where / name, metadata={"format": "pt"})
    else:
        saved(made.state, where / name)
    for file, content in files.items():
        (where / f"{file}.json").write_text(json.dumps(content))
    return where


AUTOGPTQ = {
    "bits": 4,
    "group_size": 64,
    "damp_percent": 0.01,
    "desc_act": False,
    "sym": False,
    "true_sequential": True,
    "model_name_or_path": None,
    "model_file_base_name": None,
}


@pytest.mark.parametrize("arch", ["llama", "bloom"])
@pytest.mark.parametrize("name", ["gptq_model-4bit-64g.bin", "gptq_model-4bit-64g.safetensors"])
def test_an_autogptq_folder(arch, name, dirs, tmp_path):
    """Its settings are in quantize_config.json alone."""
    made = write(dirs[arch], "v1")
    folder = folder_of(dirs, arch, made, tmp_path / "m", name, quantize_config=AUTOGPTQ)
    check(made, folder)
    # One file of it, and elsewhere the model.
    check(made, dirs[arch], folder / name)


def test_a_folder_that_says_nothing_of_its_weights(dirs, tmp_path):
    """No quantize_config.json, and nothing in config.json: the tensors tell."""
    made = write(dirs["llama"], "v1", 3, 64)
    check(made, folder_of(dirs, "llama", made, tmp_path / "m", "model.safetensors"))


@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
def test_a_gptqmodel_folder(layout, dirs, tmp_path):
    made = write(dirs["llama"], "v1" if layout == "gptq" else "v2", 4, 64, act=True)
    said = {
        "bits": 4,
        "group_size": 64,
        "desc_act": True,
        "sym": False,
        "lm_head": False,
        "quant_method": "gptq",
        "checkpoint_format": layout,
        "pack_dtype": "int32",
        "meta": {"quantizer": ["gptqmodel:4.2.0"], "damp_percent": 0.05, "mse": 0.0},
    }
    config = json.loads((dirs["llama"] / "config.json").read_text())
    folder = folder_of(
        *(dirs, "llama", made, tmp_path / "m", "model.safetensors"),
        config={**config, "quantization_config": said},
    )
    check(made, folder)
    (folder / "quantize_config.json").write_text(json.dumps(said))
    check(made, folder)
    # One that contradicts config.json is an older file's, and so is no file of another folder.
    stale = {**said, "bits": 8, "group_size": 32, "checkpoint_format": "gptq_v2"}
    (folder / "quantize_config.json").write_text(json.dumps(stale))
    check(made, folder)


def test_settings_of_a_neighbour(dirs, tmp_path):
    """A file that declares nothing, beside another quantized model."""
    neighbour, made = write(dirs["llama"], "v2", 8, 32), write(dirs["llama"], "v1", 4, 64)
    said = {**AUTOGPTQ, "bits": 8, "group_size": 32, "checkpoint_format": "gptq_v2"}
    folder = folder_of(
        dirs, "llama", neighbour, tmp_path / "m", "model.safetensors", quantize_config=said
    )
    check(made, dirs["llama"], saved(made.state, folder / "mine.pt"))


def test_shards_in_a_folder_of_their_own(dirs, tmp_path):
    """The settings lie where the index does."""
    made = write(dirs["llama"], "v2", 4, 64)
    said = {**AUTOGPTQ, "checkpoint_format": "gptq_v2"}
    folder = folder_of(
        dirs, "llama", made, tmp_path / "m", "model.safetensors", quantize_config=said
    )
    (folder / "parts").mkdir()
    shard = (folder / "model.safetensors").rename(folder / "parts" / "a.safetensors")
    index = {"weight_map": dict.fromkeys(made.state, "parts/a.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert settings_folder(shard) == folder
    check(made, folder)
    check(made, dirs["llama"], shard)


def test_exceptions_for_some_layers(dirs, tmp_path):
    """GPTQModel's `dynamic` and AutoRound's `extra_config`: other bits for some layers."""
    made = write(dirs["llama"], "v1", 4, 64, other={"down_proj": 8})
    said = {**AUTOGPTQ, "checkpoint_format": "gptq", "dynamic": {"+:.*down_proj": {"bits": 8}}}
    folder = folder_of(
        dirs, "llama", made, tmp_path / "m", "model.safetensors", quantize_config=said
    )
    model = check(made, folder)
    assert model.model.layers[0].mlp.down_proj.bits == 8
    del said["dynamic"]
    theirs = {"model.layers.0.mlp.down_proj": {"bits": 8, "group_size": 64}}
    said |= {"extra_config": theirs, "quant_method": "auto-round"}
    said |= {"packing_format": "auto_round:auto_gptq"}
    (folder / "quantize_config.json").write_text(json.dumps(said))
    check(made, folder)
    del said["extra_config"]
    (folder / "quantize_config.json").write_text(json.dumps(said))
    refused(folder, None, "down_proj holds 8-bit weights, not 4-bit")


def test_shards_with_an_index(dirs, tmp_path):
    made = write(dirs["llama"], "v1")
    folder = folder_of(
        *(dirs, "llama", made, tmp_path / "m", "model.safetensors"), quantize_config=AUTOGPTQ
    )
    (folder / "model.safetensors").unlink()
    names = list(made.state)
    shards = {"a": names[: len(names) // 2], "b": names[len(names) // 2 :]}
    for shard, held in shards.items():
        save_file({name: made.state[name] for name in held}, folder / f"{shard}.safetensors")
    index = {name: f"{shard}.safetensors" for shard, held in shards.items() for name in held}
    file = folder / "gptq_model-4bit-64g.safetensors.index.json"
    file.write_text(json.dumps({"metadata": {}, "weight_map": index}))
    check(made, folder)
    (folder / "b.safetensors").unlink()
    refused(folder, None, "b.safetensors, which .* names, is missing")


def test_a_folder_that_gptqmodel_made():
    """Of GPTQModel 7.4.0 itself: 4 bit, asymmetric, act-order, "gptq_v2"; its logits in bfloat16.

    It was made from a random model, of which nothing else is kept.
    """
    folder = ROOT / "tests" / "fixtures" / "gptqmodel"
    expected = torch.tensor(json.loads((folder.parent / "gptqmodel_logits.json").read_text()))
    model = load_weights(open_weights(folder))
    with torch.no_grad():
        logits = model(torch.arange(2, 34).view(2, 16), use_cache=False).logits[:, -1]
    layer = model.model.layers[0].mlp.up_proj
    assert (layer.bits, layer.group_size, layer.zero_offset) == (4, 32, 0)
    assert (layer.g_idx[1:] < layer.g_idx[:-1]).any()
    assert (logits - expected).pow(2).mean().sqrt() < 0.02 * expected.std()


# What has gone wrong in the field ------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("layout", "label"), [("v1", "gptq_v2"), ("v2", "gptq")])
def test_a_symmetric_file_with_the_wrong_label(layout, label, bits, dirs, tmp_path):
    """A symmetric zero point is known, so that its fields tell how they are stored."""
    made = write(dirs["llama"], layout, bits, sym=True)
    said = {**AUTOGPTQ, "bits": bits, "sym": True, "checkpoint_format": label}
    folder = folder_of(
        dirs, "llama", made, tmp_path / "m", "model.safetensors", quantize_config=said
    )
    model = check(made, folder)
    offsets = {m.zero_offset for m in model.modules() if isinstance(m, QuantLinear)}
    assert offsets == {1 if layout == "v1" else 0}


def test_a_symmetric_file_without_a_label(dirs, tmp_path):
    made = write(dirs["llama"], "v2", 8, sym=True)
    check(made, dirs["llama"], saved(made.state, tmp_path / "m.pt"))


def test_zeros_of_zero_that_a_packer_let_underflow(dirs, tmp_path):
    """The -1 they are stored as fills its own field and all above it in the word with ones."""
    name = "model.layers.0.mlp.up_proj"
    made = write(dirs["llama"], "v2", 4, 64, least_zero=0)
    zeros = made.layers[name].zero
    assert (zeros > 0).all()  # Else the fixture would not know what is lost.
    # Output 7 is the last of its word: nothing is above it. Outputs 9 to 15 share a word.
    stored = zeros - 1
    stored[1, 7] = 15
    state = OrderedDict(made.state)
    for other, layer in made.layers.items():
        state[f"{other}.qzeros"] = words((layer.zero - 1).T, 4).T.contiguous()
    state[f"{name}.qzeros"] = words(stored.T, 4).T.contiguous()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load(dirs["llama"], saved(state, tmp_path / "m.pt"))
    expected = zeros.copy()
    expected[1, 7] = 0
    assert read_zeros(model.get_submodule(name)).tolist() == expected.tolist()
    stored[0, 9:16] = 15
    state[f"{name}.qzeros"] = words(stored.T, 4).T.contiguous()
    with pytest.warns(UserWarning, match="destroyed 6 zero points") as caught:
        model = load(dirs["llama"], saved(state, tmp_path / "m.pt"))
    assert "\n" not in str(caught[0].message)
    expected[0, 9:16] = 0
    assert read_zeros(model.get_submodule(name)).tolist() == expected.tolist()


def read_zeros(layer: QuantLinear) -> np.ndarray:
    """Zero points (groups, out) of a 4-bit layer, by shifts."""
    stored = layer.qzeros.numpy().astype(np.int64)[:, :, None] >> (4 * np.arange(8)) & 15
    return stored.reshape(len(stored), -1) + layer.zero_offset


def test_a_g_idx_of_zeros_where_there_are_groups(dirs, tmp_path):
    made = write(dirs["llama"], "v1", 4, 64)
    for name in made.layers:
        made.state[f"{name}.g_idx"].zero_()
    check(made, dirs["llama"], saved(made.state, tmp_path / "m.pt"))


def test_a_wide_g_idx(dirs, tmp_path):
    made = write(dirs["llama"], "v1", 4, 64, act=True)
    for name in made.layers:
        made.state[f"{name}.g_idx"] = made.state[f"{name}.g_idx"].long()
    check(made, dirs["llama"], saved(made.state, tmp_path / "m.pt"))
    made.state["model.layers.0.mlp.up_proj.g_idx"][0] = 2**32
    path = saved(made.state, tmp_path / "m.pt")
    refused(dirs["llama"], path, "up_proj.g_idx: holds groups 0..2147483647 where there are 0..3")


def test_sizes_that_the_old_code_cut_off(tmp_path):
    """It packed no more than the last multiple of 256."""
    narrow = llama_config(hidden_size=320, intermediate_size=256, num_hidden_layers=1)
    folder = make_model(tmp_path / "m", narrow)
    made = write(folder, "without_g_idx", 4, 64)
    name = "model.layers.0.self_attn.q_proj"
    made.state[f"{name}.qweight"] = made.state[f"{name}.qweight"][:32].contiguous()
    path = saved(made.state, tmp_path / "m.pt")
    refused(folder, path, "q_proj.qweight lacks the last 64 of 320 inputs")


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("qweight", lambda t: t[:-1], "does not fit 256 inputs"),
        ("qweight", lambda t: t.float(), "is of type torch.float32"),
        ("qzeros", lambda t: t[:, :-1], "has shape .* where"),
        ("qzeros", lambda t: t.half(), "is of type torch.float16"),
        ("scales", lambda t: t[:, :-1], "has shape .* where"),
        ("scales", lambda t: t.int(), "is of type torch.int32"),
        ("scales", lambda t: t[0], "is not a matrix"),
        ("scales", lambda t: torch.full_like(t, float("nan")), "hold NaN or infinity"),
        ("g_idx", lambda t: t[:-1], "has shape"),
        ("g_idx", lambda t: t - 1, "holds groups -1..2"),
    ],
)
def test_tensors_that_cannot_be(key, change, message, dirs, tmp_path):
    made = write(dirs["llama"], "v1")
    name = f"model.layers.0.mlp.up_proj.{key}"
    made.state[name] = change(made.state[name]).contiguous()
    refused(
        dirs["llama"], saved(made.state, tmp_path / "m.pt"), f"{name.rpartition('.')[0]}.*{message}"
    )


def test_floating_zeros_that_are_not_multiples(dirs, tmp_path):
    made = write(dirs["llama"], "float_zeros", 3, -1)
    made.state["model.layers.0.mlp.up_proj.zeros"] *= 1.1
    path = saved(made.state, tmp_path / "m.pt")
    refused(dirs["llama"], path, "up_proj.zeros are not zero points times scales")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quant_method": "aqlm"}, "quantized by 'aqlm', not by GPTQ"),
        ({"checkpoint_format": "marlin"}, "its format is 'marlin'"),
        ({"format": ["gptq"]}, "its format is"),
        ({"pack_dtype": "int16"}, "its words are 'int16'"),
        ({"bits": "4"}, "bits is '4', which is not a whole number"),
        ({"bits": 8}, "holds 4-bit weights, not 8-bit"),
        ({"bits": True}, "bits is True"),
        ({"group_size": 0}, "group_size is 0, which cannot be"),
        ({"group_size": 128}, "has 4 groups of 256 inputs, not what groups of 128 give"),
    ],
)
def test_settings_that_cannot_be(changes, message, dirs, tmp_path):
    made = write(dirs["llama"], "v1")
    said = {**AUTOGPTQ, **changes}
    folder = folder_of(
        dirs, "llama", made, tmp_path / "m", "model.safetensors", quantize_config=said
    )
    refused(folder, None, message)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("model.layers.0.mlp.up_proj.B", "is in the marlin layout"),
        ("model.layers.0.mlp.up_proj.q_weight", "is in the EXL2 layout"),
    ],
)
def test_other_layouts(key, message, dirs, tmp_path):
    state = {key: torch.zeros(16, 16, dtype=torch.int32)}
    refused(dirs["llama"], saved(state, tmp_path / "m.pt"), message)


def test_an_encrypted_file(dirs, tmp_path):
    made = write(dirs["llama"], "v1")
    path = saved(made.state, tmp_path / "m.pt")
    key = b"the key that goes over the file again and again"
    data = np.frombuffer(path.read_bytes(), np.uint8)
    path.write_bytes((data ^ np.resize(np.frombuffer(key, np.uint8), len(data))).tobytes())
    refused(dirs["llama"], path, "encrypted as BELLE's published LLaMA files are")


def test_settings_that_are_no_json(dirs, tmp_path):
    made = write(dirs["llama"], "v1")
    folder = folder_of(dirs, "llama", made, tmp_path / "m", "model.safetensors")
    for text in ("{", "[]", "null", "\x00"):
        (folder / "quantize_config.json").write_text(text)
        refused(folder, None, "its settings are not")
    (folder / "quantize_config.json").write_bytes(b"\xff\xfe")
    refused(folder, None, "cannot be read as text")
