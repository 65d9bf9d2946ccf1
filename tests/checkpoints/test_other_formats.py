"""Formats of other programs, compressed-tensors, awq and mlx: what is read and what is written."""

import json
import re

import numpy as np
import pytest
import torch
from conftest import bloom_config, llama_config, make_model
from helpers.old_tools import PROBE
from helpers.other_formats import FORMATS, write
from safetensors.torch import load_file, save_file

import gptq
from gptq import QuantConfig, QuantLinear, convert
from gptq.checkpoints.awq import pack_columns, unpack_columns
from gptq.cli.run import main
from gptq.errors import UserError
from gptq.models import LLAMA

WIDE = {"hidden_size": 128, "num_hidden_layers": 1}
CASES = [
    *[("compressed-tensors", *case) for case in ((4, 64, False), (4, 32, True), (8, 64, False))],
    *[("compressed-tensors", *case) for case in ((3, 32, False), (2, 64, True), (4, -1, False))],
    *[("awq", *case) for case in ((4, 64, False), (4, 32, True), (4, -1, False))],
    *[("mlx", *case) for case in ((4, 64, False), (4, 32, True), (8, 64, False))],
    *[("mlx", *case) for case in ((3, 32, False), (2, 64, False))],
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    llama = llama_config(**WIDE, intermediate_size=192, num_key_value_heads=4)
    bloom = bloom_config(hidden_size=128, n_layer=1)
    return {
        "llama": make_model(folder / "llama", llama),
        "bloom": make_model(folder / "bloom", bloom),
    }


def logits(folder):
    model, _ = gptq.load(folder)
    with torch.no_grad():
        return model, model(PROBE, use_cache=False).logits


# Reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "bits", "size", "sym"), CASES)
@pytest.mark.parametrize("arch", ["llama", "bloom"])
def test_what_others_wrote_is_read_packed(arch, name, bits, size, sym, models, tmp_path):
    made = write(models[arch], tmp_path / "theirs", name, bits, size, sym)
    model, ours = logits(tmp_path / "theirs")
    torch.testing.assert_close(ours, made.logits, rtol=2e-3, atol=2e-3)
    for layer in made.layers:
        part = model.get_submodule(layer)
        assert isinstance(part, QuantLinear)
        assert part.bits == bits


@pytest.mark.parametrize("name", FORMATS)
def test_the_integers_are_kept(name, models, tmp_path):
    """Read and written again, tensors are as they were, bit for bit."""
    write(models["llama"], tmp_path / "theirs", name)
    convert.convert(tmp_path / "theirs", tmp_path / "v2.safetensors", model=models["llama"])
    convert.convert(
        tmp_path / "v2.safetensors", tmp_path / "ours", model=models["llama"], format=name
    )
    theirs, ours = (load_file(tmp_path / n / "model.safetensors") for n in ("theirs", "ours"))
    packed = [n for n in theirs if "_proj" in n]
    assert len(packed) >= 21
    for tensor in packed:
        assert theirs[tensor].dtype == ours[tensor].dtype
        assert torch.equal(theirs[tensor], ours[tensor]), tensor


def test_zero_points_of_early_compressed_tensors(models, tmp_path):
    """int8, (out, groups), less half the range."""
    made = write(models["llama"], tmp_path / "theirs", "compressed-tensors")
    file = tmp_path / "theirs" / "model.safetensors"
    state = load_file(file)
    for name, layer in made.layers.items():
        signed = torch.from_numpy(layer.zero.T - 8).to(torch.int8)
        state[f"{name}.weight_zero_point"] = signed.contiguous()
    save_file(state, file, {"format": "pt"})
    _, ours = logits(tmp_path / "theirs")
    torch.testing.assert_close(ours, made.logits, rtol=2e-3, atol=2e-3)


def test_a_minimum_between_two_steps_is_dequantized(models, tmp_path):
    made = write(models["llama"], tmp_path / "theirs", "mlx")
    file, name = tmp_path / "theirs" / "model.safetensors", "model.layers.0.mlp.up_proj"
    state = load_file(file)
    state[f"{name}.biases"] += state[f"{name}.scales"] / 2
    save_file(state, file, {"format": "pt"})
    with pytest.warns(UserWarning, match=r"1 layers .*up_proj.* are dequantized"):
        model, _ = logits(tmp_path / "theirs")
    weight, layer = model.get_submodule(name).weight, made.layers[name]
    expected = (layer.dense() + layer.scale[layer.g_idx] / 2).T
    np.testing.assert_allclose(weight.detach().numpy(), expected, atol=4e-4)


def damaged(models, tmp_path, name, change, **settings):
    write(models["llama"], tmp_path / "theirs", name)
    file = tmp_path / "theirs" / "model.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file, {"format": "pt"})
    config_file = tmp_path / "theirs" / "config.json"
    config = json.loads(config_file.read_text())
    key = FORMATS[name][0]
    config[key] |= settings
    config_file.write_text(json.dumps(config))
    return tmp_path / "theirs"


def transform(location):
    """As llm-compressor declares a rotation."""
    place = {"targets": ["re:.*down_proj$"], "location": location, "inverse": False, "ignore": []}
    return {"config_groups": {"R4": {"type": "hadamard", "apply": [place]}}}


LAYER = "model.layers.0.mlp.up_proj"
DAMAGES = {
    "compressed-tensors": [
        (f"{LAYER}.weight_shape", None, {}, "weight_shape is absent"),
        (f"{LAYER}.weight_scale", None, {}, "weight_scale is absent"),
        (f"{LAYER}.weight_packed", slice(0, 5), {}, "weight_packed has shape"),
        (f"{LAYER}.weight_zero_point", slice(0, 5), {}, "weight_zero_point has shape"),
        (f"{LAYER}.weight_zero_point", None, {}, "weight_zero_point is absent"),
        (None, None, {"transform_config": transform("input")}, "a transform of each layer's input"),
        (None, None, {"transform_config": 3}, "config_groups are no JSON objects"),
        (
            *(None, None, {"transform_config": {"config_groups": {"R4": {"apply": 3}}}}),
            "config_groups are no JSON objects",
        ),
        (None, None, {"format": "float-quantized"}, "of kind 'float-quantized'"),
        (None, None, {"config_groups": 3}, "config_groups are no JSON objects"),
    ],
    "awq": [
        (f"{LAYER}.qzeros", None, {}, "qzeros is absent"),
        (f"{LAYER}.scales", slice(0, 1), {}, "scales has shape"),
        (None, None, {"version": "gemv"}, "version 'gemv'"),
        (None, None, {"bits": 8}, "8 bits"),
        (None, None, {"group_size": "x"}, "groups of 'x'"),
    ],
    "mlx": [
        (f"{LAYER}.biases", None, {}, "biases is absent"),
        (f"{LAYER}.scales", slice(0, 5), {}, "scales has shape"),
        (None, None, {"mode": "mxfp4"}, "mode 'mxfp4'"),
        (None, None, {"bits": 5}, "5 bits"),
    ],
}


@pytest.mark.parametrize(
    ("name", "tensor", "part", "settings", "message"),
    [(name, *case) for name, cases in DAMAGES.items() for case in cases],
)
def test_damage_is_one_line(name, tensor, part, settings, message, models, tmp_path):
    def change(state):
        if tensor is None:
            return
        old = state.pop(tensor)
        if part is not None:
            state[tensor] = old[part].clone()

    folder = damaged(models, tmp_path, name, change, **settings)
    with pytest.raises(UserError, match=message) as caught:
        gptq.load(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_a_rotation_that_the_weights_have_is_read(models, tmp_path):
    settings = {"transform_config": transform("weight_output")}
    folder = damaged(models, tmp_path, "compressed-tensors", lambda state: None, **settings)
    rotated = logits(folder)[1]
    (tmp_path / "theirs").rename(tmp_path / "rotated")
    plain = damaged(models, tmp_path, "compressed-tensors", lambda state: None)
    assert torch.equal(logits(plain)[1], rotated)


# Writing -------------------------------------------------------------------------------------


def test_awq_words():
    """Column 0 is the lowest field of a word, then 2, 4, 6, 1, 3, 5, 7."""
    values = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15]])
    words = pack_columns(values)
    assert [f"{word & 0xFFFFFFFF:08X}" for word in words.flatten().tolist()] == [
        "75316420",
        "FDB9ECA8",
    ]
    assert torch.equal(unpack_columns(words), values.to(torch.uint8))


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"sym": True}, "gptq"),
        ({}, "compressed-tensors"),
        ({"bits": 3}, "compressed-tensors"),
        ({"bits": 8, "group_size": -1}, "compressed-tensors"),
        ({"order": "act"}, "gptq_v2"),
        ({"group_size": 80}, "gptq_v2"),
    ],
)
def test_the_format_of_a_folder(settings, name, models, text_file, tmp_path):
    config = QuantConfig(**{"group_size": 64, "refine": 0, **settings})
    where = {"nsamples": 2, "seqlen": 16}
    gptq.quantize(models["llama"], text_file, config, save_dir=tmp_path / "out", **where)
    declared = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    method = declared["quant_method"]
    assert name == (method if method != "gptq" else declared["format"])
    assert (tmp_path / "out" / "quantize_config.json").exists() == (method == "gptq")
    # Without it transformers does not load zero points that are packed.
    assert declared.get("dequantize", False) == (name == "compressed-tensors")
    with torch.no_grad():
        assert bool(torch.isfinite(logits(tmp_path / "out")[1]).all())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--format awq --wbits 3", "has 3 bits, but format awq has 4 only; use --wbits 4"),
        ("--format awq --wbits 4 --act-order", "act-order, which format awq cannot hold; use"),
        ("--format awq --wbits 4 --groupsize 128", "192 inputs.*use --groupsize 64"),
        (
            "--format awq --wbits 4 --groupsize 64 --quantize-embeddings",
            "leave out --quantize-embeddings",
        ),
        ("--format compressed-tensors --wbits 4 --act-order", "in act-order.*use --order gar"),
        ("--format compressed-tensors --wbits 4 --groupsize 128", "192 inputs.*--groupsize 64"),
        ("--format mlx --wbits 4 --groupsize -1", "whole groups of 32, 64 or 128; use"),
        ("--format mlx --wbits 4 --groupsize 128", "whole groups of 32, 64 or 128; use"),
    ],
)
def test_what_cannot_be_held_is_refused_before_the_run(
    words, message, models, text_file, tmp_path, capsys
):
    out = tmp_path / "out"
    command = [str(models["llama"]), str(text_file), *words.split(), "--save-dir", str(out)]
    assert main(LLAMA, command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line)
    assert not any(tmp_path.iterdir())


