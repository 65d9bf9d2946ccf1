"""Models whose layers have different widths, in every format: the same weights, bit for bit."""

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import bloom_config, llama_config, make_model
from helpers.mixed import mixed_widths
from helpers.old_tools import PROBE

import gptq
from gptq import QuantConfig, QuantLinear, convert
from gptq.checkpoints.compatibility import facts, lines, output_lines
from gptq.config import Width
from gptq.errors import UserError
from gptq.models import BLOOM, LLAMA
from quant_cuda.reference import dequantize

SPECS = {"llama": LLAMA, "bloom": BLOOM}
RUN = {"nsamples": 4, "seqlen": 32}
# What each format can hold.
WHOLE = tuple(Width(*it) for it in ((4, 32), (2, 64), (8, -1), (3, 128), (4, 64), (3, 32), (8, 32)))
TABLES = {
    "gptq": WHOLE,
    "gptq_v2": WHOLE,
    "compressed-tensors": WHOLE,
    "mlx": tuple(Width(*it) for it in ((4, 32), (2, 64), (8, 128), (3, 128), (4, 64), (3, 32))),
    "gguf": tuple(Width(*it) for it in ((4, 32), (8, 64), (4, 128), (8, 32), (4, -1))),
}
CASES = [
    (arch, name, sym)
    for arch in SPECS
    for name in TABLES
    for sym in (False, True)
    # mlx-lm runs no BLOOM; 8 bits in a .gguf file are symmetric; "gptq" in a folder is.
    if (arch, name) != ("bloom", "mlx") and (sym or name != "gguf")
]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    llama = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3}
    return {
        "llama": make_model(folder / "llama", llama_config(**llama)),
        "bloom": make_model(folder / "bloom", bloom_config(hidden_size=128, n_layer=3)),
    }


def weights_of(model) -> dict[str, torch.Tensor]:
    return {
        name: dequantize(it.packed(), torch.float32)
        for name, it in model.named_modules()
        if isinstance(it, QuantLinear) and name != "lm_head"
    }


def widths_of(model) -> dict[str, Width]:
    return {
        name: Width(it.bits, it.group_size)
        for name, it in model.named_modules()
        if isinstance(it, QuantLinear) and name != "lm_head"
    }


def logits(model):
    with torch.no_grad():
        return model(PROBE, use_cache=False).logits


def target(tmp_path: Path, name: str, what: str) -> Path:
    return tmp_path / (f"{what}.gguf" if name == "gguf" else what)


def same_weights(model, expected: dict[str, torch.Tensor]) -> None:
    found = weights_of(model)
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize(("arch", "name", "sym"), CASES)
def test_written_by_a_run_and_by_conversion(arch, name, sym, models, tmp_path, text_file):
    folder, widths = models[arch], mixed_widths(SPECS[arch], 3, TABLES[name])
    config = QuantConfig(sym=sym, refine=1)
    written = target(tmp_path, name, "run")
    files = {"save": written} if name == "gguf" else {"save_dir": written, "format": name}
    # Next to a .gguf file there is no place for a .pt file.
    other = {"save_safetensors": tmp_path / "m.safetensors"}
    gptq.quantize(folder, text_file, config, widths=widths, **files, **other, **RUN)
    reference, _ = gptq.load(folder, tmp_path / "m.safetensors")
    assert widths_of(reference) == widths
    expected = weights_of(reference)
    model, _ = gptq.load(written)
    assert widths_of(model) == widths
    same_weights(model, expected)
    # From the file of format gptq_v2 to this format, and back into a file.
    converted = target(tmp_path, name, "converted")
    convert.convert(tmp_path / "m.safetensors", converted, model=folder, format=name)
    again, _ = gptq.load(converted)
    assert widths_of(again) == widths
    same_weights(again, expected)
    back = tmp_path / "back.pt"
    convert.convert(converted, back, model=folder)
    last, _ = gptq.load(folder, back)
    assert widths_of(last) == widths
    same_weights(last, expected)
    if name != "gguf":
        assert declared(written) == declared(converted)


