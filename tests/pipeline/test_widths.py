"""Runs whose layers have bits and group sizes of their own."""

import json

import pytest
import torch
from helpers.mixed import mixed_widths
from helpers.old_tools import PROBE
from transformers import AutoModelForCausalLM

import gptq
from gptq import QuantConfig, QuantLinear
from gptq.config import Width
from gptq.errors import SettingError, UserError
from gptq.inference.loading import open_weights
from gptq.models import BLOOM, LLAMA
from quant_cuda.reference import dequantize

RUN = {"nsamples": 4, "seqlen": 32}
SPECS = {"llama_dir": LLAMA, "bloom_dir": BLOOM}
CONFIGS = {
    "default": QuantConfig(embedding_bits=16),
    "act": QuantConfig(order="act", embedding_bits=16),
    "at once": QuantConfig(true_sequential=False, sym=True, group_size=32, embedding_bits=16),
    "nearest": QuantConfig(method="rtn", scale_search="minmax", bits=8, embedding_bits=16),
}


def own_widths(model) -> dict[str, Width]:
    return {
        name: Width(it.bits, it.group_size)
        for name, it in model.named_modules()
        if isinstance(it, QuantLinear)
    }


@torch.no_grad()
def logits(model):
    return model(PROBE, use_cache=False).logits


@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
@pytest.mark.parametrize("fixture", SPECS)
def test_every_layer_has_its_own_width(fixture, config, request, tmp_path, text_file):
    folder, widths = request.getfixturevalue(fixture), mixed_widths(SPECS[fixture])
    files = {"save": tmp_path / "m.pt", "save_safetensors": tmp_path / "m.safetensors"}
    report = gptq.quantize(folder, text_file, config, widths=widths, **files, **RUN)
    spec = SPECS[fixture]
    reported = {f"{spec.block(it.block)}.{it.name}": it for it in report.layers}
    assert {name: Width(it.bits, it.group_size) for name, it in reported.items()} == widths
    model, _ = gptq.load(folder, tmp_path / "m.pt")
    assert own_widths(model) == widths
    # Hugging Face's model with the weights that the file's integers stand for.
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for name in widths:
        weight = dequantize(model.get_submodule(name).packed(), torch.float32).T
        original = whole.get_submodule(name).weight
        # Whatever is wrong with a width shows as weights that have nothing to do with the model's.
        assert (weight - original).std() < original.std()
        whole.get_submodule(name).weight.data = weight.contiguous()
    torch.testing.assert_close(logits(model), logits(whole), rtol=1e-3, atol=1e-3)
    again, _ = gptq.load(folder, tmp_path / "m.safetensors")
    assert own_widths(again) == widths
    assert torch.equal(logits(again), logits(model))


def test_perplexity_block_by_block(llama_dir, tmp_path, text_file):
    widths = mixed_widths(LLAMA)
    config = QuantConfig(embedding_bits=16)
    gptq.quantize(llama_dir, text_file, config, widths=widths, save=tmp_path / "m.pt", **RUN)
    windows = torch.randint(2, 300, (2, 32), generator=torch.Generator().manual_seed(5))
    found = gptq.api.perplexity(open_weights(llama_dir, tmp_path / "m.pt"), windows)
    model, _ = gptq.load(llama_dir, tmp_path / "m.pt")
    with torch.no_grad():
        losses = [float(model(it[None], labels=it[None]).loss) for it in windows]
    assert found == pytest.approx(torch.tensor(losses).mean().exp().item(), rel=1e-3)


@pytest.mark.parametrize("order", ["gar", "act"])
def test_a_width_for_all_is_the_same_as_none(order, llama_dir, tmp_path, text_file):
    """A table that gives each layer one width makes the file that the settings alone make."""
    plain = QuantConfig(bits=3, group_size=32, order=order)
    gptq.quantize(llama_dir, text_file, plain, save=tmp_path / "plain.pt", **RUN)
    other = QuantConfig(bits=8, group_size=-1, order=order)
    widths = dict.fromkeys(mixed_widths(LLAMA), Width(3, 32))
    gptq.quantize(llama_dir, text_file, other, widths=widths, save=tmp_path / "t.pt", **RUN)
    one, two = (torch.load(tmp_path / n, weights_only=True) for n in ("plain.pt", "t.pt"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    first, second = (json.loads(it._metadata["quantize_config"]) for it in (one, two))
    assert (first["bits"], first["group_size"]) == (second["bits"], second["group_size"]) == (3, 32)
    assert "dynamic" not in second
    assert first["desc_act"] == second["desc_act"] == (order == "act")


class Stopped(Exception):
    pass


def test_resume_needs_the_same_widths(llama_dir, tmp_path, text_file):
    widths = mixed_widths(LLAMA)
    done = []

    def stop(layer, total):
        done.append(layer)
        if layer.block == 1:
            raise Stopped

    def run(table, **others):
        config, out = QuantConfig(), tmp_path / "m.pt"
        return gptq.quantize(llama_dir, text_file, config, widths=table, save=out, **RUN, **others)

    with pytest.raises(Stopped):
        run(widths, progress=stop)
    other = {**widths, "model.layers.1.mlp.down_proj": Width(2, 32)}
    with pytest.raises(UserError, match="widths"):
        run(other, resume=True)
    with pytest.raises(UserError, match="widths"):
        run(None, resume=True)
    report = run(widths, resume=True)
    assert report.layers[: len(done) - 1] == tuple(done[:-1])
    whole = tmp_path / "whole.pt"
    gptq.quantize(llama_dir, text_file, QuantConfig(), widths=widths, save=whole, **RUN)
    one, two = (torch.load(path, weights_only=True) for path in (tmp_path / "m.pt", whole))
    assert list(one) == list(two)
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.layers.9.mlp.up_proj": Width(4, 32)}, "model.layers.9.mlp.up_proj: is no layer"),
        ({"lm_head": Width(4, 32)}, "lm_head: is no layer"),
        ({"model.layers.1.self_attn.k_proj": Width(2, 32)}, "k_proj: has 2 bit g32, but"),
        (
            {"model.layers.0.mlp.gate_proj": Width(4, 32)},
            "up_proj: has 4 bit g128, but",
        ),
    ],
)
def test_a_table_that_cannot_be(changes, message, llama_dir, tmp_path, text_file):
    with pytest.raises(UserError, match=message) as caught:
        gptq.quantize(
            llama_dir, text_file, QuantConfig(), widths=changes, save=tmp_path / "m.pt", **RUN
        )
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("bits", "size"), [(5, 32), (4, 0), (4, -2), ("4", 32), (4, 32.5)])
def test_a_width_that_cannot_be(bits, size):
    with pytest.raises(SettingError):
        Width(bits, size)
