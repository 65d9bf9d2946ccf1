"""What a width costs the model, against Hugging Face's forward with the same layer quantized."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from gptq import QuantConfig, api
from gptq.allocation import sensitivity
from gptq.allocation.losses import divergence
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
REFERENCE = Width(2, 32)
DEFAULT = QuantConfig()


def windows_of(folder, text_file):
    return calibration_windows(text_file, api.open_model(folder).tokenizer(), 8, 32, 0)


def measured(folder, windows, config=DEFAULT, **more):
    model = api.open_full(folder, "cpu", "float32")
    return measure(model, windows, config, WIDTHS, REFERENCE, **more)


@torch.no_grad()
def naive(folder, spec, windows, number, share):
    """The divergence with group `number` in the reference width, and the output layer of its branch
    corrected for `share` of the error, all else as it is."""
    windows, probe = windows[:7], windows[7:]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    full = model(probe).logits.log_softmax(-1)
    block, place = divmod(number, len(spec.groups))
    layers = [
        model.get_submodule(f"{spec.block(block)}.{name}") for name in spec.groups[place].layers
    ]

    def inputs_of(layer):
        seen = []
        hook = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        model(windows)
        hook.remove()
        return seen[0].flatten(0, 1)

    x = inputs_of(layers[0])
    output = model.get_submodule(f"{spec.block(block)}.{spec.groups[place].branch.output}")
    before = inputs_of(output)
    hessian = Hessian(x.T @ x / len(x))
    config = QuantConfig(
        bits=REFERENCE.bits,
        group_size=REFERENCE.group_size,
        error_feedback=0.0,
        adaptive_damp=False,
        refine=1,
    )
    solution = solve_layer(torch.cat([layer.weight for layer in layers]), hessian, config)
    parts = solution.dequantize().split([layer.out_features for layer in layers])
    for layer, part in zip(layers, parts, strict=True):
        layer.weight.copy_(part)
    if share and layers[0] is not output:
        after = inputs_of(output)
        H = after.T @ after / len(after)
        missing = output.weight @ ((before - after).T @ after / len(after))
        damped = H + config.percdamp * H.diagonal().mean() * torch.eye(len(H))
        output.weight.add_(share * torch.linalg.solve(damped, missing.T).T)
    other = model(probe).logits.log_softmax(-1)
    return float((full.exp() * (full - other)).sum(-1).mean())


@pytest.mark.parametrize("samples", [sensitivity.SAMPLES, 50_000])
@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize("fixture", SPECS)
def test_the_reference_is_what_the_model_loses(
    fixture, share, samples, request, text_file, monkeypatch
):
    """The more tokens stand for a distribution of 320, the better they tell it."""
    tolerance = 0.25 if samples == sensitivity.SAMPLES else 0.05
    monkeypatch.setattr(sensitivity, "SAMPLES", samples)
    folder, spec = request.getfixturevalue(fixture), SPECS[fixture]
    windows = windows_of(folder, text_file)
    config = QuantConfig(error_feedback=share, adaptive_damp=False)
    for number, group in enumerate(measured(folder, windows, config)):
        expected = naive(folder, spec, windows, number, share)
        assert group.losses[REFERENCE] == pytest.approx(expected, rel=tolerance, abs=4e-7)
        block, place = divmod(number, len(spec.groups))
        names = spec.groups[place].layers
        assert group.layers == tuple(f"{spec.block(block)}.{name}" for name in names)


def test_more_bits_lose_less(llama_dir, text_file):
    for group in measured(llama_dir, windows_of(llama_dir, text_file)):
        losses = [group.losses[width] for width in WIDTHS]
        assert losses == sorted(losses, reverse=True)


def test_activations_in_files_change_nothing(llama_dir, text_file, tmp_path):
    windows = windows_of(llama_dir, text_file)
    cache = ActivationCache(tmp_path / "quantized")
    assert measured(llama_dir, windows, cache=cache) == measured(llama_dir, windows)


def test_a_probe_shorter_than_a_window(llama_dir, text_file, monkeypatch):
    monkeypatch.setattr(sensitivity, "PROBE_TOKENS", 20)
    calibration, probe = sensitivity._split(torch.zeros(3, 32))
    assert (calibration.shape, probe.shape) == ((2, 32), (1, 20))
    calibration, probe = sensitivity._split(torch.zeros(1, 32))
    assert (calibration.shape, probe.shape) == ((1, 32), (1, 20))
    assert all(
        sum(it.losses.values()) > 0 for it in measured(llama_dir, windows_of(llama_dir, text_file))
    )


@pytest.mark.parametrize("ends", [(), (Width(4, 32), Width(8, 64))])
def test_progress_goes_to_its_end(ends, llama_dir, text_file):
    steps: list[tuple[int, int]] = []
    windows = windows_of(llama_dir, text_file)
    measured(llama_dir, windows, ends=ends, progress=lambda *step: steps.append(step))
    percents = [done for done, _ in steps]
    assert len(steps) == (3 if ends else 2)
    assert percents == sorted(set(percents))
    assert steps[-1] == (100, 100)


def test_later_blocks_are_more_work(llama_dir):
    model = api.open_full(llama_dir, "cpu", "float32")
    # 4 groups in a block: 8 * 10 tokens, then 4 * 20 more for what the first block changed.
    windows, probe = torch.zeros(1, 10), torch.zeros(1, 20)
    assert sensitivity._percents(model, windows, probe, ends=False) == [33, 100]
    assert sensitivity._percents(model, windows, probe, ends=True) == [25, 75]


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
    heads = 2 * model.source.config.vocab_size * 64 * 4
    assert probe_bytes(model, ends=True) == (2 + 2 * 4) * sensitivity.PROBE_TOKENS * 64 * 4 + heads


@pytest.mark.parametrize("error", [0.0, 1e-3, 1e-2, 0.3])
@pytest.mark.parametrize("offset", [0.0, -30.0, 40.0])
def test_small_divergences_of_many_tokens(error, offset):
    """A difference of two large sums loses what 4 bits cost a layer, 2e-4 nats a token."""
    generator = torch.Generator().manual_seed(3)
    full = 3 * torch.randn((2, 8, 40_000), generator=generator, dtype=torch.float64) + offset
    other = full + error * torch.randn(full.shape, generator=generator, dtype=torch.float64)
    wanted, found = full.log_softmax(-1), other.log_softmax(-1)
    exact = float((wanted.exp() * (wanted - found)).sum())
    assert divergence(full.float().log_softmax(-1), other.float()) == pytest.approx(
        exact, rel=2e-3, abs=1e-7
    )


@torch.no_grad()
def naive_ends(folder, spec, windows, bits):
    """The divergence with the embedding rounded and the head solved, all else as it is."""
    windows, probe = windows[:7], windows[7:]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    full = model(probe).logits.log_softmax(-1)
    seen = []
    hook = model.lm_head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(windows)
    hook.remove()
    x = seen[0].flatten(0, 1)
    config = QuantConfig(bits=bits, group_size=32, error_feedback=0.0, adaptive_damp=False)
    embedding, head = model.get_input_embeddings(), model.lm_head
    solved = solve_layer(head.weight, Hessian(x.T @ x / len(x)), replace(config, refine=1))
    rounded = solve_layer(embedding.weight, None, config).dequantize()
    embedding.weight = torch.nn.Parameter(rounded)
    head.weight = torch.nn.Parameter(solved.dequantize())
    other = model(probe).logits.log_softmax(-1)
    return float((full.exp() * (full - other)).sum(-1).mean())


@pytest.mark.parametrize("fixture", SPECS)
def test_what_the_embedding_and_the_head_lose(fixture, request, text_file):
    folder, spec = request.getfixturevalue(fixture), SPECS[fixture]
    windows = windows_of(folder, text_file)
    ends = (Width(4, 32), Width(8, 64))
    *groups, found = measured(folder, windows, QuantConfig(adaptive_damp=False), ends=ends)
    assert [it.layers for it in groups] == [it.layers for it in measured(folder, windows)]
    assert found.layers == (spec.embed[0],)
    expected = naive_ends(folder, spec, windows, 4)
    assert found.losses[ends[0]] == pytest.approx(expected, rel=0.05, abs=4e-7)
    # The square of the steps' ratio, 17, within what few values to a group leave to chance.
    assert 100 < found.losses[ends[0]] / found.losses[ends[1]] < 800
