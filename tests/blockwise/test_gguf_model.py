import struct
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as GgmlType
from helpers.gguf_models import ROPES, make_tiny, write_dense
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from gptq.blockwise.gguf_config import gguf_config, gguf_keys
from gptq.blockwise.gguf_model import (
    gguf_name,
    gguf_rows,
    interleave_qkv,
    open_gguf,
    unpermute_rotary,
)
from gptq.blockwise.gguf_rope import FACTORS, rope_keys, rope_tensors
from gptq.blockwise.source import open_model
from gptq.errors import UserError
from gptq.models import LLAMA, SPECS

LLAMA_PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
BLOOM_PARTS = {
    "input_layernorm": "attn_norm",
    "self_attention.query_key_value": "attn_qkv",
    "self_attention.dense": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.dense_h_to_4h": "ffn_up",
    "mlp.dense_4h_to_h": "ffn_down",
    "transformer.word_embeddings": "token_embd",
    "transformer.word_embeddings_layernorm": "token_embd_norm",
    "transformer.ln_f": "output_norm",
    "lm_head": "output",
}


def expected_name(name: str, parts: dict[str, str]) -> str:
    module, kind = name.rsplit(".", 1)
    for prefix in ("model.layers.", "transformer.h."):
        if module.startswith(prefix):
            index, part = module.removeprefix(prefix).split(".", 1)
            return f"blk.{index}.{parts[part]}.{kind}"
    return f"{parts[module]}.{kind}"


