"""A packed layer whose scales can be trained, against formulas written from docs/format.md."""

import pytest
import torch

from gptq.tuning.trainable import TrainableLinear, stored_scales
from quant_cuda import PackedWeight
from quant_cuda.packing import pack, pack_zeros

INPUTS, OUTPUTS = 96, 32
GROUPS = {
    "one group": torch.zeros(INPUTS, dtype=torch.int32),
    "natural": (torch.arange(INPUTS) // 32).int(),
    "short last group": (torch.arange(INPUTS) // 64).int(),
    "act-order": (torch.arange(INPUTS) // 64).int()[
        torch.randperm(INPUTS, generator=torch.Generator().manual_seed(1))
    ],
}


def layer(bits: int, groups: torch.Tensor) -> tuple[PackedWeight, torch.Tensor, torch.Tensor]:
    """A random packed weight, some of its scales negative, and its integers less zero points."""
    generator = torch.Generator().manual_seed(bits)
    count = int(groups.max()) + 1
    q = torch.randint(0, 2**bits, (INPUTS, OUTPUTS), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(1, 2**bits, (count, OUTPUTS), generator=generator, dtype=torch.int32)
    scales = torch.randn(count, OUTPUTS, generator=generator).half()
    packed = PackedWeight(
        pack(q, bits), pack_zeros(zeros, bits, 1), scales, groups, bits, -1, in_features=INPUTS
    )
    return packed, q.double() - zeros[groups.long()], scales.double()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
def test_the_weight_and_its_gradient_are_those_of_the_formula(bits, groups):
    packed, levels, scales = layer(bits, groups)
    trainable = TrainableLinear(packed, None)
    assert torch.equal(trainable.weight().double(), (levels * scales[groups.long()]).float())
    given = torch.randn(INPUTS, OUTPUTS, generator=torch.Generator().manual_seed(9))
    factors = torch.full_like(scales, 1.5, requires_grad=True)
    ((levels * (scales * factors)[groups.long()]) * given).sum().backward()
    with torch.no_grad():
        trainable.factors.fill_(1.5)
    (trainable.weight() * given).sum().backward()
    found, expected = trainable.factors.grad[:, 0].double(), factors.grad
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_a_forward_is_the_product_with_the_weight_and_the_bias():
    packed, levels, scales = layer(4, GROUPS["act-order"])
    bias = torch.randn(OUTPUTS)
    x = torch.randn(2, 5, INPUTS)
    expected = x.double() @ (levels * scales[GROUPS["act-order"].long()]) + bias
    found = TrainableLinear(packed, bias)(x)
    assert torch.allclose(found.double(), expected, rtol=1e-4, atol=1e-3)


def test_stored_scales_keep_their_sign_and_are_finite_and_not_zero():
    scales = torch.tensor([1.0, -1.0, 1.0, -1.0, 6e4, -6e4, 2.0**-24])
    factors = torch.tensor([1.25, 1.25, -0.5, -0.5, 2.0, 2.0, 0.1])
    smallest, largest = 2.0**-24, 65504.0
    expected = [1.25, -1.25, smallest, -smallest, largest, -largest, smallest]
    found = stored_scales(scales, factors)
    assert found.dtype == torch.float16
    assert found.tolist() == expected
