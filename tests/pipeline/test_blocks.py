"""Quantize, save each way, load each way: the same numbers everywhere."""

import json
import shutil
import sys
import weakref
from dataclasses import replace

import pytest
import torch
from conftest import bloom_config, llama_config, make_model
from helpers.solving import solve
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import gptq
from gptq import QuantConfig, QuantLinear, device
from gptq.blockwise.source import open_model
from gptq.data.windows import calibration_windows
from gptq.errors import UserError
from gptq.nn import PackedModule
from gptq.pipeline.journal import open_journal
from gptq.solver import layer as solver
from gptq.solver.damping import choose_damping
from quant_cuda.reference import dequantize

RUN = {"nsamples": 6, "seqlen": 32}
PROBE = torch.randint(2, 300, (2, 20), generator=torch.Generator().manual_seed(5))


def fake_quantized(folder, quantized):
    """Hugging Face's own model whose packed weights are what the words stand for."""
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16).float().eval()
    for name, module in quantized.named_modules():
        if isinstance(module, PackedModule):
            layer = whole.get_submodule(name)
            layer.weight.data = dequantize(module.packed(), torch.float32).T.contiguous()
    return whole


@torch.no_grad()
def logits(model):
    return model(PROBE, use_cache=False).logits


CASES = [
    ("llama_dir", QuantConfig(bits=4, group_size=32)),
    ("llama_dir", QuantConfig(bits=3, group_size=64, order="act")),
    ("llama_dir", QuantConfig(bits=8, group_size=-1, sym=True)),
    ("llama_dir", QuantConfig(bits=2, group_size=64, order="act", static_groups=True)),
    ("llama_dir", QuantConfig(bits=4, group_size=48, true_sequential=False, order="natural")),
    ("bloom_dir", QuantConfig(bits=4, group_size=32)),
    ("bloom_dir", QuantConfig(bits=3, group_size=-1, sym=True, scale_search="minmax")),
    ("bloom_dir", QuantConfig(bits=2, group_size=32, order="act")),
    ("bloom_dir", QuantConfig(bits=8, group_size=128, method="rtn", scale_search="minmax")),
]


@pytest.mark.parametrize(("fixture", "config"), CASES, ids=lambda case: str(case)[:70])
def test_round_trip(fixture, config, request, tmp_path, text_file):
    folder = request.getfixturevalue(fixture)
    # A folder has the embedding at 16 bits, and is compared with the files.
    config = replace(config, embedding_bits=16)
    report = gptq.quantize(
        folder,
        text_file,
        config,
        save=tmp_path / "m.pt",
        save_safetensors=tmp_path / "m.safetensors",
        save_dir=tmp_path / "dir",
        **RUN,
    )
    source = open_model(folder)
    assert len(report.layers) == 2 * len(source.spec.linears)
    assert all(layer.loss <= layer.rtn_loss for layer in report.layers)
    model, tokenizer = gptq.load(folder, tmp_path / "m.pt")
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    assert len(layers) == len(report.layers)
    assert (layers[0].bits, layers[0].group_size) == (config.bits, config.group_size)
    expected = logits(fake_quantized(folder, model))
    torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-3)
    for model_name, checkpoint in [
        (folder, tmp_path / "m.safetensors"),
        (folder, tmp_path / "dir"),
        (tmp_path / "dir", None),
    ]:
        loaded, _ = gptq.load(model_name, checkpoint)
        torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)
    assert tokenizer.decode(tokenizer("the cat")["input_ids"]) == "the cat"


def test_the_first_layers_are_what_the_solver_gives(llama_dir, text_file, tmp_path):
    """Capture and packing checked apart from the pipeline: inputs from Hugging Face's forward."""
    config = QuantConfig(bits=4, group_size=32, adaptive_damp=False)
    gptq.quantize(llama_dir, text_file, config, save=tmp_path / "m.pt", **RUN)
    model, tokenizer = gptq.load(llama_dir, tmp_path / "m.pt")
    whole = AutoModelForCausalLM.from_pretrained(llama_dir, dtype=torch.float32).eval()
    windows = calibration_windows(text_file, tokenizer, 6, 32, 0)
    attention = whole.model.layers[0].self_attn
    seen = []
    attention.q_proj.register_forward_hook(lambda _m, args, _o: seen.append(args[0]))
    with torch.no_grad():
        whole(windows)
    x = torch.cat(seen).reshape(-1, 64)
    H = x.T @ x / len(x)
    for name in ("q_proj", "k_proj", "v_proj"):
        expected = solve(getattr(attention, name).weight, H, config)
        packed = getattr(model.model.layers[0].self_attn, name)
        found = dequantize(packed.packed(), torch.float32).T
        difference = (found != expected.dequantize()).float().mean()
        assert difference < 0.02, f"{name}: {difference:.1%} of the weights differ"