def permuted(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Row by row: the two halves of each head become its even and its odd rows."""
    half = len(tensor) // heads // 2
    order = [
        h * 2 * half + side * half + i for h in range(heads) for i in range(half) for side in (0, 1)
    ]
    return tensor[order]


def parted(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Row by row: every head's query, then every head's key, then every head's value."""
    dim = len(tensor) // heads // 3
    order = [
        (h * 3 + which) * dim + i for which in range(3) for h in range(heads) for i in range(dim)
    ]
    return tensor[order]


def add_tensor(writer: gguf.GGUFWriter, name: str, tensor: torch.Tensor, kind: GgmlType) -> None:
    if tensor.ndim == 1 or kind == GgmlType.F32:
        writer.add_tensor(name, tensor.numpy())
    elif kind == GgmlType.F16:
        writer.add_tensor(name, tensor.half().numpy())
    else:
        writer.add_tensor(name, gguf.quantize(tensor.numpy(), kind), raw_dtype=kind)


def tiny_llama(**changes) -> LlamaForCausalLM:
    torch.manual_seed(3)
    config = LlamaConfig(
        **{
            "vocab_size": 40,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
            "tie_word_embeddings": False,
            "initializer_range": 0.5,
            "pad_token_id": 3,
            **changes,
        }
    )
    return randomised(LlamaForCausalLM(config))


def tiny_bloom(**changes) -> BloomForCausalLM:
    torch.manual_seed(4)
    config = BloomConfig(vocab_size=40, hidden_size=64, n_layer=2, n_head=4, **changes)
    return randomised(BloomForCausalLM(config))


def tiny_qwen2() -> Qwen2ForCausalLM:
    torch.manual_seed(5)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    rope = {"rope_type": "default", "rope_theta": 5000.0}
    return randomised(
        Qwen2ForCausalLM(Qwen2Config(vocab_size=40, rope_parameters=rope, **sizes, **heads))
    )


def randomised(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)  # norms and biases too
    return model.eval()


def write_gguf(path, model, kind=GgmlType.F32, extra=None, values=(), arch=None):
    """What llama.cpp's converter makes of `model`; `extra` tensors and `values` come on top."""
    config = model.config
    rotary = config.model_type != "bloom"
    writer = gguf.GGUFWriter(path, arch or config.model_type)
    writer.add_name("a model")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(128)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(3)
    if rotary:
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        head_dim = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
        writer.add_rope_dimension_count(head_dim)
        writer.add_vocab_size(config.vocab_size)
    else:
        writer.add_feed_forward_length(4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_token_list([f"t{i}" for i in range(config.vocab_size)])
    writer.add_token_types([1] * config.vocab_size)
    for key, value in values:
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if "q_proj" in name and config.model_type == "llama":
            tensor = permuted(tensor, config.num_attention_heads)
        elif "k_proj" in name and config.model_type == "llama":
            tensor = permuted(tensor, config.num_key_value_heads)
        elif "query_key_value" in name:
            tensor = parted(tensor, config.n_head)
        parts = LLAMA_PARTS if rotary else BLOOM_PARTS
        add_tensor(writer, expected_name(name, parts), tensor, kind)
    for name, tensor in (extra or {}).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def reloaded(path):
    config = gguf_config(path)
    model = AutoModelForCausalLM.from_config(config)
    result = model.load_state_dict(dict(open_gguf(path)), strict=False)
    assert not result.unexpected_keys
    tied = ["lm_head.weight"] if config.tie_word_embeddings else []
    assert result.missing_keys == tied
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(torch.arange(30).reshape(2, 15) % model.config.vocab_size).logits


LLAMAS = {
    "grouped": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "one-kv-head": {"num_key_value_heads": 1},
    "ungrouped-long-heads": {"num_key_value_heads": 4, "head_dim": 32},
}


@pytest.mark.parametrize("case", LLAMAS)
def test_llama_gives_the_same_logits(tmp_path, case):
    model = tiny_llama(**LLAMAS[case])
    values = [("llama.attention.key_length", 32)] if "head_dim" in LLAMAS[case] else []
    path = write_gguf(tmp_path / "m.gguf", model, values=values)
    again = reloaded(path)
    assert torch.equal(logits(again), logits(model))
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


@pytest.mark.parametrize("tied", [True, False])
def test_bloom_gives_the_same_logits(tmp_path, tied):
    model = tiny_bloom(tie_word_embeddings=tied)
    again = reloaded(write_gguf(tmp_path / "m.gguf", model))
    assert torch.equal(logits(again), logits(model))
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_another_architecture_is_one_record(tmp_path, monkeypatch):
    """Qwen2: llama.cpp keeps the order of rows, and biases of q, k and v are always there."""
    names = replace(LLAMA.gguf, architecture="qwen2", row_order={}, flags={})
    spec = replace(LLAMA, model_type="qwen2", architecture="Qwen2ForCausalLM", gguf=names)
    monkeypatch.setitem(SPECS, "qwen2", spec)
    model = tiny_qwen2()
    again = reloaded(write_gguf(tmp_path / "m.gguf", model))
    assert isinstance(again, Qwen2ForCausalLM)
    assert torch.equal(logits(again), logits(model))


def test_shapes_and_types_are_known_without_reading(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", tiny_llama(), GgmlType.Q8_0)
    tensors = open_gguf(path)
    for name in tensors:
        assert tensors.shape(name) == tensors[name].shape
        assert tensors.dtype(name) == tensors[name].dtype


@pytest.mark.parametrize("kind", [GgmlType.F16, GgmlType.BF16, GgmlType.Q8_0, GgmlType.Q4_1])
def test_types(tmp_path, kind):
    model = tiny_llama()
    tensors = open_gguf(write_gguf(tmp_path / "m.gguf", model, kind))
    plain = {GgmlType.F16: torch.float16, GgmlType.BF16: torch.bfloat16}
    for name, original in model.state_dict().items():
        got = tensors[name]
        if original.ndim == 1:
            assert torch.equal(got, original)
        elif kind in plain:
            assert got.dtype == plain[kind]
            assert torch.equal(got, original.to(plain[kind]))
        else:  # rows are quantized one by one, so their order does not matter
            expected = gguf.dequantize(gguf.quantize(original.numpy(), kind), kind)
            assert got.dtype == torch.float32
            assert torch.equal(got, torch.from_numpy(expected))


@pytest.mark.parametrize("make", [tiny_llama, tiny_bloom])
def test_config_is_what_transformers_makes_of_the_file(tmp_path, make):
    write_gguf(tmp_path / "m.gguf", make())
    ours = gguf_config(tmp_path / "m.gguf").to_dict()
    theirs = AutoConfig.from_pretrained(tmp_path, gguf_file="m.gguf").to_dict()
    differ = {key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)}
    assert differ <= {"architectures", "_model_name_or_path", "_name_or_path", "dtype"}
    assert ours["architectures"] == [make().__class__.__name__]
    assert ours["pad_token_id"] == 3


def test_inverses_on_numbers_that_can_be_read():
    heads_of_four = torch.tensor([0, 2, 1, 3, 10, 12, 11, 13])
    assert unpermute_rotary(heads_of_four, 2).tolist() == [0, 1, 2, 3, 10, 11, 12, 13]
    qkv = torch.tensor([10, 11, 20, 21, 30, 31]).repeat_interleave(2).reshape(6, 2)
    assert interleave_qkv(qkv, 2)[:, 0].tolist() == [10, 20, 30, 11, 21, 31]


def test_tensors_are_read_when_asked_for(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", tiny_llama())
    tensors = open_gguf(path)
    before = tensors["model.norm.weight"]
    data = bytearray(path.read_bytes())
    at = data.index(before.numpy().tobytes())
    data[at : at + before.nbytes] = bytes(before.nbytes)
    path.write_bytes(data)
    assert before.abs().sum() > 0
    assert tensors["model.norm.weight"].abs().sum() == 0


def test_old_rotary_table_is_left_out(tmp_path):
    extra = {"blk.0.attn_rot_embd.weight": np.ones(8, np.float32)}
    path = write_gguf(tmp_path / "m.gguf", tiny_llama(), extra=extra)
    assert set(open_gguf(path)) == set(tiny_llama().state_dict())


# Bad files -------------------------------------------------------------------------------------


def refused(path, *words):
    for read in (open_gguf, gguf_config):
        with pytest.raises(UserError) as caught:
            read(path)
        message = str(caught.value)
        assert "\n" not in message
        for word in (path.name, *words):
            assert word in message


ONE = np.ones(8, np.float32)
VARIANTS = {
    "arch": ({"arch": "falcon"}, "'falcon' model; llama, bloom, qwen2, qwen3, "),
    "split": ({"values": [("split.count", 3)]}, "llama-gguf-split --merge"),
    "alignment": ({"values": [("general.alignment", 0)]}, "alignment"),
}


@pytest.mark.parametrize("case", VARIANTS)
def test_variants_that_are_not_supported(tmp_path, case):
    arguments, word = VARIANTS[case]
    if case == "alignment":  # the writer itself would use it
        path = write_gguf(tmp_path / "m.gguf", tiny_llama(), values=[("general.alignmenT", 0)])
        path.write_bytes(path.read_bytes().replace(b"general.alignmenT", b"general.alignment"))
    else:
        path = write_gguf(tmp_path / "m.gguf", tiny_llama(), **arguments)
    refused(path, word)


@pytest.mark.parametrize("kind", ["none", *ROPES])
def test_scaled_positions_both_ways(tmp_path, kind):
    """The keys and the tensor that llama.cpp's converter writes, by its names."""
    rope = {"rope_type": "default" if kind == "none" else kind, "rope_theta": 500.0}
    rope |= ROPES.get(kind, {})
    model = tiny_llama(rope_parameters=rope)
    values: list[tuple[str, object]] = []
    if kind in ("linear", "yarn"):
        values += [("llama.rope.scaling.type", kind), ("llama.rope.scaling.factor", 4.0)]
    if kind in ("yarn", "llama3"):
        original = rope["original_max_position_embeddings"]
        values += [("llama.rope.scaling.original_context_length", original)]
    extra = {"rope_freqs.weight": llama3_factors(rope)} if kind == "llama3" else {}
    path = write_gguf(tmp_path / "m.gguf", model, values=values, extra=extra)
    config = gguf_config(path)
    assert config.rope_parameters == rope
    assert torch.equal(logits(reloaded(path)), logits(model))
    keys = rope_keys(model.config, LLAMA.gguf)
    expected = {"llama.rope.freq_base": 500.0, **dict(values)}
    assert {f"llama.{key}": value for key, value in keys.items()} == expected
    factors = rope_tensors(model.config)
    assert factors.keys() == extra.keys()
    if kind == "llama3":
        np.testing.assert_allclose(factors[FACTORS], extra[FACTORS], rtol=1e-5)


def llama3_factors(rope, head_dim=16) -> np.ndarray:
    """What Llama 3.1's paper and code divide each frequency by, one at a time."""
    factors = []
    for i in range(head_dim // 2):
        wavelength = 2 * np.pi * rope["rope_theta"] ** (2 * i / head_dim)
        turns = rope["original_max_position_embeddings"] / wavelength
        share = min(max((turns - 1) / 3, 0), 1)
        factors.append(1 / (share + (1 - share) / rope["factor"]))
    assert 1 in factors
    assert rope["factor"] in factors
    return np.array(factors, np.float32)


BAD_ROPES = {
    "other-factors": (
        {"extra": {"rope_freqs.weight": ONE + np.arange(8, dtype=np.float32)}},
        "llama3",
    ),
    "too-few-factors": ({"extra": {"rope_freqs.weight": np.ones(3, np.float32)}}, "llama3"),
    "longrope": ({"values": [("llama.rope.scaling.type", "longrope")]}, "longrope"),
    "no-factor": ({"values": [("llama.rope.scaling.type", "linear")]}, "rope.scaling.factor"),
}


@pytest.mark.parametrize("case", BAD_ROPES)
def test_scaled_positions_that_cannot_be_taken(tmp_path, case):
    arguments, word = BAD_ROPES[case]
    path = write_gguf(tmp_path / "m.gguf", tiny_llama(), **arguments)
    with pytest.raises(UserError, match=word) as caught:
        gguf_config(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "yarn", "factor": 2.0, "beta_fast": 16.0},
        {"rope_type": "yarn", "factor": 2.0, "attention_factor": 2.0},
        {"rope_type": "default", "partial_rotary_factor": 0.5},
    ],
)
def test_scaled_positions_that_cannot_be_written(rope):
    config = LlamaConfig(rope_parameters={"rope_theta": 500.0, **rope})
    with pytest.raises(UserError, match="format gguf cannot describe"):
        rope_keys(config, LLAMA.gguf)


def test_settings_that_change_nothing_are_written():
    factor = 0.1 * np.log(2.0) + 1
    yarn = {"beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": factor, "truncate": True}
    rope = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 2.0, **yarn}
    keys = rope_keys(LlamaConfig(rope_parameters=rope), LLAMA.gguf)
    assert keys["rope.scaling.factor"] == 2.0


@pytest.mark.parametrize("make", [tiny_llama, tiny_bloom])
def test_names_rows_and_keys_are_those_of_llama_cpp(tmp_path, make):
    """Every tensor, written by the slow oracles above, is the product's own name and order."""
    model = make(tie_word_embeddings=False)
    path = write_gguf(tmp_path / "m.gguf", model)
    spec = SPECS[model.config.model_type]
    reader = gguf.GGUFReader(path)
    stored = {tensor.name: tensor.data for tensor in reader.tensors}
    shapes = {}
    for full, tensor in model.state_dict().items():
        name = gguf_name(spec, spec.gguf, full)
        rows = gguf_rows(model.config, spec.gguf, name, len(tensor))
        assert np.array_equal(tensor if rows is None else tensor[rows], stored.pop(name)), full
        shapes[name] = tuple(tensor.shape)
    assert not stored
    keys = gguf_keys(model.config, spec.gguf, shapes)
    for key, value in keys.items():
        field = reader.fields.get(f"{model.config.model_type}.{key}")
        if field is not None and key != "context_length":
            assert field.contents() == pytest.approx(value), key


def test_experts_heads_and_partial_rotation(tmp_path):
    extra = {"blk.0.ffn_gate_inp.weight": ONE}
    path = write_gguf(tmp_path / "moe.gguf", tiny_llama(), extra=extra)
    with pytest.raises(UserError, match=r"blk\.0\.ffn_gate_inp\.weight"):
        open_gguf(path)
    path = write_gguf(tmp_path / "name.gguf", tiny_llama(), extra={"undotted": ONE})
    with pytest.raises(UserError, match="'undotted'"):
        open_gguf(path)
    path = write_gguf(tmp_path / "heads.gguf", tiny_llama())
    path.write_bytes(changed_number(path, "llama.attention.head_count", 5))
    with pytest.raises(UserError, match="64 rows"):
        open_gguf(path)
    path.write_bytes(changed_number(path, "llama.attention.head_count", 0))
    refused(path, "llama.attention.head_count")
    path = write_gguf(tmp_path / "partial.gguf", tiny_llama())
    path.write_bytes(changed_number(path, "llama.rope.dimension_count", 8))
    with pytest.raises(UserError, match="a part of each head"):
        gguf_config(path)


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("llama.block_count", "num_hidden_layers"),
        ("llama.attention.head_count", "num_attention_heads"),
        ("llama.embedding_length", "hidden_size"),
        ("llama.feed_forward_length", "intermediate_size"),
    ],
)
def test_numbers_that_would_fill_the_memory(tmp_path, key, name):
    path = write_gguf(tmp_path / "m.gguf", tiny_llama())
    path.write_bytes(changed_number(path, key, (1 << 32) - 64))
    with pytest.raises(UserError, match=f"says {name}|of each head|gives 0 for"):
        gguf_config(path)


