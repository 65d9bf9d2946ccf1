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
from helpers.gguf_models import QUIRKS, dense, logits, make_tiny, write_dense
from helpers.old_tools import write as made_by
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import gptq
from gptq import QuantConfig, convert
from gptq.blockwise.gguf_config import gguf_config
from gptq.blockwise.gguf_model import open_gguf
from gptq.blockwise.source import open_model
from gptq.checkpoints import gguf_format, gguf_tokenizer
from gptq.checkpoints.gguf_format import refusal
from gptq.errors import UserError
from gptq.files.lazy import Entry
from gptq.models import SPECS
from gptq.nn import QuantEmbedding, QuantLinear, TiedHead

TYPES = {(4, True): "Q4_0", (4, False): "Q4_1", (8, True): "Q8_0"}
CASES = [(arch, *case) for arch in ("llama", "tied", "bloom") for case in TYPES]
# What transformers reads of these architectures, which leaves some settings at their defaults.
READ_BY_TRANSFORMERS: dict[str, dict[str, object]] = {
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 128},
    "stablelm": {"use_qkv_bias": True},
    "nemotron": {},
    "starcoder2": {"sliding_window": None},
    "phi3": {"sliding_window": None},
    "gemma2": {"head_dim": 256, "sliding_window": 8},
    "gemma3_text": {"head_dim": 256, "sliding_window": 8, "num_hidden_layers": 7},
}


def no_window(blocks: int) -> dict[str, object]:
    kinds = ["full_attention"] * blocks
    return {"sliding_window": None, "layer_types": kinds, "num_hidden_layers": blocks}


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


def close(got, expected, share=1e-3):
    assert (got - expected).abs().max() < share * expected.std()


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


@pytest.mark.parametrize("arch", READ_BY_TRANSFORMERS)
def test_transformers_reads_other_architectures(arch, tmp_path):
    folder = make_tiny(tmp_path / "model", arch, READ_BY_TRANSFORMERS[arch])
    write_dense(folder, tmp_path / "m.gguf")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32
    ).eval()
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    close(logits(model), logits(expected), 1e-5)


@pytest.mark.parametrize("arch", QUIRKS)
def test_a_full_model_comes_back(arch, tmp_path):
    folder = make_tiny(tmp_path / "model", arch)
    write_dense(folder, tmp_path / "m.gguf")
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    close(logits(dense(tmp_path / "m.gguf")), logits(expected), 1e-5)
    stored = open_gguf(tmp_path / "m.gguf", SPECS[arch])
    weights = expected.state_dict()
    tied = {"lm_head.weight"} if expected.config.tie_word_embeddings else set()
    assert stored.keys() == weights.keys() - tied
    for name, tensor in stored.items():
        # What is added to norms costs the last bits.
        torch.testing.assert_close(tensor.float(), weights[name], rtol=0, atol=1e-7)


@pytest.mark.parametrize("arch", QUIRKS)
def test_names_are_those_of_the_gguf_package(arch, tmp_path):
    folder = make_tiny(tmp_path / "model", arch)
    write_dense(folder, tmp_path / "m.gguf")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    name = reader.fields["general.architecture"].contents()
    (kind,) = [key for key, known in gguf.MODEL_ARCH_NAMES.items() if known == name]
    names = gguf.get_tensor_name_map(kind, reader.fields[f"{name}.block_count"].contents())
    weights = open_model(folder).tensors
    endings = (".weight", ".bias")
    expected = {names.get_name(full, endings) for full in weights if "act_fn" not in full}
    factors = {tensor.name for tensor in reader.tensors if tensor.name.startswith("rope_")}
    assert {tensor.name for tensor in reader.tensors} - factors == expected
    known = {
        text.replace("{arch}", name)
        for group in vars(gguf.constants.Keys).values()
        if isinstance(group, type)
        for text in vars(group).values()
        if isinstance(text, str)
    } | {"general.quantized_by", "quantize_config"}
    assert {key for key in reader.fields if not key.startswith("GGUF.")} <= known