def test_mlx_has_no_bloom(models, tmp_path):
    config = QuantConfig(method="rtn", group_size=32)
    with pytest.raises(UserError, match="which mlx-lm does not run"):
        gptq.quantize(models["bloom"], None, config, save_dir=tmp_path / "out", format="mlx")


@pytest.mark.parametrize("name", ["compressed-tensors", "mlx"])
def test_packed_embeddings(name, models, tmp_path):
    """The embedding and the head are 8 bit in groups of 64, and named as such."""
    config = QuantConfig(method="rtn", group_size=32)
    out = tmp_path / "out"
    gptq.quantize(
        models["llama"], None, config, save_dir=out, format=name, quantize_embeddings=name != "mlx"
    )
    state = load_file(out / "model.safetensors")
    kind = "weight_packed" if name == "compressed-tensors" else "weight"
    for end in ("model.embed_tokens", "lm_head"):
        assert state[f"{end}.{kind}"].shape == (320, 32)
    declared = json.loads((out / "config.json").read_text())["quantization_config"]
    if name == "mlx":
        assert declared["lm_head"] == {"group_size": 64, "bits": 8, "mode": "affine"}
    else:
        groups = declared["config_groups"].values()
        assert [group["targets"] for group in groups] == [
            ["Embedding", "lm_head"],
            ["Linear"],
        ]
        assert declared["ignore"] == []
    model, ours = logits(out)
    gptq.quantize(models["llama"], None, config, save=tmp_path / "m.pt")
    reference, _ = gptq.load(models["llama"], tmp_path / "m.pt")
    with torch.no_grad():
        torch.testing.assert_close(ours, reference(PROBE, use_cache=False).logits)
    assert type(model.get_input_embeddings()).__name__ == "QuantEmbedding"


