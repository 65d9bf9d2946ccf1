"""transformers loads, runs and saves quantized folders with this package alone; PEFT trains on
them. The oracles are `gptq.load`, which reads files its own way, and dense layers."""

import json

import pytest
import torch
from helpers.old_tools import PROBE, write
from helpers.other_formats import write as write_other
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPTQConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    pipeline,
)

import gptq
from gptq import QuantConfig, QuantLinear, hf
from gptq.errors import UserError

CONFIGS = {
    "llama-asym": ("llama", {"bits": 4, "group_size": 32}),
    "llama-sym8": ("llama", {"bits": 8, "group_size": 64, "sym": True}),
    "llama-act": ("llama", {"bits": 3, "group_size": 32, "order": "act"}),
    "bloom-asym": ("bloom", {"bits": 4, "group_size": -1}),
}


@pytest.fixture(scope="module", autouse=True)
def registered():
    from transformers.quantizers import auto

    tables = (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING)
    before = [dict(table) for table in tables]
    hf.register()
    yield
    for table, rows in zip(tables, before, strict=True):
        table.update(rows)


@pytest.fixture(scope="module")
def folders(llama_dir, bloom_dir, text_file, tmp_path_factory):
    where = tmp_path_factory.mktemp("folders")
    for name, (arch, settings) in CONFIGS.items():
        source = {"llama": llama_dir, "bloom": bloom_dir}[arch]
        config = QuantConfig(**settings)
        layout = None if config.sym else "gptq_v2"
        windows = {"nsamples": 4, "seqlen": 32}
        gptq.quantize(source, text_file, config, save_dir=where / name, format=layout, **windows)
    return where


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(PROBE.to(model.device), use_cache=False).logits


def packed(model) -> list[QuantLinear]:
    return [module for module in model.modules() if isinstance(module, QuantLinear)]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_from_pretrained(name, dtype, folders):
    model = AutoModelForCausalLM.from_pretrained(folders / name, dtype=dtype)
    assert str(model.dtype) == f"torch.{dtype}"
    # Scales keep what the file has, whatever the model computes in.
    assert {layer.scales.dtype for layer in packed(model)} == {torch.float16}
    expected, _ = gptq.load(folders / name, dtype=dtype)
    # gptq.load rounds a float16 bias to the model's type, which only bfloat16 is too narrow for.
    spread = 0.02 if dtype == "bfloat16" else 0.0
    torch.testing.assert_close(logits(model), logits(expected), rtol=spread, atol=spread)


def test_the_type_is_the_files_where_none_is_given(folders):
    model = AutoModelForCausalLM.from_pretrained(folders / "llama-asym")
    assert model.dtype == torch.float16


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_device_map(device_map, folders):
    model = AutoModelForCausalLM.from_pretrained(folders / "llama-asym", device_map=device_map)
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"cpu"}
    plain = AutoModelForCausalLM.from_pretrained(folders / "llama-asym")
    assert torch.equal(logits(model), logits(plain))


@pytest.mark.parametrize("name", CONFIGS)
def test_save_pretrained(name, folders, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folders / name)
    model.save_pretrained(tmp_path / "again")
    stored = load_file(folders / name / "model.safetensors")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert stored.keys() == again.keys()
    assert all(torch.equal(stored[key], again[key]) for key in stored)
    declared = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    before = json.loads((folders / name / "quantize_config.json").read_text())
    for key in ("bits", "group_size", "sym", "desc_act", "checkpoint_format", "quant_method"):
        assert declared[key] == before[key], key
    once_more = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(once_more), logits(model))


def test_generate_and_pipeline(folders):
    folder = folders / "llama-asym"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    expected, _ = gptq.load(folder)
    inputs = tokenizer("the cat sat", return_tensors="pt", return_token_type_ids=False)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 1}
    ours, theirs = (m.generate(**inputs, **settings) for m in (model, expected))
    assert torch.equal(ours, theirs)
    write_on = pipeline("text-generation", model=str(folder), dtype="float32")
    written = write_on("the cat sat", **settings)[0]["generated_text"]
    assert written == tokenizer.decode(ours[0], skip_special_tokens=True)


def test_torch_compile(folders):
    model = AutoModelForCausalLM.from_pretrained(folders / "llama-asym", dtype="float32")
    expected = logits(model)
    # One block compiled stands for all of them, which would take minutes on a slow machine.
    model.model.layers[0].mlp.compile(backend="aot_eager")
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)


def test_without_the_head(folders):
    # In the file's own type: transformers 5.17 casts nothing that it finds by a longer name.
    model = AutoModel.from_pretrained(folders / "llama-asym")
    whole = AutoModelForCausalLM.from_pretrained(folders / "llama-asym")
    assert len(packed(model)) == len(packed(whole)) == 14
    with torch.no_grad():
        assert torch.equal(model(PROBE)[0], whole.model(PROBE)[0])


