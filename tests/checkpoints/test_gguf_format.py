"""Models as .gguf files: what is written, and that we and transformers read it again."""

import json
import re
import struct

import gguf
import numpy as np
import pytest
import torch
from conftest import bloom_config, llama_config, make_model
from gguf import GGMLQuantizationType as GgmlType
from helpers.gguf_models import close, dense, logits
from helpers.old_tools import write as made_by
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import gptq
from gptq import QuantConfig, convert
from gptq.checkpoints import gguf_format
from gptq.checkpoints.gguf_format import refusal
from gptq.errors import UserError
from gptq.files.lazy import Entry
from gptq.nn import QuantEmbedding, QuantLinear, TiedHead

TYPES = {(4, True): "Q4_0", (4, False): "Q4_1", (8, True): "Q8_0"}
CASES = [(arch, *case) for arch in ("llama", "tied", "bloom") for case in TYPES]


@pytest.fixture(scope="module")
def dirs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {
        "llama": make_model(folder / "llama", llama_config(num_hidden_layers=1)),
        "tied": make_model(
            folder / "tied", llama_config(num_hidden_layers=1, tie_word_embeddings=True)
        ),
        "bloom": make_model(folder / "bloom", bloom_config(n_layer=1)),
    }


@pytest.fixture(scope="module")
def written(dirs, tmp_path_factory):
    """By architecture, bits and symmetry: a .gguf and a .safetensors of the same integers."""
    folder, files = tmp_path_factory.mktemp("written"), {}
    for arch, bits, sym in CASES:
        config = QuantConfig(bits=bits, sym=sym, method="rtn", group_size=32, embedding_bits=8)
        name = f"{arch}-{bits}-{sym}"
        files[arch, bits, sym] = folder / f"{name}.gguf", folder / f"{name}.safetensors"
        outputs = dict(zip(("save", "save_safetensors"), files[arch, bits, sym], strict=True))
        gptq.quantize(dirs[arch], None, config, **outputs)
    return files


# What is written -------------------------------------------------------------------------------


@pytest.mark.parametrize(("arch", "bits", "sym"), CASES)
def test_types_and_keys(arch, bits, sym, dirs, written):
    path, _ = written[arch, bits, sym]
    reader = gguf.GGUFReader(path)
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert types.pop("token_embd.weight") == "Q8_0"
    assert types.pop("output.weight", None) == ("Q8_0" if arch == "llama" else None)
    for name, kind in types.items():
        linear = name.endswith(".weight") and "norm" not in name
        assert kind == (TYPES[bits, sym] if linear else "F32"), name
    values = {key: field.contents() for key, field in reader.fields.items()}
    assert values["general.file_type"] == {"Q4_0": 2, "Q4_1": 3, "Q8_0": 7}[TYPES[bits, sym]]
    assert values["general.quantization_version"] == 2
    family = "bloom" if arch == "bloom" else "llama"
    assert values["general.architecture"] == family
    expected = {"embedding_length": 64, "block_count": 1, "attention.head_count": 4}
    expected |= {"vocab_size": 320}
    if family == "llama":
        expected |= {"context_length": 128, "feed_forward_length": 96, "rope.dimension_count": 16}
        expected |= {"attention.head_count_kv": 2, "rope.freq_base": 10000.0}
        expected |= {"attention.layer_norm_rms_epsilon": pytest.approx(1e-6)}
    else:
        expected |= {"context_length": 2048, "feed_forward_length": 256}
        expected |= {"attention.layer_norm_epsilon": pytest.approx(1e-5)}
    assert {key: values[f"{family}.{key}"] for key in expected} == expected
    whole = {field.types[0] for key, field in reader.fields.items() if "count" in key[-6:]}
    assert whole <= {gguf.GGUFValueType.UINT32, gguf.GGUFValueType.UINT64}


