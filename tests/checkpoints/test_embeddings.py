"""A packed embedding and head: what is stored, what it stands for, and who reads it."""

import copy

import pytest
import torch
from conftest import bloom_config, llama_config, make_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import gptq
from gptq import hf
from gptq.api import open_weights, perplexity
from gptq.blockwise.model import free
from gptq.checkpoints.compatibility import facts, lines
from gptq.checkpoints.embeddings import pack_rows
from gptq.config import EMBEDDING_GROUPS, QuantConfig
from gptq.convert import convert
from gptq.errors import UserError
from gptq.nn import QuantEmbedding, QuantLinear, TiedHead
from quant_cuda.packing import unpack, unpack_zeros

KINDS = {
    # A vocabulary that ends within a word of zero points, and a short last group.
    "llama": (llama_config(vocab_size=321, hidden_size=192), "model.embed_tokens"),
    "llama tied": (llama_config(tie_word_embeddings=True), "model.embed_tokens"),
    "bloom": (bloom_config(vocab_size=323), "transformer.word_embeddings"),
    "bloom untied": (bloom_config(tie_word_embeddings=False), "transformer.word_embeddings"),
}
BITS = (4, 8)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("embeddings")
    return {kind: make_model(folder / kind, config) for kind, (config, _) in KINDS.items()}


def rounded(model, bits, sym=False, **outputs):
    config = QuantConfig(
        group_size=64, method="rtn", scale_search="minmax", embedding_bits=bits, sym=sym
    )
    gptq.quantize(model, None, config, **outputs)


def on_grid(state, name, bits, inputs, offset=1):
    """What packed tensors stand for, by docs/format.md, float64 (out, in)."""
    scales = state[f"{name}.scales"].double()
    outputs = scales.shape[1]
    q = unpack(state[f"{name}.qweight"], bits, inputs).double()
    zeros = unpack_zeros(state[f"{name}.qzeros"], bits, outputs, offset).double()
    group = torch.arange(inputs) // EMBEDDING_GROUPS[bits]
    return ((q - zeros[group]) * scales[group]).T


def ends_of(kind):
    config, embedding = KINDS[kind]
    return (embedding,) if config.tie_word_embeddings else (embedding, "lm_head")


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(2, 300, (3, 40), generator=torch.Generator().manual_seed(1))


def logits_of(model, tokens):
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.parametrize(
    ("kind", "bits", "sym"),
    [("llama", 8, False), ("llama tied", 4, True), ("bloom", 8, True), ("bloom untied", 4, False)],
)
def test_the_files_and_what_they_stand_for(kind, bits, sym, models, tokens, tmp_path):
    """Against Hugging Face's own model with the numbers of docs/format.md put in."""
    paths = {"save": tmp_path / "m.pt", "save_safetensors": tmp_path / "m.safetensors"}
    rounded(models[kind], bits, sym, **paths)
    state = torch.load(paths["save"], weights_only=True)
    again = load_file(paths["save_safetensors"])
    assert set(state) == set(again)
    assert all(torch.equal(state[name], again[name]) for name in state)
    oracle = AutoModelForCausalLM.from_pretrained(models[kind], dtype=torch.float32)
    plain = tmp_path / "plain.pt"
    rounded(models[kind], 16, sym, save=plain)
    blocks, _ = gptq.load(models[kind], plain)
    for end in ends_of(kind):
        keys = {name for name in state if name.startswith(f"{end}.")}
        assert keys == {f"{end}.{key}" for key in ("qweight", "qzeros", "scales")}
        numbers = on_grid(state, end, bits, oracle.config.hidden_size)
        weight = oracle.get_submodule(end).weight.detach()
        assert float((numbers - weight).norm() / weight.norm()) < {4: 0.15, 8: 0.01}[bits]
        blocks.get_submodule(end).weight.data.copy_(numbers)
    for path in paths.values():
        model, _ = gptq.load(models[kind], path)
        torch.testing.assert_close(
            logits_of(model, tokens), logits_of(blocks, tokens), rtol=1e-3, atol=1e-3
        )
        whole = logits_of(model, tokens)[:, :-1].flatten(0, 1)
        expected = torch.nn.functional.cross_entropy(whole, tokens[:, 1:].flatten()).exp()
        found = perplexity(open_weights(models[kind], path), tokens)
        assert found == pytest.approx(float(expected), rel=1e-4)