def test_damping_is_chosen_on_the_last_quarter_of_the_tokens(llama_dir, text_file, tmp_path):
    config = QuantConfig(bits=4, group_size=32)
    report = gptq.quantize(llama_dir, text_file, config, save=tmp_path / "m.pt", **RUN)
    whole = AutoModelForCausalLM.from_pretrained(llama_dir, dtype=torch.float32).eval()
    tokenizer = gptq.load(llama_dir)[1]
    attention, seen = whole.model.layers[0].self_attn, []
    attention.q_proj.register_forward_hook(lambda _m, args, _o: seen.append(args[0]))
    with torch.no_grad():
        whole(calibration_windows(text_file, tokenizer, 6, 32, 0))
    x = torch.cat(seen).reshape(-1, 64)
    H, held = (part.T @ part / len(x) for part in (x[:144], x[144:]))
    assert report.layers[0].damp == choose_damping(H + held, held, config)
    assert len({layer.damp for layer in report.layers}) > 1


@pytest.mark.skipif(sys.version_info < (3, 11), reason="callers hold what they pass")
def test_held_out_statistics_are_freed_before_the_sweep(
    llama_dir, text_file, tmp_path, monkeypatch
):
    """Each is as large as H, in layers that write to the hidden states as in others."""
    held_out, alive = [], []
    choose_damping, sweep = solver.choose_damping, solver.sweep

    def choosing(H, part, config):
        held_out.append(weakref.ref(part))
        return choose_damping(H, part, config)

    def sweeping(problem):
        alive.append([part() is not None for part in held_out])
        return sweep(problem)

    monkeypatch.setattr(solver, "choose_damping", choosing)
    monkeypatch.setattr(solver, "sweep", sweeping)
    config = QuantConfig(group_size=32)
    gptq.quantize(llama_dir, text_file, config, save=tmp_path / "m.pt", **RUN)
    assert alive == [[False] * count for count in range(1, 9)]  # four groups in two blocks


def test_later_blocks_see_quantized_ones(llama_dir, text_file, tmp_path):
    """The second block's inputs are those that the quantized first block produces."""
    config = QuantConfig(bits=2, group_size=32, error_feedback=0.0)
    report = gptq.quantize(llama_dir, text_file, config, save=tmp_path / "m.pt", **RUN)
    model, tokenizer = gptq.load(llama_dir, tmp_path / "m.pt")
    windows = calibration_windows(text_file, tokenizer, 6, 32, 0)
    layer = model.model.layers[1].self_attn.q_proj
    seen = []
    layer.register_forward_hook(lambda _m, args, _o: seen.append(args[0]))
    with torch.no_grad():
        model(windows)
    x = torch.cat(seen).reshape(-1, 64)
    whole = AutoModelForCausalLM.from_pretrained(llama_dir, dtype=torch.float32)
    W = whole.model.layers[1].self_attn.q_proj.weight.detach()
    error = dequantize(layer.packed(), torch.float32).T - W
    loss = ((x @ error.T) ** 2).sum() / ((x @ W.T) ** 2).sum()
    reported = next(r for r in report.layers if (r.block, r.name) == (1, "self_attn.q_proj"))
    assert reported.loss == pytest.approx(loss.item(), rel=1e-3)