def changed_number(path, key: str, number: int) -> bytes:
    """The file with another value for the uint32 of `key`."""
    data = bytearray(path.read_bytes())
    entry = struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", 4)
    at = data.index(entry) + len(entry)
    data[at : at + 4] = struct.pack("<I", number)
    return bytes(data)


def change_key(path, key: str) -> None:
    """Give a key another name of the same length."""
    path.write_bytes(path.read_bytes().replace(key.encode(), key[:-1].encode() + b"X"))


@pytest.mark.parametrize(
    ("arch", "key", "words"),
    [
        ("apertus", "xielu.alpha_p", "no 'xielu.alpha_p' of each block"),
        ("phi3", "rope_factors_long.weight", "'longrope'"),
        ("gemma2", "gemma2.attn_logit_softcapping", "no usable number for 'gemma2.attn_logit"),
        ("gemma2", "blk.0.post_ffw_norm.weight", "a tensor 'blk.0.post_ffw_norm"),
    ],
)
def test_a_value_or_tensor_of_its_own_is_missing(arch, key, words, tmp_path):
    path = tmp_path / "m.gguf"
    write_dense(make_tiny(tmp_path / "model", arch), path)
    change_key(path, key)
    with pytest.raises(UserError, match=words):
        open_model(path)


def test_missing_values_and_embedding(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", tiny_llama())
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"llama.block_count", b"llama.black_count"))
    with pytest.raises(UserError, match=r"llama\.block_count"):
        gguf_config(path)
    path.write_bytes(whole.replace(b"token_embd.weight", b"token_emxd.weight"))
    refused(path, "token_em")


