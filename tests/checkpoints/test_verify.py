"""What is written is compared with what was read, before it replaces anything."""

import pytest
import torch
from torch import tensor

from gptq.checkpoints import verify as module
from gptq.checkpoints.layouts import PackedLayer
from gptq.checkpoints.verify import verify


class Row:
    """A format as `verify` sees it."""

    def __init__(self, weights, tolerance):
        self.weights, self.allowed = weights, tolerance

    def read(self, target, source):
        return self.weights

    def tolerance(self, canonical, layer):
        return self.allowed


class Canonical:
    source = None

    def __init__(self, layers):
        self.layers = tuple(layers)


def layer(name: str) -> PackedLayer:
    return PackedLayer(name=name, inputs=2, outputs=2, bits=4, groups=1, group_size=-1)


BEFORE = {"a": tensor([[1.0, -2.0], [0.0, 4.0]]), "b": tensor([[1.0, 1.0], [1.0, 1.0]])}
ONE, TWO = layer("a"), layer("b")


def compare(monkeypatch, after, tolerance=0.0, packed=(ONE, TWO)):
    weights = {f"{name}.weight": value for name, value in (BEFORE | after).items()}
    monkeypatch.setattr(module, "FORMATS", {"x": Row(weights, tolerance)})
    monkeypatch.setattr(module, "dequantize", lambda _, layer, dtype: BEFORE[layer.name].to(dtype))
    verify(Canonical([ONE, TWO]), Canonical(packed), "target", "x")


def test_equal_weights_are_taken(monkeypatch):
    compare(monkeypatch, {})


@pytest.mark.parametrize("name", ["a", "b"])
@pytest.mark.parametrize("sign", [1, -1])
def test_one_weight_of_any_layer_that_differs(monkeypatch, name, sign):
    after = BEFORE[name].clone()
    after[1, 1] += sign * 1e-6 * after[1, 1]
    with pytest.raises(RuntimeError, match=f"{name} was not written as it was read"):
        compare(monkeypatch, {name: after})


def test_a_tolerance_is_a_share_of_the_weight(monkeypatch):
    compare(monkeypatch, {"a": tensor([[1.0, -2.5], [0.0, 5.0]])}, tolerance=0.25)
    for wrong in ([[1.0, -2.6], [0.0, 4.0]], [[1.0, -2.0], [1e-9, 4.0]]):
        with pytest.raises(RuntimeError, match="a was not written"):
            compare(monkeypatch, {"a": tensor(wrong)}, tolerance=0.25)


def test_a_layer_that_is_not_packed_has_no_tolerance(monkeypatch):
    after = {"b": 1.1 * BEFORE["b"]}
    compare(monkeypatch, after, tolerance=0.25)
    with pytest.raises(RuntimeError, match="b was not written"):
        compare(monkeypatch, after, tolerance=0.25, packed=(ONE,))


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_no_number_differs(monkeypatch, wrong):
    after = torch.full((2, 2), wrong)
    with pytest.raises(RuntimeError, match="a was not written"):
        compare(monkeypatch, {"a": after}, tolerance=0.25)


def test_another_shape_differs(monkeypatch):
    with pytest.raises(RuntimeError, match="b was not written"):
        compare(monkeypatch, {"b": tensor([[1.0, 1.0]])})


def test_a_format_that_cannot_be_read_back_is_not_compared(monkeypatch):
    row = Row({}, 0.0)
    row.read = None
    monkeypatch.setattr(module, "FORMATS", {"x": row})
    verify(Canonical([ONE]), Canonical([ONE]), "target", "x")