def test_the_bytes_of_a_layer(dirs, tmp_path):
    """Q4_1 of one output, computed here from what an old tool's checkpoint holds."""
    made = made_by(dirs["llama"], "v1", 4, 32)
    torch.save(made.state, tmp_path / "old.pt")
    convert.convert(tmp_path / "old.pt", tmp_path / "m.gguf", model=dirs["llama"])
    (stored,) = [
        tensor.data
        for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors
        if tensor.name == "blk.0.ffn_down.weight"
    ]
    layer = made.layers["model.layers.0.mlp.down_proj"]
    for block in range(3):
        q = [int(value) for value in layer.q[32 * block : 32 * block + 32, 5]]
        scale, zero = float(layer.scale[block, 5]), int(layer.zero[block, 5])
        expected = struct.pack("<ee", scale, -scale * zero)
        expected += bytes(q[j] + 16 * q[j + 16] for j in range(16))
        assert bytes(stored[5, 20 * block : 20 * block + 20]) == expected


@pytest.mark.parametrize("size", [64, -1, 96])
def test_wider_groups_come_back(size, dirs, tmp_path):
    """Blocks repeat their group's scale; 96 inputs in groups of 64 have a short last one."""
    config = QuantConfig(sym=size == 64, method="rtn", group_size=size)
    files = {"save": tmp_path / "m.gguf", "save_safetensors": tmp_path / "m.safetensors"}
    gptq.quantize(dirs["llama"], None, config, **files)
    convert.convert(tmp_path / "m.gguf", tmp_path / "again.safetensors", format="gptq")
    before, after = (load_file(tmp_path / f"{name}.safetensors") for name in ("m", "again"))
    for name in before:
        if ".layers." in name and not name.endswith("g_idx"):
            assert torch.equal(after[name], before[name]), name
    assert gptq.load(tmp_path / "m.gguf")[0].model.layers[0].mlp.down_proj.group_size == size


# Read again ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arch", "bits", "sym"), CASES)
def test_it_is_loaded_packed(arch, bits, sym, written):
    path, same = written[arch, bits, sym]
    model, tokenizer = gptq.load(path)
    linears = [module for module in model.modules() if type(module) is torch.nn.Linear]
    assert not linears
    packed = [module for module in model.modules() if isinstance(module, QuantLinear)]
    assert len(packed) == {"llama": 8, "tied": 7, "bloom": 4}[arch]
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, QuantEmbedding)
    assert embedding.bits == 8
    if arch != "llama":
        assert isinstance(model.get_output_embeddings(), TiedHead)
    # In Q4_1 minima are rounded, which reading undoes.
    close(logits(model), logits(dense(path)), 1e-3 if sym else 1e-2)
    assert tokenizer("the cat")["input_ids"] == gptq.load(path)[1]("the cat")["input_ids"]
    # The integers are those that the other file has.
    state, stored = model.state_dict(), load_file(same)
    for name in state:
        if ".qweight" in name and "embed" not in name and "lm_head" not in name:
            assert torch.equal(state[name], stored[name]), name
            scales = name.replace("qweight", "scales")
            assert torch.equal(state[scales], stored[scales]), name
    assert model.config.quantization_config["bits"] == bits
    assert model.config.quantization_config["sym"] is sym


@pytest.mark.parametrize(("arch", "bits", "sym"), CASES)
def test_transformers_reads_it(arch, bits, sym, written):
    path, _ = written[arch, bits, sym]
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    close(logits(model.eval()), logits(dense(path)), 1e-4)


@pytest.mark.parametrize("arch", ["llama", "tied", "bloom"])
def test_to_a_folder_and_back(arch, written, tmp_path):
    path, _ = written[arch, 4, True]
    convert.convert(path, tmp_path / "folder")
    close(logits(gptq.load(tmp_path / "folder")[0]), logits(gptq.load(path)[0]), 0.1)
    convert.convert(tmp_path / "folder", tmp_path / "m.gguf")
    before, after = (gguf.GGUFReader(file) for file in (path, tmp_path / "m.gguf"))
    for mine, other in zip(before.tensors, after.tensors, strict=True):
        assert mine.name == other.name
        assert mine.tensor_type == other.tensor_type
        if mine.name.startswith("blk."):
            assert np.array_equal(mine.data, other.data), mine.name
    for key, field in before.fields.items():
        # transformers takes the tokens that fill up the vocabulary for ordinary ones.
        if key.startswith(("tokenizer.", "llama.", "bloom.")) and key[-10:] != "token_type":
            assert after.fields[key].contents() == field.contents(), key


