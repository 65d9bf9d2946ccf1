"""The choice under a budget, against trying every choice."""

import itertools
import random

import pytest

from gptq.allocation import knapsack
from gptq.allocation.knapsack import Option, choose


def best_loss(items, budget):
    choices = itertools.product(*items)
    return min(
        sum(option.loss for option in choice)
        for choice in choices
        if sum(option.size for option in choice) <= budget
    )


@pytest.mark.parametrize("unit", [1, 7, 4096])
@pytest.mark.parametrize("seed", range(20))
def test_no_choice_is_better(seed, unit):
    draw = random.Random(seed)
    items = [
        [Option(unit * draw.randint(0, 30), draw.random()) for _ in range(draw.randint(1, 4))]
        for _ in range(draw.randint(1, 5))
    ]
    least = sum(min(option.size for option in options) for options in items)
    budget = least + draw.randint(0, unit * 60)
    chosen = [options[index] for options, index in zip(items, choose(items, budget), strict=True)]
    assert sum(option.size for option in chosen) <= budget
    assert sum(option.loss for option in chosen) == pytest.approx(best_loss(items, budget))


def test_sizes_of_no_whole_units_never_exceed_the_budget(monkeypatch):
    monkeypatch.setattr(knapsack, "UNITS", 50)
    draw = random.Random(0)
    for _ in range(50):
        items = [[Option(draw.randint(0, 9973), draw.random()) for _ in range(3)] for _ in range(4)]
        least = sum(min(option.size for option in options) for options in items)
        budget = least + draw.randint(0, 20000)
        chosen = choose(items, budget)
        sizes = [options[i].size for options, i in zip(items, chosen, strict=True)]
        assert sum(sizes) <= budget


def test_equal_losses_take_the_smaller_size():
    assert choose([[Option(9, 1.0), Option(3, 1.0)]], 100) == [1]


def test_a_budget_below_the_smallest_choice_is_refused():
    with pytest.raises(ValueError, match="takes 5 of 4 bytes"):
        choose([[Option(5, 1.0), Option(8, 0.5)]], 4)