def declared(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"] | {"meta": None}


@pytest.mark.parametrize("arch", SPECS)
def test_act_order_keeps_its_groups(arch, models, tmp_path, text_file):
    """Groups of scattered inputs in some layers; one group of all inputs has no such order."""
    widths = mixed_widths(SPECS[arch], 3, WHOLE)
    config = QuantConfig(order="act", group_size=-1)
    out = {"save_dir": tmp_path / "out", "save": tmp_path / "m.pt"}
    gptq.quantize(models[arch], text_file, config, widths=widths, **out, **RUN)
    reference, _ = gptq.load(models[arch], tmp_path / "m.pt")
    model, _ = gptq.load(tmp_path / "out")
    said = declared(tmp_path / "out")
    assert (said["format"], said["desc_act"]) == ("gptq_v2", True)
    assert widths_of(model) == widths_of(reference) == widths
    same_weights(model, weights_of(reference))
    scattered = {
        name
        for name, it in model.named_modules()
        if isinstance(it, QuantLinear)
        and it.g_idx is not None
        and bool((it.g_idx.diff() < 0).any())
    }
    inputs = {name: model.get_submodule(name).in_features for name in widths}
    assert scattered == {name for name, it in widths.items() if -1 < it.group_size < inputs[name]}


# What readers find ---------------------------------------------------------------------------


def matching(rules: dict[str, dict], name: str) -> dict:
    """As GPTQModel, vLLM and SGLang look a layer up: the first rule that matches."""
    return next((it for rule, it in rules.items() if re.match(rule.removeprefix("+:"), name)), {})


FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def fused_names(widths: dict[str, Width]) -> dict[str, Width]:
    """The layers as vLLM and SGLang build them."""
    fused = {}
    for name, width in widths.items():
        parent, _, last = name.rpartition(".")
        whole = next((it for it, parts in FUSED.items() if last in parts), last)
        fused[f"{parent}.{whole}"] = width
    return fused


@pytest.mark.parametrize("sym", [False, True])
def test_rules_for_every_layer_and_for_fused_ones(sym, models, tmp_path):
    widths = mixed_widths(LLAMA, 3, WHOLE)
    config = QuantConfig(method="rtn", sym=sym)
    for name in ("gptq", "compressed-tensors"):
        out = tmp_path / name
        gptq.quantize(models["llama"], None, config, widths=widths, save_dir=out, format=name)
    said = declared(tmp_path / "gptq")
    base = {"bits": said["bits"], "group_size": said["group_size"]}
    groups = declared(tmp_path / "compressed-tensors")["config_groups"].values()
    assert "Linear" not in {target for group in groups for target in group["targets"]}
    assert len(groups) == len(set(widths.values()))
    for layer, width in {**widths, **fused_names(widths)}.items():
        found = {**base, **matching(said["dynamic"], layer)}
        assert found == {"bits": width.bits, "group_size": width.group_size}, layer
        (weights,) = [
            group["weights"]
            for group in groups
            if any(re.match(it.removeprefix("re:"), layer) for it in group["targets"])
        ]
        assert (weights["num_bits"], weights["group_size"] or -1) == (width.bits, width.group_size)
        assert weights["strategy"] == ("channel" if width.group_size == -1 else "group")
    assert not matching(said["dynamic"], "lm_head")


def test_the_most_common_width_is_that_of_most_weights(models, tmp_path):
    """q_proj and o_proj are more layers than down_proj of all blocks, but fewer weights."""
    down = {f"model.layers.{i}.mlp.down_proj": Width(8, 32) for i in range(3)}
    gate = {
        f"model.layers.{i}.mlp.{k}_proj": Width(8, 32) for i in range(3) for k in ("gate", "up")
    }
    gptq.quantize(
        models["llama"],
        None,
        QuantConfig(method="rtn", sym=True),
        widths={**down, **gate},
        save_dir=tmp_path / "out",
    )
    said = declared(tmp_path / "out")
    assert (said["format"], said["bits"], said["group_size"]) == ("gptq", 8, 32)
    assert said["dynamic"] == {
        r"+:^model\.layers\.\d+\.self_attn\.(q_proj|k_proj|v_proj|qkv_proj)$": {
            "bits": 4,
            "group_size": 128,
        },
        r"+:^model\.layers\.\d+\.self_attn\.o_proj$": {"bits": 4, "group_size": 128},
    }


@pytest.mark.parametrize("by_class", [False, True])
def test_targets_tell_groups_that_shapes_do_not(by_class, models, tmp_path):
    """192 inputs are two groups of 96, and one of 128 and one of 64."""
    folder = make_model(tmp_path / "model", llama_config(intermediate_size=192, hidden_size=128))
    table = {f"model.layers.{i}.mlp.down_proj": Width(4, 96) for i in range(2)}
    out = tmp_path / "out"
    config = QuantConfig(method="rtn")
    gptq.quantize(folder, None, config, widths=table, save_dir=out, format="compressed-tensors")
    if by_class:
        # As llm-compressor writes the groups of a recipe.
        settings = json.loads((out / "config.json").read_text())
        groups = settings["quantization_config"]["config_groups"]
        (base,) = [it for it in groups.values() if it["weights"]["group_size"] == 128]
        base["targets"] = ["Linear"]
        (out / "config.json").write_text(json.dumps(settings))
    found = widths_of(gptq.load(out)[0])
    assert found == {**dict.fromkeys(found, Width(4, 128)), **table}
    # Rules of format gptq tell it too.
    convert.convert(out, tmp_path / "gptq", format="gptq_v2")
    assert widths_of(gptq.load(tmp_path / "gptq")[0]) == found


# What cannot be ------------------------------------------------------------------------------

REFUSED = [
    ("awq", {"model.layers.0.mlp.down_proj": Width(8, 32)}, {}, "unlike bits or groups"),
    ("awq", {"model.layers.0.mlp.down_proj": Width(4, 32)}, {}, "unlike bits or groups"),
    ("mlx", {"model.layers.0.mlp.down_proj": Width(4, -1)}, {}, "down_proj has groups of -1"),
    ("gguf", {"model.layers.0.mlp.down_proj": Width(3, 32)}, {"sym": True}, "down_proj has 3 bits"),
    ("gguf", {"model.layers.0.mlp.down_proj": Width(8, 32)}, {}, "down_proj is asymmetric of 8"),
]


@pytest.mark.parametrize(("name", "widths", "settings", "message"), REFUSED)
def test_what_a_format_cannot_hold(name, widths, settings, message, models, tmp_path, text_file):
    """Before the run, and before anything is written of a conversion."""
    config = QuantConfig(method="rtn", **settings)
    out = target(tmp_path, name, "out")
    files = {"save": out} if name == "gguf" else {"save_dir": out, "format": name}
    with pytest.raises(UserError, match=message) as caught:
        gptq.quantize(models["llama"], None, config, widths=widths, **files)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
    file = tmp_path / "m.safetensors"
    gptq.quantize(models["llama"], None, config, widths=widths, save_safetensors=file)
    with pytest.raises(UserError, match=message):
        convert.convert(file, out, model=models["llama"], format=name)
    assert list(tmp_path.iterdir()) == [file]


# Who reads it --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "widths", "sym", "readers"),
    [
        ("compressed-tensors", {(4, 128), (3, 32)}, False, {"vLLM"}),
        ("compressed-tensors", {(4, 128), (3, 32)}, True, {"vLLM", "transformers with"}),
        ("compressed-tensors", {(4, 128), (4, 32)}, False, {"vLLM", "SGLang"}),
        ("gptq", {(4, 128), (8, 32)}, True, {"vLLM", "SGLang", "GPTQModel"}),
        ("gptq", {(4, 128), (3, 32)}, True, {"GPTQModel"}),
        ("mlx", {(4, 128), (3, 32)}, False, {"mlx-lm"}),
    ],
)
def test_programs_that_load_it(name, widths, sym, readers, models, tmp_path):
    base, other = sorted(widths, reverse=True)
    table = {f"model.layers.{i}.mlp.down_proj": Width(*other) for i in range(3)}
    gptq.quantize(
        models["llama"],
        None,
        QuantConfig(*base, sym=sym, method="rtn"),
        widths=table,
        save_dir=tmp_path / "out",
        format=name,
    )
    said = facts(tmp_path / "out")
    assert {(part.bits, part.group_size) for part in said.parts} == widths
    first, *others = lines(said)
    known = {"vLLM", "SGLang", "transformers with", "GPTQModel", "exllamav2", "mlx-lm"}
    loading = {reader for reader in known if reader in first.replace("transformers with gptq", "")}
    assert loading == readers
    assert all("quantize with" in line for line in others)
    assert output_lines(tmp_path / "out")[:-1] == [first, *others]