def test_dequantize(folders):
    model = AutoModelForCausalLM.from_pretrained(folders / "bloom-asym", dtype="float32")
    before = logits(model)
    dense = model.dequantize()
    assert not packed(dense)
    torch.testing.assert_close(logits(dense), before, rtol=1e-4, atol=1e-4)
    assert not hasattr(dense.config, "quantization_config")


def test_another_architecture(tmp_path):
    """What this package cannot quantize it can still run."""
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 320}
    config = Qwen2Config(**shape, **heads, tie_word_embeddings=False)
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).half().save_pretrained(tmp_path / "dense")
    made = write(tmp_path / "dense", "v1", 4, 32, act=True)
    folder = tmp_path / "packed"
    folder.mkdir()
    declared = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True, "sym": False}
    described = json.loads((tmp_path / "dense" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**described, "quantization_config": declared}))
    save_file(dict(made.state), folder / "model.safetensors", metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    torch.testing.assert_close(logits(model), made.logits, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("era", ["without_g_idx", "float_zeros"])
def test_early_layouts(era, llama_dir, tmp_path):
    made = write(llama_dir, era, 4, -1)
    declared = {"quant_method": "gptq", "bits": 4, "group_size": -1, "sym": False}
    described = json.loads((llama_dir / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({**described, "quantization_config": declared})
    )
    save_file(dict(made.state), tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32")
    assert {layer.scales.dtype for layer in packed(model)} == {torch.float32}
    assert len(packed(model)) == 14
    torch.testing.assert_close(logits(model), made.logits, rtol=2e-4, atol=2e-4)


OTHER_FORMATS = [
    ("llama", "compressed-tensors", 4, 32),
    ("bloom", "compressed-tensors", 3, -1),
    ("llama", "awq", 4, 32),
    ("bloom", "awq", 4, 64),
]


@pytest.mark.parametrize(("arch", "name", "bits", "size"), OTHER_FORMATS)
def test_other_formats(arch, name, bits, size, llama_dir, bloom_dir, tmp_path, capsys):
    source = {"llama": llama_dir, "bloom": bloom_dir}[arch]
    made = write_other(source, tmp_path / "theirs", name, bits, size)
    for arguments in ({}, {"device_map": {"": "cpu"}}):
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / "theirs", dtype="float32", **arguments
        )
        assert len(packed(model)) == len(made.layers)
        assert {layer.bits for layer in packed(model)} == {bits}
        torch.testing.assert_close(logits(model), made.logits, rtol=2e-3, atol=2e-3)
    assert "UNEXPECTED" not in capsys.readouterr().err
    model.save_pretrained(tmp_path / "again")
    declared = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert (declared["quant_method"], declared["format"]) == ("gptq", "gptq_v2")
    assert (declared["bits"], declared["group_size"]) == (bits, size)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype="float32")
    torch.testing.assert_close(logits(again), logits(model))


def test_kinds_that_are_not_read_stay_transformers(llama_dir, tmp_path):
    write_other(llama_dir, tmp_path / "theirs", "compressed-tensors", 4, 32)
    file = tmp_path / "theirs" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["format"] = "float-quantized"
    file.write_text(json.dumps(config))
    with pytest.raises(ImportError, match="compressed-tensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")


def test_quantizing_is_not_transformers_business(llama_dir):
    with pytest.raises(ValueError, match="pre-quantized"):
        AutoModelForCausalLM.from_pretrained(llama_dir, quantization_config=GPTQConfig(bits=4))


def test_a_damaged_folder(folders, tmp_path):
    state = load_file(folders / "llama-asym" / "model.safetensors")
    described = (folders / "llama-asym" / "config.json").read_text()
    (tmp_path / "config.json").write_text(described)
    state["model.layers.0.mlp.up_proj.qzeros"] = torch.zeros(1, 1, dtype=torch.int32)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="qzeros has shape"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_forward_is_differentiable(name, folders):
    model = AutoModelForCausalLM.from_pretrained(folders / name, dtype="float32")
    layer = packed(model)[0]
    x = torch.randn(3, layer.in_features, requires_grad=True)
    twin = x.detach().double().requires_grad_()
    y, dense = layer(x), hf.dense(layer, torch.float64)
    direction = torch.randn_like(y)
    y.backward(direction)
    nn.functional.linear(twin, dense.weight, dense.bias).backward(direction.double())
    torch.testing.assert_close(x.grad, twin.grad.float(), rtol=1e-4, atol=1e-5)
