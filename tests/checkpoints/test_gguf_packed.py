"""Packed layers of .gguf files that other tools wrote, by the gguf package's own quantizer."""

import json

import gguf
import numpy as np
import pytest
import torch
from conftest import bloom_config, llama_config, make_model
from gguf import GGMLQuantizationType as GgmlType
from helpers.gguf_models import dense, logits

import gptq
from gptq import QuantConfig, convert
from gptq.checkpoints.gguf_packed import has_packed, open_packed
from gptq.errors import UserError
from gptq.nn import QuantEmbedding, QuantLinear


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """Files of this package, by architecture: where others take their keys and names from."""
    folder, files = tmp_path_factory.mktemp("ours"), {}
    for arch, config in (("llama", llama_config(num_hidden_layers=1)), ("bloom", bloom_config())):
        files[arch] = folder / f"{arch}.gguf"
        model = make_model(folder / arch, config)
        settings = QuantConfig(bits=8, sym=True, method="rtn", group_size=32)
        gptq.quantize(model, None, settings, save=files[arch])
    return files


def requantized(source, target, kinds, damage=lambda _name, _blocks: None):
    """The file with its weights quantized anew. kinds: a type, or by the end of a tensor's name."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if not key.startswith(("GGUF.", "general.arch", "quantize_config")):
            writer.add_key_value(key, field.contents(), field.types[0], *field.types[1:2])
    for tensor in reader.tensors:
        kind, data = tensor.tensor_type, tensor.data
        if len(tensor.shape) == 2:
            kind = next((kinds[end] for end in kinds if tensor.name.endswith(end)), kinds[""])
            data = gguf.quantize(gguf.dequantize(data, tensor.tensor_type), kind)
            damage(tensor.name, data)
        writer.add_tensor(tensor.name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


MIXED = {
    "ffn_down.weight": GgmlType.Q8_0,
    "attn_output.weight": GgmlType.Q5_0,
    "token_embd.weight": GgmlType.F16,
    "": GgmlType.Q4_0,
}
FILES = {
    "q4_0": ({"": GgmlType.Q4_0}, 4, 32),
    "q8_0": ({"": GgmlType.Q8_0}, 8, 32),
    "mixed": (MIXED, 4, 32),
}


@pytest.mark.parametrize("arch", ["llama", "bloom"])
@pytest.mark.parametrize("case", FILES)
def test_files_of_other_tools(arch, case, ours, tmp_path):
    kinds, bits, size = FILES[case]
    path = requantized(ours[arch], tmp_path / "m.gguf", kinds)
    model, _ = gptq.load(path)
    expected = logits(dense(path))
    assert (logits(model) - expected).abs().max() < 1e-3 * expected.std()
    declared = model.config.quantization_config
    assert (declared["bits"], declared["group_size"], declared["sym"]) == (bits, size, True)
    packed = {m.bits for m in model.modules() if isinstance(m, QuantLinear)}
    assert packed == ({4, 8} if case == "mixed" else {bits})
    is_packed = isinstance(model.get_input_embeddings(), QuantEmbedding)
    assert is_packed == (case != "mixed")
    # Written as a folder, with the exceptions, it is the same model.
    convert.convert(path, tmp_path / "folder", quantize_embeddings=True)
    again, _ = gptq.load(tmp_path / "folder")
    assert (logits(again) - expected).abs().max() < 0.02 * expected.std()


def test_exceptions_are_named_for_other_readers(ours, tmp_path):
    path = requantized(ours["llama"], tmp_path / "m.gguf", MIXED)
    assert open_packed(path)[1]["dynamic"] == {
        r"-:^model\.layers\.0\.self_attn\.o_proj$": {},
        r"+:^model\.layers\.0\.mlp\.down_proj$": {"bits": 8, "group_size": 32},
    }


def test_layers_that_are_not_packed_are_named_in_a_folder(ours, tmp_path):
    """Those of one type, so that a class would stand for all packed ones."""
    kinds = {"0.attn_output.weight": GgmlType.F16, "": GgmlType.Q8_0}
    path = requantized(ours["llama"], tmp_path / "m.gguf", kinds)
    convert.convert(path, tmp_path / "out", format="compressed-tensors", quantize_embeddings=False)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    declared = config["quantization_config"]
    assert declared["ignore"] == ["lm_head", "model.layers.0.self_attn.o_proj"]
    assert [group["targets"] for group in declared["config_groups"].values()] == [["Linear"]]


def test_minima_of_other_tools_are_dequantized(ours, tmp_path):
    """Their Q4_1 has minima that are no whole number of steps."""
    kinds = {"ffn_down.weight": GgmlType.Q8_0, "": GgmlType.Q4_1}
    path = requantized(ours["llama"], tmp_path / "m.gguf", kinds)
    with pytest.warns(UserWarning, match=r"m\.gguf: 8 of its Q4_1 layers.* dequantized") as warned:
        model, _ = gptq.load(path)
    assert all("\n" not in str(one.message) for one in warned)
    expected = logits(dense(path))
    assert (logits(model) - expected).abs().max() < 1e-3 * expected.std()
    packed = [name for name, m in model.named_modules() if isinstance(m, QuantLinear)]
    assert packed == ["model.layers.0.mlp.down_proj"]


@pytest.mark.parametrize("kind", [GgmlType.Q5_0, GgmlType.Q4_1, GgmlType.F16])
def test_a_file_without_packed_layers_is_a_full_model(kind, ours, tmp_path, recwarn):
    path = requantized(
        ours["llama"], tmp_path / "m.gguf", {"token_embd.weight": GgmlType.Q8_0, "": kind}
    )
    assert not has_packed(path)
    model, _ = gptq.load(path)
    assert torch.equal(logits(model), logits(dense(path)))
    assert not any(isinstance(m, QuantLinear | QuantEmbedding) for m in model.modules())
    said = [str(one.message) for one in recwarn if "Q4_1" in str(one.message)]
    assert len(said) == (kind == GgmlType.Q4_1)
    with pytest.raises(UserError, match="holds no packed weights"):
        convert.convert(path, tmp_path / "new")


def test_a_packed_file_is_an_input_of_quantization(ours, tmp_path):
    path = requantized(ours["llama"], tmp_path / "m.gguf", {"": GgmlType.Q8_0})
    settings = QuantConfig(sym=True, method="rtn", group_size=32)
    gptq.quantize(path, None, settings, save=tmp_path / "new.gguf")
    fields = [gguf.GGUFReader(file).fields for file in (path, tmp_path / "new.gguf")]
    for key in fields[0]:
        if key.startswith("tokenizer."):
            assert fields[1][key].contents() == fields[0][key].contents(), key
            assert fields[1][key].types == fields[0][key].types, key
    assert gptq.load(tmp_path / "new.gguf")[0].model.layers[0].mlp.up_proj.bits == 4


# Damaged files -----------------------------------------------------------------------------------


def refused(path, words):
    with pytest.raises(UserError, match=words) as caught:
        gptq.load(path)
    assert "\n" not in str(caught.value)
    assert path.name in str(caught.value)


def test_scales_that_are_no_numbers(ours, tmp_path):
    def damage(name, blocks):
        if name == "blk.0.ffn_up.weight":
            blocks[3, :2] = [0, 0x7E]

    path = requantized(ours["llama"], tmp_path / "m.gguf", {"": GgmlType.Q4_0}, damage)
    refused(path, "up_proj.scales hold NaN or infinity; the file is damaged")


def test_settings_that_are_not_json_and_sizes_that_do_not_hold(ours, tmp_path):
    whole = ours["llama"].read_bytes()
    path = tmp_path / "m.gguf"
    path.write_bytes(whole.replace(b'{"quant_method"', b'["quant_method"'))
    refused(path, "its settings are not JSON")
    # Blocks of a group must be alike; if they are not, a program has changed the file since.
    for size in (b"64", b"-1", b"33"):
        path.write_bytes(whole.replace(b'"group_size": 32', b'"group_size": ' + size))
        assert gptq.load(path)[0].model.layers[0].mlp.up_proj.group_size == 32


def test_cut_short(ours, tmp_path):
    whole = ours["llama"].read_bytes()
    path = tmp_path / "m.gguf"
    for length in (3, 100, len(whole) // 2, len(whole) - 40):
        path.write_bytes(whole[:length])
        refused(path, "cut short|not a GGUF file")
    path.write_bytes(whole)
    np.testing.assert_equal(gptq.load(path)[0].config.vocab_size, 320)
