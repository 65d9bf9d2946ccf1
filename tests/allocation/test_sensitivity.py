"""What a width costs the model, against Hugging Face's forward with the same layer quantized."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from gptq import QuantConfig, api
from gptq.allocation import sensitivity
from gptq.allocation.sensitivity import measure, probe_bytes
from gptq.blockwise.activation_cache import ActivationCache
from gptq.config import Width
from gptq.data.windows import calibration_windows
from gptq.models import BLOOM, LLAMA
from gptq.pipeline.team import Team
from gptq.solver.hessian import Hessian
from gptq.solver.layer import solve_layer

SPECS = {"llama_dir": LLAMA, "bloom_dir": BLOOM}
WIDTHS = (Width(2, 32), Width(3, 32), Width(4, 32), Width(8, 64))
REFERENCE = Width(3, 32)


def windows_of(folder, text_file):
    return calibration_windows(text_file, api.open_model(folder).tokenizer(), 8, 32, 0)


def measured(folder, windows, **more):
    model = api.open_full(folder, "cpu", "float32")
    return measure(model, windows, QuantConfig(), WIDTHS, REFERENCE, **more)


@torch.no_grad()
def naive(folder, spec, windows, number):
    """The divergence with group `number` in the reference width, all else as it is."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    full = model(windows).logits.log_softmax(-1)
    block, place = divmod(number, len(spec.groups))
    layers = [
        model.get_submodule(f"{spec.block(block)}.{name}") for name in spec.groups[place].layers
    ]
    seen = []
    hook = layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(windows)
    hook.remove()
    x = seen[0].flatten(0, 1)
    held = x[len(x) - int(0.25 * len(x)) :]
    hessian = Hessian(x.T @ x / len(x), held_out=held.T @ held / len(x))
    config = QuantConfig(
        bits=REFERENCE.bits, group_size=REFERENCE.group_size, error_feedback=0.0, refine=1
    )
    solution = solve_layer(torch.cat([layer.weight for layer in layers]), hessian, config)
    parts = solution.dequantize().split([layer.out_features for layer in layers])
    for layer, part in zip(layers, parts, strict=True):
        layer.weight.copy_(part)
    other = model(windows).logits.log_softmax(-1)
    return float((full.exp() * (full - other)).sum(-1).mean())


@pytest.mark.parametrize("fixture", SPECS)
def test_the_reference_is_what_the_model_loses(fixture, request, text_file):
    folder, spec = request.getfixturevalue(fixture), SPECS[fixture]
    windows = windows_of(folder, text_file)
    for number, group in enumerate(measured(folder, windows)):
        expected = naive(folder, spec, windows, number)
        assert group.losses[WIDTHS.index(REFERENCE)] == pytest.approx(expected, rel=0.02, abs=1e-9)
        block, place = divmod(number, len(spec.groups))
        names = spec.groups[place].layers
        assert group.layers == tuple(f"{spec.block(block)}.{name}" for name in names)


def test_more_bits_lose_less(llama_dir, text_file):
    for group in measured(llama_dir, windows_of(llama_dir, text_file)):
        assert list(group.losses) == sorted(group.losses, reverse=True)


def test_activations_in_files_change_nothing(llama_dir, text_file, tmp_path):
    windows = windows_of(llama_dir, text_file)
    cache = ActivationCache(tmp_path / "quantized")
    assert measured(llama_dir, windows, cache=cache) == measured(llama_dir, windows)


def test_a_probe_shorter_than_a_window(llama_dir, text_file, monkeypatch):
    monkeypatch.setattr(sensitivity, "PROBE_TOKENS", 20)
    assert sensitivity._probe(torch.zeros(3, 32)).shape == (1, 20)
    assert all(sum(it.losses) > 0 for it in measured(llama_dir, windows_of(llama_dir, text_file)))


class _Share(Team):
    """One of two processes, whose exchange is a list that both write."""

    def everyones(self, value):
        self.device.append(value)  # type: ignore[attr-defined]
        return list(self.device) if len(self.device) == 2 else [value, value]  # type: ignore[arg-type, call-overload]


def test_processes_share_the_groups_out(llama_dir, text_file):
    windows = windows_of(llama_dir, text_file)
    exchanged: list = []
    for rank in range(2):
        both = measured(llama_dir, windows, team=_Share(rank, 2, exchanged))
    assert both == measured(llama_dir, windows)


def test_the_memory_of_the_probe_is_all_streams(llama_dir):
    model = api.open_full(llama_dir, "cpu", "float32")
    assert probe_bytes(model) == (1 + 2 * 4) * sensitivity.PROBE_TOKENS * 64 * 4
