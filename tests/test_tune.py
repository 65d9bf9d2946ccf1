"""Tuning a block: nearer to the full block than the solver alone, and still on the grid."""

import copy

import pytest
import torch

from gptq import QuantConfig, skeleton
from gptq.solver import solve
from gptq.source import open_model
from gptq.stages import advance, finish, stages
from gptq.tune import tune

CPU = torch.device("cpu")


def solved_block(folder, config, windows):
    """A block, its layers' solutions, batches and what the full block makes of them."""
    source = open_model(folder)
    spec = source.spec
    model = skeleton.build(source.config, spec, CPU)
    tokens = torch.randint(2, 300, (windows, 32), generator=torch.Generator().manual_seed(0))
    stream = skeleton.embed(model, spec, source.tensors, tokens, CPU, torch.float32, 64)
    block = skeleton.fill(model, spec, spec.block(0), source.tensors, CPU, torch.float32)
    targets = [skeleton.run_block(block, *item) for item in stream]
    runs = [stages(block, spec, *item) for item in stream]
    solutions = {}
    for group in spec.groups:
        x = torch.cat([inputs.x.flatten(0, -2) for inputs in advance(runs)])
        for name in group:
            solutions[name] = solve(skeleton.linear(block, name).weight, x.T @ x / len(x), config)
    finish(runs)
    return block, solutions, list(stream), targets


def error(block, solutions, batches, targets):
    """Relative error of the block's output, weights taken from the solutions."""
    changed = copy.deepcopy(block)
    for name, solution in solutions.items():
        skeleton.linear(changed, name).weight.copy_(solution.dequantize())
    total = 0.0
    for batch, target in zip(batches, targets, strict=True):
        output = skeleton.run_block(changed, *batch)
        size = target.square().mean(-1, keepdim=True)
        total += float(((output - target).square() / size).mean())
    return total / len(batches)


@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("bits", [2, 4])
def test_tuning_lowers_the_blocks_error(model_dir, bits, sym):
    config = QuantConfig(bits=bits, group_size=48, sym=sym, quality="best")
    block, solutions, batches, targets = solved_block(model_dir, config, windows=8)
    before = {name: parameter.clone() for name, parameter in block.named_parameters()}
    tuned = tune(block, solutions, batches, targets, bits, seed=0)
    assert error(block, tuned, batches, targets) < 0.9 * error(block, solutions, batches, targets)
    for name, parameter in block.named_parameters():
        assert torch.equal(parameter, before[name])
    for name, solution in tuned.items():
        start = solutions[name]
        assert int(solution.q.max()) < 2**bits
        assert solution.scales.dtype == torch.float16
        assert bool((solution.scales != 0).all())
        assert torch.equal(solution.zeros, start.zeros)
        assert not torch.equal(solution.q, start.q)
        # Only numbers near a half can have moved to their neighbour.
        assert int((solution.q.int() - start.q.int()).abs().max()) <= 1


def test_no_steps_change_nothing(llama_dir):
    config = QuantConfig(bits=3, group_size=32, quality="best")
    block, solutions, batches, targets = solved_block(llama_dir, config, windows=2)
    tuned = tune(block, solutions, batches, targets, bits=3, seed=0, steps=0)
    for name, solution in tuned.items():
        assert torch.equal(solution.q, solutions[name].q)
        assert torch.equal(solution.scales, solutions[name].scales)


def test_equal_seeds_give_equal_results(llama_dir):
    config = QuantConfig(bits=4, group_size=32, quality="best")
    block, *rest = solved_block(llama_dir, config, windows=4)
    first, second, other = (tune(block, *rest, bits=4, seed=seed, steps=5) for seed in (1, 1, 2))
    assert all(torch.equal(first[name].q, second[name].q) for name in first)
    assert any(not torch.equal(first[name].scales, other[name].scales) for name in first)


def test_origins_are_needed(llama_dir):
    config = QuantConfig(bits=4, group_size=32)
    block, *rest = solved_block(llama_dir, config, windows=2)
    with pytest.raises(ValueError, match="what the integers were rounded from"):
        tune(block, *rest, bits=4, seed=0)