@pytest.mark.parametrize("tied", [True, False])
def test_heads_tied_and_not(tied, tmp_path, text_file):
    for kind in (llama_config, bloom_config):
        folder = make_model(tmp_path / f"{kind.__name__}", kind(tie_word_embeddings=tied))
        outputs = {"save": tmp_path / "m.pt", "save_safetensors": tmp_path / "m.safetensors"}
        config = QuantConfig(group_size=32, embedding_bits=16)
        gptq.quantize(folder, text_file, config, **outputs, **RUN)
        state = torch.load(tmp_path / "m.pt", weights_only=True)
        head = state["lm_head.weight"]
        embedding = next(t for n, t in state.items() if "embed" in n and "layernorm" not in n)
        assert (head.data_ptr() == embedding.data_ptr()) == tied
        assert ("lm_head.weight" in load_file(tmp_path / "m.safetensors")) != tied
        for path in outputs.values():
            model, _ = gptq.load(folder, path)
            assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
            expected = logits(fake_quantized(folder, model))
            torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-3)


def test_biases_are_kept(tmp_path, text_file):
    folder = make_model(tmp_path / "m", llama_config(attention_bias=True, mlp_bias=True))
    gptq.quantize(folder, text_file, QuantConfig(group_size=32), save=tmp_path / "m.pt", **RUN)
    model, _ = gptq.load(folder, tmp_path / "m.pt")
    assert model.model.layers[0].mlp.down_proj.bias is not None
    expected = logits(fake_quantized(folder, model))
    torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-3)


def test_stopped_and_resumed_is_bit_identical(llama_dir, text_file, tmp_path):
    config = QuantConfig(group_size=32)
    gptq.quantize(llama_dir, text_file, config, save=tmp_path / "whole.pt", **RUN)

    def stop(layer, total):
        if layer.block == 1:
            raise KeyboardInterrupt

    again = {"save": tmp_path / "again.pt", **RUN}
    with pytest.raises(KeyboardInterrupt):
        gptq.quantize(llama_dir, text_file, config, progress=stop, **again)
    assert not (tmp_path / "again.pt").exists()
    with pytest.raises(UserError, match=r"holds 1 finished blocks.*--resume"):
        gptq.quantize(llama_dir, text_file, config, **again)
    with pytest.raises(UserError, match="differs in bits"):
        gptq.quantize(
            llama_dir, text_file, QuantConfig(bits=8, group_size=32), resume=True, **again
        )
    report = gptq.quantize(llama_dir, text_file, config, resume=True, **again)
    assert len(report.layers) == 14
    assert (tmp_path / "again.pt").read_bytes() == (tmp_path / "whole.pt").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again.pt", "whole.pt"]


def test_two_runs_do_not_share_an_output(tmp_path):
    with (
        open_journal([tmp_path / "m.pt"], {"bits": 4}, resume=False),
        pytest.raises(UserError, match="another run is writing it"),
        open_journal([tmp_path / "m.pt"], {"bits": 4}, resume=True),
    ):
        pass


def test_settings_travel_in_every_form(llama_dir, text_file, tmp_path):
    config = QuantConfig(bits=4, group_size=32, sym=True, order="act", embedding_bits=16)
    paths = [tmp_path / "m.pt", tmp_path / "m.safetensors", tmp_path / "dir"]
    names = ("save", "save_safetensors", "save_dir")
    gptq.quantize(llama_dir, text_file, config, **dict(zip(names, paths, strict=True)), **RUN)
    written = json.loads((tmp_path / "dir" / "config.json").read_text())["quantization_config"]
    assert written == json.loads((tmp_path / "dir" / "quantize_config.json").read_text())
    expected = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 32,
        "desc_act": True,
        "sym": True,
        "checkpoint_format": "gptq",
        "format": "gptq",
        "pack_dtype": "int32",
        "lm_head": False,
    }
    assert expected.items() <= written.items()
    state = torch.load(paths[0], weights_only=True)
    assert json.loads(state._metadata["quantize_config"]) == written


def test_zero_points_of_both_formats(llama_dir, text_file, tmp_path):
    config = QuantConfig(bits=4, group_size=32)
    outputs = {"save": tmp_path / "m.pt", "save_dir": tmp_path / "dir", "format": "gptq_v2"}
    gptq.quantize(llama_dir, text_file, config, **outputs, **RUN)
    said = json.loads((tmp_path / "dir" / "quantize_config.json").read_text())
    assert said["checkpoint_format"] == "gptq_v2"
    name = "model.layers.0.mlp.up_proj.qzeros"
    v1 = torch.load(tmp_path / "m.pt", weights_only=True)[name]
    v2 = load_file(tmp_path / "dir" / "model.safetensors")[name]
    # One more in each of the eight fields of a word, none of which carries.
    assert torch.equal(v1.long() % 2**32 + 0x11111111, v2.long() % 2**32)