def test_a_packed_embedding_that_fits_stays_as_it_is(dirs, tmp_path):
    config = QuantConfig(sym=True, method="rtn", group_size=32, embedding_bits=8)
    gptq.quantize(dirs["llama"], None, config, save_safetensors=tmp_path / "m.safetensors")
    convert.convert(tmp_path / "m.safetensors", tmp_path / "m.gguf", model=dirs["llama"])
    convert.convert(tmp_path / "m.gguf", tmp_path / "again.safetensors")
    before, after = (load_file(tmp_path / f"{name}.safetensors") for name in ("m", "again"))
    for name in ("model.embed_tokens", "lm_head"):
        assert torch.equal(after[f"{name}.qweight"], before[f"{name}.qweight"])


def test_what_is_written_is_compared(dirs, tmp_path, monkeypatch):
    made = made_by(dirs["llama"], "v1", 4, 32)
    torch.save(made.state, tmp_path / "old.pt")
    right = gguf_format.join
    monkeypatch.setattr(
        gguf_format, "join", lambda kind, blocks: right(kind, blocks._replace(m=blocks.m * 1.02))
    )
    with pytest.raises(RuntimeError, match="not written as it was read"):
        convert.convert(tmp_path / "old.pt", tmp_path / "m.gguf", model=dirs["llama"])
    assert not (tmp_path / "m.gguf").exists()


# What does not fit -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ((4, 32, True, False, 96), None),
        ((4, 64, False, False, 96), None),
        ((8, -1, True, False, 96), None),
        ((3, 32, True, False, 96), "3 bits, .* --wbits 4"),
        ((2, 32, False, False, 96), "2 bits, .* --wbits 4"),
        ((8, 32, False, False, 96), "asymmetric of 8 bits, .* --sym"),
        ((4, 32, True, True, 96), "scattered inputs, .* --order gar"),
        ((4, 16, True, False, 96), "groups of 16 inputs, .* --groupsize 32"),
        ((4, -1, True, False, 48), "48 inputs, not a multiple of 32"),
    ],
)
def test_refusal(settings, words):
    reason = refusal(*settings)
    if words is None:
        assert reason is None
    else:
        assert re.search(words, reason)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bits": 3}, "model.layers.0.self_attn.q_proj has 3 bits"),
        ({"bits": 8}, "use --sym"),
        ({"order": "act"}, "use --order gar"),
        ({"group_size": 16}, "use --groupsize 32"),
        ({"embedding_bits": 16}, "--embedding-bits 16"),
    ],
)
def test_it_is_refused_before_the_run(changes, words, dirs, text_file, tmp_path):
    config = QuantConfig(**{"group_size": 32, **changes})
    steps = []
    with pytest.raises(UserError, match=words):
        gptq.quantize(
            dirs["llama"],
            text_file,
            config,
            save=tmp_path / "m.gguf",
            progress=lambda *step: steps.append(step),
        )
    assert not steps
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_that_does_not_fit(dirs, tmp_path):
    made = made_by(dirs["llama"], "v1", 4, 32, act=True)
    torch.save(made.state, tmp_path / "old.pt")
    with pytest.raises(UserError, match=r"q_proj has groups of scattered inputs"):
        convert.convert(tmp_path / "old.pt", tmp_path / "m.gguf", model=dirs["llama"])
    with pytest.raises(UserError, match=r"format gguf is written to a \.gguf"):
        convert.convert(tmp_path / "old.pt", tmp_path / "m", model=dirs["llama"], format="gguf")


def test_bfloat16_is_kept():
    """Weights of a block's layers that are not packed."""
    weight = torch.randn(3, 32).bfloat16()
    kind, entry = gguf_format._as_it_is(Entry(weight.clone, (3, 32), torch.bfloat16))
    stored = entry.read().numpy()
    assert entry.shape == stored.shape
    assert np.array_equal(gguf.dequantize(stored, kind), weight.float().numpy())


def test_settings_are_in_the_file(written):
    path, _ = written["llama", 4, True]
    text = gguf.GGUFReader(path).fields["quantize_config"].contents()
    assert json.loads(text)["group_size"] == 32
    assert {tensor.tensor_type for tensor in gguf.GGUFReader(path).tensors} == {
        GgmlType.Q4_0,
        GgmlType.Q8_0,
        GgmlType.F32,
    }