def test_layers_of_several_widths_have_groups_of_their_own(models, tmp_path):
    """Read from a file with exceptions and written with a group of layers for each."""
    from helpers.old_tools import write as old

    made = old(models["llama"], "v2", 4, 32, least_zero=0, other={"down_proj": 8})
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq_v2"}
    settings["dynamic"] = {"+:.*down_proj": {"bits": 8}}
    file = tmp_path / "mixed.safetensors"
    save_file(made.state, file, {"quantize_config": json.dumps(settings)})
    convert.convert(file, tmp_path / "out", model=models["llama"])
    declared = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    bits = {
        name: group["weights"]["num_bits"]
        for group in declared["config_groups"].values()
        for name in group["targets"]
    }
    assert bits == {
        r"re:^model\.layers\.\d+\.self_attn\.(q_proj|k_proj|v_proj|qkv_proj)$": 4,
        r"re:^model\.layers\.\d+\.self_attn\.o_proj$": 4,
        r"re:^model\.layers\.\d+\.mlp\.(gate_proj|up_proj|gate_up_proj)$": 4,
        r"re:^model\.layers\.\d+\.mlp\.down_proj$": 8,
    }
    _, ours = logits(tmp_path / "out")
    torch.testing.assert_close(ours, made.logits, rtol=2e-3, atol=2e-3)