def test_plain_files_have_the_tensors_of_gptq_for_llama(models, tmp_path):
    rounded(models["llama"], 16, save=tmp_path / "m.pt")
    state = torch.load(tmp_path / "m.pt", weights_only=True)
    linears = [
        *(f"self_attn.{name}_proj" for name in "qkvo"),
        *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
    ]
    blocks = [f"model.layers.{index}" for index in range(2)]
    packed = ("qweight", "qzeros", "scales", "g_idx")
    assert set(state) == {
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
        *(f"{block}.{norm}_layernorm.weight" for block in blocks for norm in ("input",)),
        *(f"{block}.post_attention_layernorm.weight" for block in blocks),
        *(f"{block}.{name}.{key}" for block in blocks for name in linears for key in packed),
    }


@pytest.mark.parametrize(("kind", "sym"), [("llama", False), ("bloom", True)])
def test_folders_stay_at_16_bits_unless_asked(kind, sym, models, tokens, tmp_path):
    folder, own = tmp_path / "folder", tmp_path / "own"
    rounded(models[kind], 8, sym, save_dir=folder)
    config = QuantConfig(group_size=64, method="rtn", scale_search="minmax", sym=sym)
    gptq.quantize(models[kind], None, config, save_dir=own, quantize_embeddings=True)
    dense = load_file(folder / "model.safetensors")
    assert f"{KINDS[kind][1]}.weight" in dense
    assert not facts(folder).embeddings
    assert facts(own).embeddings
    assert "GPTQModel" in lines(facts(folder))[0]
    assert "leave out --quantize-embeddings" in "".join(lines(facts(own)))
    packed, _ = gptq.load(own)
    hf.register()
    loaded = AutoModelForCausalLM.from_pretrained(own, dtype=torch.float32).eval()
    kinds = [type(part) for part in (loaded.get_input_embeddings(), loaded.lm_head)]
    tied = KINDS[kind][0].tie_word_embeddings
    assert kinds == [QuantEmbedding, TiedHead if tied else QuantLinear]
    wanted = logits_of(packed, tokens)
    torch.testing.assert_close(logits_of(loaded, tokens), wanted, rtol=1e-4, atol=1e-4)
    loaded.tie_weights()
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32).eval()
    torch.testing.assert_close(logits_of(again, tokens), wanted, rtol=1e-4, atol=1e-4)
    plain = loaded.dequantize()
    torch.testing.assert_close(logits_of(plain, tokens), wanted, rtol=1e-3, atol=1e-3)
    assert (plain.lm_head.weight is plain.get_input_embeddings().weight) == tied


@pytest.mark.parametrize("kind", ["llama", "llama tied"])
def test_conversion_keeps_or_unpacks_them(kind, models, tokens, tmp_path):
    start = tmp_path / "m.pt"
    rounded(models[kind], 8, save=start)
    value = perplexity(open_weights(models[kind], start), tokens)
    for name, keep in (("a.pt", None), ("a.safetensors", None), ("a", True)):
        convert(start, tmp_path / name, model=models[kind], quantize_embeddings=keep)
        assert perplexity(open_weights(models[kind], tmp_path / name), tokens) == value
    for name, form, keep in (("b", None, None), ("b.pt", None, False), ("c.pt", "dense", None)):
        convert(start, tmp_path / name, model=models[kind], format=form, quantize_embeddings=keep)
        stored = tmp_path / name / "model.safetensors" if name == "b" else tmp_path / name
        state = load_file(stored) if name == "b" else torch.load(stored, weights_only=True)
        assert f"{KINDS[kind][1]}.weight" in state
        assert f"{KINDS[kind][1]}.qweight" not in state
        assert ("lm_head.weight" in state) == (name != "b" or len(ends_of(kind)) == 2)
        if form is None:
            opened = open_weights(models[kind], tmp_path / name)
            assert perplexity(opened, tokens) == pytest.approx(value, rel=1e-3)


