"""The divergence by few tokens of each distribution, against the sum over the vocabulary."""

import pytest
import torch

from gptq.allocation.losses import SAMPLES, sample_tokens, sampled_divergence


def distributions(spread, error, offset=0.0):
    """Logits of two distributions of 400 tokens, and the mean divergence in float64."""
    generator = torch.Generator().manual_seed(5)
    full = spread * torch.randn((2, 200, 3000), generator=generator, dtype=torch.float64)
    other = full + error * torch.randn(full.shape, generator=generator, dtype=torch.float64)
    wanted, found = full.log_softmax(-1), other.log_softmax(-1)
    exact = float((wanted.exp() * (wanted - found)).sum())
    return full.float(), (other + offset).float(), exact


def sampled(full, other, count):
    tokens = sample_tokens(full.softmax(-1), count)
    return sampled_divergence(full.gather(-1, tokens), other.gather(-1, tokens))


def test_a_token_comes_as_often_as_it_is_likely():
    probabilities = torch.rand((3, 50), generator=torch.Generator().manual_seed(0)).square()
    probabilities /= probabilities.sum(-1, keepdim=True)
    tokens = sample_tokens(probabilities, 40)
    for own, found in zip(probabilities, tokens, strict=True):
        times = torch.bincount(found, minlength=50)
        assert int(times.sum()) == 40
        assert bool(((times - 40 * own).abs() < 1 + 1e-4).all())


def test_every_token_of_a_uniform_distribution_is_drawn():
    full, other, _ = distributions(0.0, 0.5)
    tokens = sample_tokens(full.softmax(-1), 3000)
    assert torch.equal(tokens, torch.arange(3000).expand(2, 200, -1))
    wanted, found = full.double().log_softmax(-1), other.double().log_softmax(-1)
    exact = (wanted.exp() * (wanted - found)).sum()
    assert sampled(full, other, 3000) == pytest.approx(float(exact), rel=1e-5)


@pytest.mark.parametrize("spread", [1.0, 3.0, 8.0])
@pytest.mark.parametrize("error", [1e-2, 0.3])
@pytest.mark.parametrize("offset", [0.0, 40.0])
def test_few_tokens_tell_the_divergence(spread, error, offset):
    full, other, exact = distributions(spread, error, offset)
    # A constant that is added costs the float32 logits the digits of small errors.
    assert sampled(full, other, SAMPLES) == pytest.approx(exact, rel=0.06)
    assert sampled(full, other, 20_000) == pytest.approx(exact, rel=0.02)


def test_no_change_loses_nothing():
    full, _, _ = distributions(3.0, 0.1)
    assert sampled(full, full, SAMPLES) == pytest.approx(0, abs=1e-9)


def test_a_change_beyond_all_measure_is_still_a_number():
    full, other, _ = distributions(3.0, 500.0)
    assert 0 < sampled(full, other, SAMPLES) < float("inf")


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_no_token_is_outside_the_vocabulary_if_there_is_no_distribution(value):
    tokens = sample_tokens(torch.full((2, 7), value), 3)
    assert bool((tokens < 7).all())