def test_config_is_the_source_file_with_two_keys_changed(llama_dir, text_file, tmp_path):
    gptq.quantize(llama_dir, text_file, QuantConfig(group_size=32), save_dir=tmp_path / "d", **RUN)
    before = json.loads((llama_dir / "config.json").read_text())
    after = json.loads((tmp_path / "d" / "config.json").read_text())
    after.pop("quantization_config")
    assert {**before, "dtype": "float16"} == after
    assert (tmp_path / "d" / "tokenizer.json").read_bytes() == (
        llama_dir / "tokenizer.json"
    ).read_bytes()


def damaged(folder, target, name, value):
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.get_parameter(name).data.view(-1)[5] = value
    model.save_pretrained(target)
    for file in folder.glob("token*"):
        (target / file.name).write_bytes(file.read_bytes())
    return target


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_numbers_are_named(value, llama_dir, text_file, tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    folder = damaged(llama_dir, tmp_path / "m", name, value)
    with pytest.raises(UserError, match=rf"{name}: holds NaN or infinity"):
        gptq.quantize(folder, text_file, QuantConfig(group_size=32), save=tmp_path / "m.pt", **RUN)
    assert not (tmp_path / "m.pt").exists()


def test_activations_that_are_not_numbers_are_named(llama_dir, text_file, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(llama_dir, folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.model.layers[0].input_layernorm.weight.data[:] = 1e30  # finite, its square is not
    model.save_pretrained(folder)
    with pytest.raises(UserError, match=r"layers\.0\.self_attn\.q_proj: its inputs hold NaN"):
        gptq.quantize(folder, text_file, QuantConfig(group_size=32), save=tmp_path / "m.pt", **RUN)


def test_layers_that_cannot_be_packed_are_named(tmp_path, text_file):
    folder = make_model(tmp_path / "m", llama_config(intermediate_size=100))
    with pytest.raises(UserError, match=r"mlp.gate_proj: out_features 100 at 4 bits.*--wbits 8"):
        gptq.quantize(folder, text_file, QuantConfig(group_size=32), save=tmp_path / "m.pt", **RUN)


def test_feedback_brings_the_model_closer_to_the_full_one(llama_dir, text_file, tmp_path):
    """On the calibration windows themselves the corrected weights follow the full model better."""
    full, tokenizer = gptq.load(llama_dir)
    windows = calibration_windows(text_file, tokenizer, 32, 32, 0)
    distances = []
    for share, residual in ((0.0, False), (1.0, False), (1.0, True)):
        config = QuantConfig(
            bits=2, group_size=32, error_feedback=share, residual_feedback=residual
        )
        path = tmp_path / f"{len(distances)}.pt"
        gptq.quantize(llama_dir, text_file, config, save=path, nsamples=32, seqlen=32)
        model, _ = gptq.load(llama_dir, path)
        with torch.no_grad():
            expected, found = (m.model(windows).last_hidden_state for m in (full, model))
        distances.append(float((expected - found).square().mean()))
    assert distances[1] < 0.9 * distances[0]
    assert distances[2] < 0.9 * distances[1]


def test_matrix_units_change_little(tmp_path, text_file, monkeypatch):
    """A bfloat16 model calibrated in its own type, as where the processor has units for it."""
    folder = make_model(tmp_path / "m", llama_config())
    AutoModelForCausalLM.from_pretrained(folder).bfloat16().save_pretrained(folder)
    losses = []
    for has_units in (False, True):
        monkeypatch.setattr(device, "has_matrix_units", lambda has_units=has_units: has_units)
        path = tmp_path / f"{has_units}.pt"
        report = gptq.quantize(
            folder, text_file, QuantConfig(group_size=32), save=path, **RUN, device="cpu"
        )
        losses.append(sum(layer.loss for layer in report.layers))
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.1)