@pytest.mark.parametrize("arch", QUIRKS)
def test_packed_layers_of_other_architectures(arch, tmp_path, monkeypatch):
    # An architecture's own splitting is known by its vocabulary, which the test's is not.
    monkeypatch.setattr(gguf_tokenizer, "_splitting", lambda *_: "gpt-2")
    # Of 64 layers those of two blocks are enough.
    few = no_window(2) if arch == "exaone4" else None
    folder = make_tiny(tmp_path / "model", arch, few)
    config = QuantConfig(sym=True, method="rtn", group_size=32)
    outputs = {"save": tmp_path / "m.gguf", "save_safetensors": tmp_path / "m.safetensors"}
    gptq.quantize(folder, None, config, **outputs)
    model, _ = gptq.load(tmp_path / "m.gguf")
    expected, _ = gptq.load(folder, tmp_path / "m.safetensors")
    packed, same = (
        {name for name, module in it.named_modules() if isinstance(module, QuantLinear)}
        for it in (model, expected)
    )
    assert len(packed) > 7
    assert packed == same
    # Embeddings are rounded in groups of 32 here and of 64 there.
    close(logits(model), logits(expected), 0.2)
    close(logits(model), logits(dense(tmp_path / "m.gguf")))


@pytest.mark.parametrize("arch", ["mistral", "starcoder2"])
def test_a_context_ends_with_the_window_that_has_no_key(arch, tmp_path):
    folder = make_tiny(tmp_path / "model", arch, {"sliding_window": 20})
    with pytest.warns(UserWarning, match="context ends at 20 tokens"):
        write_dense(folder, tmp_path / "m.gguf")
    config = gguf_config(tmp_path / "m.gguf")
    assert config.max_position_embeddings == 20
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    close(logits(dense(tmp_path / "m.gguf"))[:, :20], logits(expected)[:, :20], 1e-5)


@pytest.mark.parametrize(
    ("arch", "changes", "words"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu', not 'silu'"),
        ("gemma2", {"query_pre_attn_scalar": 64}, "query_pre_attn_scalar is 64, not 32"),
        ("gemma2", {"attn_logit_softcapping": None}, "attn_logit_softcapping is None"),
        ("gemma2", {"layer_types": ["full_attention"] * 3}, "sliding_window is None"),
        ("gemma", {"tie_word_embeddings": False}, "not tied to the embedding"),
        ("olmo2", {"tie_word_embeddings": True}, "is tied to the embedding"),
        ("smollm3", {"no_rope_layers": [1, 1, 0, 1, 1]}, "not 0 for each 4th layer"),
        ("exaone4", {"num_hidden_layers": 2}, "2 layers and sliding_window is 8"),
        ("exaone4", no_window(64), "64 layers and sliding_window is None"),
        ("starcoder2", {"head_dim": 32}, "heads have 32 channels"),
        ("ministral3", {}, "format gguf is not known for ministral3"),
    ],
)
def test_settings_that_llama_cpp_does_not_compute(arch, changes, words, tmp_path):
    folder = make_tiny(tmp_path / "model", arch, {**QUIRKS.get(arch, {}), **changes})
    with pytest.raises(UserError, match=words) as caught:
        write_dense(folder, tmp_path / "m.gguf")
    assert "use another --format" in str(caught.value)
    assert not (tmp_path / "m.gguf").exists()


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


@pytest.mark.parametrize("arch", ["helium", "granite", "phi3", "apertus", "gemma3_text"])
def test_other_architectures_to_a_folder_and_back(arch, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_tokenizer, "_splitting", lambda *_: "gpt-2")
    config = QuantConfig(sym=True, method="rtn", group_size=32)
    gptq.quantize(make_tiny(tmp_path / "model", arch), None, config, save=tmp_path / "m.gguf")
    convert.convert(tmp_path / "m.gguf", tmp_path / "folder")
    convert.convert(tmp_path / "folder", tmp_path / "again.gguf")
    before, after = (gptq.load(tmp_path / name)[0] for name in ("m.gguf", "again.gguf"))
    close(logits(after), logits(before), 1e-5)


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