def test_cut_short_anywhere(tmp_path):
    whole = write_gguf(tmp_path / "whole.gguf", tiny_llama()).read_bytes()
    cut = tmp_path / "cut.gguf"
    header = whole.index(b"output.weight") + 100
    for length in [*range(0, header, 37), header, len(whole) // 2, len(whole) - 1]:
        cut.write_bytes(whole[:length])
        refused(cut)


def test_missing_and_other_files(tmp_path):
    refused(tmp_path / "absent.gguf", "No such file")
    (tmp_path / "other.gguf").write_bytes(b"PK\x03\x04 and so on")
    refused(tmp_path / "other.gguf", "not a GGUF file")
    start = b"GGUF" + struct.pack("<I", 3)
    (tmp_path / "v1.gguf").write_bytes(b"GGUF" + struct.pack("<I", 1) + bytes(40))
    refused(tmp_path / "v1.gguf", "version 1")
    (tmp_path / "be.gguf").write_bytes(b"GGUF" + struct.pack(">I", 3) + bytes(40))
    refused(tmp_path / "be.gguf", "big-endian")
    huge = struct.pack("<QQ", 1 << 60, 1 << 60)
    (tmp_path / "huge.gguf").write_bytes(start + huge + bytes(40))
    refused(tmp_path / "huge.gguf", "damaged")


@pytest.mark.parametrize("kind", [0, 4, 8, 9, 13], ids=["u8", "u32", "text", "array", "unknown"])
def test_an_endless_array_ends_at_once(tmp_path, kind):
    array = struct.pack("<IIQ", 9, kind, (1 << 24) if kind == 8 else 1 << 50)
    content = struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"k" + array + bytes(4000)
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + content)
    refused(tmp_path / "m.gguf", "damaged")


@pytest.mark.parametrize("arch", ["llama", "apertus", "phi3", "gemma3_text"])
def test_flipped_header_bytes_never_escape_as_other_errors(arch, tmp_path):
    path = tmp_path / "whole.gguf"
    if arch == "llama":
        write_gguf(path, tiny_llama(num_hidden_layers=1))
    else:
        write_dense(make_tiny(tmp_path / "model", arch), path)
    whole = path.read_bytes()
    # Up to the names of tensors, without most of the tokenizer.
    header = whole.index(b"output.weight" if arch == "llama" else b"tokenizer.ggml.tokens") + 60
    bad = tmp_path / "bad.gguf"
    generator = torch.Generator().manual_seed(2)
    refusals = 0
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(2):
            at = int(torch.randint(header, (1,), generator=generator))
            data[at] = int(torch.randint(256, (1,), generator=generator))
        bad.write_bytes(data)
        try:
            gguf_config(bad)
            for tensor in open_gguf(bad).values():
                assert tensor.nbytes < 10 * len(whole)
        except UserError:
            refusals += 1
    assert refusals > 30
