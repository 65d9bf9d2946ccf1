"""Reading checkpoints: this package's own, older tools', and what is not one."""

import json
import re
from collections import OrderedDict

import pytest
import torch
from conftest import llama_config, make_model
from helpers.old_tools import write
from safetensors.torch import load_file, save_file

import gptq
from gptq import QuantConfig, QuantLinear
from gptq.api import open_weights
from gptq.config import Width
from gptq.errors import UserError
from gptq.nn import QuantEmbedding

PROBE = torch.randint(2, 300, (2, 20), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def made(llama_dir, text_file, tmp_path_factory):
    """A 4-bit checkpoint in groups of 32, as .pt and safetensors."""
    folder = tmp_path_factory.mktemp("made")
    gptq.quantize(
        llama_dir,
        text_file,
        QuantConfig(bits=4, group_size=32, embedding_bits=16),
        save=folder / "m.pt",
        save_safetensors=folder / "m.safetensors",
        nsamples=4,
        seqlen=32,
    )
    return folder


@pytest.fixture
def state(made):
    """The tensors alone, without what the file says of itself."""
    return OrderedDict(torch.load(made / "m.pt", weights_only=True))


def logits(folder, checkpoint, **flags):
    model, _ = gptq.load(folder, checkpoint, **flags)
    with torch.no_grad():
        return model(PROBE, use_cache=False).logits


def saved(state, path):
    torch.save(OrderedDict(state), path)
    return path


def test_a_plain_state_dict_needs_no_flags(llama_dir, made, state, tmp_path):
    path = saved(state, tmp_path / "plain.pt")
    assert torch.equal(logits(llama_dir, path), logits(llama_dir, made / "m.pt"))
    assert torch.equal(logits(llama_dir, path, bits=4, group_size=32), logits(llama_dir, path))


def test_no_g_idx_and_zero_biases_and_float32_scales(llama_dir, made, state, tmp_path):
    """As tools of March 2023 and BELLE's release write it."""
    early = OrderedDict()
    for name, tensor in state.items():
        if name.endswith(".g_idx"):
            continue
        early[name] = tensor.float() if tensor.is_floating_point() else tensor
        if name.endswith(".scales"):
            early[name.replace("scales", "bias")] = torch.zeros(tensor.shape[1])
    early["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    path = saved(early, tmp_path / "early.pt")
    expected = logits(llama_dir, made / "m.pt")
    torch.testing.assert_close(logits(llama_dir, path, group_size=32), expected)
    model, _ = gptq.load(llama_dir, path, group_size=32)
    layer = model.model.layers[0].mlp.up_proj
    assert (layer.bias, layer.g_idx, layer.scales.dtype) == (None, None, torch.float32)


def test_a_bias_that_is_not_zero_is_kept(llama_dir, state, tmp_path):
    name = "model.layers.0.mlp.up_proj"
    state[f"{name}.bias"] = torch.linspace(0, 1, 96)
    model, _ = gptq.load(llama_dir, saved(state, tmp_path / "m.pt"))
    assert torch.equal(model.get_submodule(name).bias, state[f"{name}.bias"])


def test_v2_is_read_by_its_name(llama_dir, made, tmp_path):
    state = load_file(made / "m.safetensors")
    name = "model.layers.0.mlp.up_proj.qzeros"
    said = '{"bits": 4, "group_size": 32, "checkpoint_format": "gptq_v2"}'
    save_file(state, tmp_path / "m.safetensors", metadata={"quantize_config": said})
    v2, _ = gptq.load(llama_dir, tmp_path / "m.safetensors")
    v1, _ = gptq.load(llama_dir, made / "m.safetensors")
    assert torch.equal(v1.state_dict()[name], v2.state_dict()[name])
    assert [m.zero_offset for m in v2.modules() if isinstance(m, QuantLinear)] == [0] * 14


def refused(folder, checkpoint, message, **flags):
    with pytest.raises(UserError, match=message) as caught:
        gptq.load(folder, checkpoint, **flags)
    assert "\n" not in str(caught.value)


def test_flags_that_disagree(llama_dir, made, state, tmp_path):
    refused(llama_dir, made / "m.pt", r"^bits 8 disagrees with .*says 4", bits=8)
    refused(llama_dir, made / "m.pt", r"^group_size 64 disagrees with .*says 32", group_size=64)
    path = saved(state, tmp_path / "plain.pt")
    refused(llama_dir, path, "holds 4-bit weights, not 8-bit", bits=8)
    refused(llama_dir, path, "has 2 groups of 64 inputs, not what groups of 64 give", group_size=64)


def test_another_models_checkpoint(bloom_dir, made, tmp_path):
    refused(bloom_dir, made / "m.pt", "another model")
    wider = make_model(tmp_path / "wider", llama_config(hidden_size=128))
    refused(wider, made / "m.pt", "another model")
    deeper = make_model(tmp_path / "deeper", llama_config(num_hidden_layers=3))
    refused(deeper, made / "m.pt", "not in the checkpoint")
    shallower = make_model(tmp_path / "shallower", llama_config(num_hidden_layers=1))
    refused(shallower, made / "m.pt", "has no place in the model")
    vocabulary = make_model(tmp_path / "vocabulary", llama_config(vocab_size=384))
    refused(vocabulary, made / "m.pt", "embed_tokens.weight: has shape")


@pytest.mark.parametrize("kind", ["scales", "qzeros", "qweight"])
def test_a_tensor_is_missing(kind, llama_dir, state, tmp_path):
    del state[f"model.layers.1.mlp.up_proj.{kind}"]
    refused(llama_dir, saved(state, tmp_path / "m.pt"), re.escape("model.layers.1.mlp.up_proj"))


@pytest.mark.parametrize(("group", "held"), [(2, r"0\.\.2"), (99, r"0\.\.99"), (-1, r"-1\.\.1")])
def test_g_idx_out_of_range(llama_dir, state, tmp_path, group, held):
    name = "model.layers.1.mlp.up_proj.g_idx"
    state[name] = state[name].clone()
    state[name][3] = group
    message = rf"{name}: holds groups {held} where there are 0\.\.1; the file is damaged"
    refused(llama_dir, saved(state, tmp_path / "m.pt"), message)


def test_a_dense_model_is_not_a_checkpoint(llama_dir):
    refused(llama_dir, llama_dir, "holds no packed weights")


@pytest.mark.parametrize("name", ["m.pt", "m.safetensors"])
@pytest.mark.parametrize("keep", [0, 7, 100, 0.5, 0.99])
def test_truncated_files(name, keep, llama_dir, made, tmp_path):
    whole = (made / name).read_bytes()
    length = int(keep * len(whole)) if isinstance(keep, float) else keep
    (tmp_path / name).write_bytes(whole[:length])
    refused(llama_dir, tmp_path / name, name)


def test_code_in_a_pickle_is_not_run(llama_dir, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"model.layers.0.mlp.up_proj.qweight": Bomb()}, tmp_path / "m.pt")
    refused(llama_dir, tmp_path / "m.pt", "m.pt")
    assert not (tmp_path / "ran").exists()


def test_a_missing_file(llama_dir, tmp_path):
    refused(llama_dir, tmp_path / "none.pt", "no such checkpoint")


@pytest.mark.parametrize(
    ("count", "message"),
    [
        (1, "has no place in the model; "),
        (2, "has no place in the model, nor have 1 more tensors; "),
        (3, "has no place in the model, nor have 2 more tensors; "),
    ],
)
def test_tensors_without_a_place_are_counted(llama_dir, state, tmp_path, count, message):
    extra = {f"model.layers.0.extra.{number}": torch.ones(2) for number in range(count)}
    save_file({**state, **extra}, tmp_path / "m.safetensors")
    refused(llama_dir, tmp_path / "m.safetensors", message)


@pytest.mark.parametrize(("name", "value"), [("weight", 0), ("bias", 1), ("bias", 0)])
def test_only_biases_of_zeros_need_no_place(llama_dir, made, state, tmp_path, name, value):
    state[f"model.norm.{name}2" if name == "weight" else f"model.norm.{name}"] = torch.full(
        (64,), float(value)
    )
    path = saved(state, tmp_path / "m.pt")
    if (name, value) == ("bias", 0):
        assert torch.equal(logits(llama_dir, path), logits(llama_dir, made / "m.pt"))
    else:
        refused(llama_dir, path, rf"model.norm.{name}2? has no place in the model; the checkpoint")


def test_one_packed_layer_is_a_checkpoint(llama_dir, state, tmp_path):
    name = "model.layers.1.mlp.up_proj"
    full = load_file(llama_dir / "model.safetensors")
    one = {key: tensor for key, tensor in state.items() if key.startswith(f"{name}.")}
    rest = {key: tensor for key, tensor in full.items() if key != f"{name}.weight"}
    opened = open_weights(llama_dir, saved({**one, **rest}, tmp_path / "m.pt"))
    checkpoint = opened.checkpoint
    assert (checkpoint.bits, checkpoint.group_size) == (4, 32)
    assert [layer.name for layer in checkpoint.layers] == [name]


def test_exceptions_with_bits_and_groups_of_their_own(llama_dir, tmp_path):
    """Of GPTQModel's `dynamic`; what the file declares is of the other layers."""
    made = write(llama_dir, "v1", 4, 32)
    exceptions = write(llama_dir, "v1", 8, 16, probe=False)
    name = "model.layers.0.self_attn.q_proj"
    own = {key: tensor for key, tensor in exceptions.state.items() if key.startswith(name)}
    said = {"bits": 4, "group_size": 32, "dynamic": {r"+:.*0\..*q_proj": {"bits": 8}}}
    settings = {"quantize_config": json.dumps(said)}
    save_file({**made.state, **own}, tmp_path / "m.safetensors", metadata=settings)
    checkpoint = open_weights(llama_dir, tmp_path / "m.safetensors").checkpoint
    assert (checkpoint.bits, checkpoint.group_size) == (4, 32)
    sizes = {layer.name: (layer.bits, layer.group_size) for layer in checkpoint.layers}
    assert sizes.pop(name) == (8, 16)
    assert set(sizes.values()) == {(4, 32)}


def test_a_packed_embedding_beside_a_head_of_its_own(llama_dir, state, tmp_path):
    """A head in 16 bits that is not tied to the embedding stays what it is."""
    config = QuantConfig(bits=4, group_size=32, embedding_bits=8, method="rtn")
    gptq.quantize(llama_dir, None, config, save=tmp_path / "packed.pt")
    packed = dict(torch.load(tmp_path / "packed.pt", weights_only=True))
    for key in [key for key in packed if key.startswith("lm_head.")]:
        del packed[key]
    packed["lm_head.weight"] = state["lm_head.weight"]
    model, _ = gptq.load(llama_dir, saved(packed, tmp_path / "m.pt"))
    assert type(model.get_input_embeddings()) is QuantEmbedding
    assert isinstance(model.lm_head, torch.nn.Linear)
    assert torch.equal(model.lm_head.weight.half(), state["lm_head.weight"])


@pytest.mark.parametrize("offset", [0, 1])
def test_a_modules_own_state_says_its_format(llama_dir, made, tmp_path, offset):
    """`torch.save(model.state_dict())`, as torch's users do it."""
    source = tmp_path / "m.safetensors"
    said = {"bits": 4, "group_size": 32, "checkpoint_format": ("gptq_v2", "gptq")[offset]}
    settings = {"quantize_config": json.dumps(said)}
    save_file(load_file(made / "m.safetensors"), source, metadata=settings)
    model, _ = gptq.load(llama_dir, source)
    torch.save(model.state_dict(), tmp_path / "m.pt")
    checkpoint = open_weights(llama_dir, tmp_path / "m.pt").checkpoint
    assert checkpoint.zero_offset == offset
    assert checkpoint.settings["checkpoint_format"] == ("gptq_v2", "gptq")[offset]
    assert torch.equal(logits(llama_dir, tmp_path / "m.pt"), logits(llama_dir, source))


def test_a_modules_own_state_says_its_groups(llama_dir, text_file, tmp_path):
    """Of a model of several widths, whose groups the tensors alone do not tell: 96 inputs have 2
    groups of 48, 64 or 80."""
    widths = {
        f"model.layers.{block}.mlp.{name}_proj": Width(bits, size)
        for block, name, bits, size in (
            *((0, "gate", 2, 32), (0, "up", 2, 32), (0, "down", 8, 64)),
            *((1, "down", 4, -1), (1, "gate", 3, 64), (1, "up", 3, 64)),
        )
    }
    config = QuantConfig(group_size=32, refine=0)
    made, run = tmp_path / "made.pt", {"nsamples": 4, "seqlen": 32}
    gptq.quantize(llama_dir, text_file, config, widths=widths, save=made, **run)
    model, _ = gptq.load(llama_dir, made)
    torch.save(model.state_dict(), tmp_path / "m.pt")
    assert torch.equal(logits(llama_dir, tmp_path / "m.pt"), logits(llama_dir, made))


@pytest.mark.parametrize("offsets", [(0, 1), (1, 0), (2,), (-1,), (2, 2), (1, 1, 0)])
def test_modules_of_two_formats_are_refused(llama_dir, state, tmp_path, offsets):
    state._metadata = {
        f"model.layers.{block}.mlp.up_proj": {"version": 1, "zero_offset": offset}
        for block, offset in enumerate(offsets)
    }
    torch.save(state, tmp_path / "m.pt")
    refused(llama_dir, tmp_path / "m.pt", "its layers are not all of one format; save one model's")


def test_a_flipped_bit_in_a_torch_file(llama_dir, made, state, tmp_path):
    data = bytearray((made / "m.pt").read_bytes())
    scales = state["model.layers.1.mlp.up_proj.scales"].numpy().tobytes()
    data[data.index(scales)] ^= 1
    (tmp_path / "m.pt").write_bytes(data)
    with pytest.raises(UserError, match=r"m\.pt"):
        gptq.load(llama_dir, tmp_path / "m.pt")