def test_a_tied_weight_is_in_memory_once(models, tokens, tmp_path):
    rounded(models["bloom"], 8, save=tmp_path / "m.pt")
    model, _ = gptq.load(models["bloom"], tmp_path / "m.pt")
    embedding, head = model.get_input_embeddings(), model.lm_head
    assert head.embedding is embedding
    assert not any(name.startswith("lm_head") for name in model.state_dict())
    expected = logits_of(model, tokens)
    assert embedding.prepare() is embedding.prepare()
    twin = copy.deepcopy(model)
    assert twin.lm_head.embedding is twin.get_input_embeddings()
    torch.testing.assert_close(logits_of(twin, tokens), expected, rtol=0, atol=0)
    free(twin.lm_head)
    assert twin.get_input_embeddings().qweight.is_meta


def test_embeddings_have_the_models_type(models, tokens, tmp_path):
    rounded(models["llama"], 8, save=tmp_path / "m.pt")
    model, _ = gptq.load(models["llama"], tmp_path / "m.pt", dtype="bfloat16")
    assert model.get_input_embeddings()(tokens).dtype == torch.bfloat16
    assert logits_of(model, tokens).dtype == torch.bfloat16
    assert model.half().get_input_embeddings()(tokens).dtype == torch.float16


@pytest.mark.parametrize("bits", BITS)
def test_pieces_make_the_whole(bits, monkeypatch):
    weight = torch.randn(333, 160, generator=torch.Generator().manual_seed(bits))
    whole = pack_rows("x", weight, bits, sym=False)
    monkeypatch.setattr("gptq.checkpoints.embeddings._CHUNK", 32)
    pieces = pack_rows("x", weight, bits, sym=False)
    assert all(torch.equal(whole[name], pieces[name]) for name in whole)


def test_what_cannot_be_packed():
    with pytest.raises(UserError, match="holds NaN"):
        pack_rows("x", torch.full((32, 32), torch.nan), 8, sym=False)
    with pytest.raises(UserError, match="use --embedding-bits 16 or --plain"):
        pack_rows("x", torch.ones(32, 30), 8, sym=False)
    with pytest.raises(UserError, match=r"^embedding_bits 5 is not possible"):
        QuantConfig(embedding_bits=5)


def test_four_bits_in_groups_of_64_are_read(models, tmp_path, monkeypatch):
    """As older files have them."""
    monkeypatch.setitem(EMBEDDING_GROUPS, 4, 64)
    rounded(models["llama"], 4, save=tmp_path / "old.pt")
    monkeypatch.undo()
    rounded(models["llama"], 4, save=tmp_path / "new.pt")
    full, _ = gptq.load(models["llama"])
    tokens, errors = torch.arange(300), []
    for name, size in (("old", 64), ("new", 32)):
        model, _ = gptq.load(models["llama"], tmp_path / f"{name}.pt")
        embedding = model.get_input_embeddings()
        assert (embedding.group_size, model.lm_head.group_size) == (size, size)
        wanted = full.get_input_embeddings()(tokens)
        errors.append(float((embedding(tokens) - wanted).square().sum() / wanted.square().sum()))
    assert errors[1] < errors[0] < 0.01


def test_groups_of_another_size_do_not_mislead(models, tokens, tmp_path):
    """192 inputs in groups of 90 are three groups, as many as in groups of 64."""
    config = QuantConfig(group_size=90, method="rtn", scale_search="minmax")
    gptq.quantize(models["llama"], None, config, save=tmp_path / "m.pt")
    model, _ = gptq.load(models["llama"], tmp_path / "m.pt")
    assert model.get_input_embeddings().group_size == EMBEDDING_GROUPS[8]
    assert model.lm_head.group_size == EMBEDDING_GROUPS[8]
    assert model.model.layers[0].mlp.up_proj.group_size == 90
