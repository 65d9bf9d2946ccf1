"""Other packages' products on a GPU, timed beside ours. A part of benchmarks/gpu.py."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu_models import GROUP_SIZE, random_weight

Calls = list[Callable[[], Tensor]]
Layer = Callable[[Tensor], Tensor]
Timer = Callable[[Calls], float]


class Case(NamedTuple):
    """What products are timed for."""

    bits: int
    shape: tuple[int, int]
    """Inputs and outputs."""
    rows: tuple[int, ...]
    """Of x, each in turn."""


# What rounding to 4 bits without a search moves products by is about a tenth.
TOLERANCE = 0.2


def torch_int4(x: Tensor, inputs: int, outputs: int, count: int) -> Calls:
    """Calls of torch's own 4-bit product, with `count` random weights; none if it is not there.

    x: (rows, in); the product takes bfloat16.
    """
    x = x.bfloat16()
    try:
        return [_int4(x, inputs, outputs) for _ in range(count)]
    except (AttributeError, RuntimeError) as error:
        print(f"torch's 4-bit product is not timed: {error}")
        return []


def _int4(x: Tensor, inputs: int, outputs: int) -> Callable[[], Tensor]:
    packed = torch.randint(256, (outputs, inputs // 2), device=x.device, dtype=torch.uint8)
    words = torch.ops.aten._convert_weight_to_int4pack(packed, 8)
    grids = torch.rand((inputs // GROUP_SIZE, outputs, 2), device=x.device).bfloat16() * 0.01
    call = partial(torch.ops.aten._weight_int4pack_mm, x, words, GROUP_SIZE, grids)
    call()
    return call


def peers(
    names: Sequence[str],
    cases: Sequence[Case],
    cold_bytes: int,
    time: Timer,
    device: str = "cuda",
) -> Iterator[dict[str, Any]]:
    """Seconds of a product of each package of PEERS that is installed, for each case's rows.

    cold_bytes: that the weights of one timing take at least.
    A package may raise anything when it compiles; a line says so, and the next one follows.
    """
    for name in names:
        for bits, shape, rows in cases:
            inputs, outputs = shape
            count = max(4, cold_bytes // (inputs * outputs * bits // 8))
            try:
                layers = _checked_layers(name, bits, shape, count, device)
                for n in rows:
                    x = torch.randn(n, inputs, device=device, dtype=torch.float16)
                    seconds = time([partial(layer, x) for layer in layers])
                    sizes = {"bits": bits, "inputs": inputs, "outputs": outputs, "rows": n}
                    yield {"peer": name, **sizes, "seconds": seconds}
            except Exception as error:
                reason = str(error).strip().partition("\n")[0]
                shown = f"{name}, {bits} bit, {inputs} x {outputs}"
                print(f"{shown}, is not timed: {type(error).__name__}: {reason}", flush=True)


@torch.no_grad()
def _checked_layers(
    name: str, bits: int, shape: tuple[int, int], count: int, device: str
) -> list[Layer]:
    """Layers of random weights. Raises ValueError if the first is far from its own weight."""
    layers = []
    for index in range(count):
        layer, dense = PEERS[name](bits, *shape)
        layers.append(layer)
        if index == 0 and dense is not None:
            x = torch.randn(4, shape[0], device=device, dtype=torch.float16)
            exact = x.float() @ dense.float().T
            error = float((layer(x).float() - exact).norm() / exact.norm())
            if not error < TOLERANCE:
                raise ValueError(f"its products are {error:.2g} from those of its weight")
    return layers


def _marlin(bits: int, inputs: int, outputs: int) -> tuple[Layer, Tensor | None]:
    """GPTQModel's, which takes symmetric weights alone."""
    from gptqmodel.nn_modules.qlinear.marlin import MarlinLinear

    layer = MarlinLinear(
        bits=bits,
        group_size=GROUP_SIZE,
        desc_act=False,
        sym=True,
        bias=False,
        in_features=inputs,
        out_features=outputs,
    ).to("cuda")
    weight = random_weight(bits, inputs, outputs, "cuda")
    layer.qweight.data, layer.scales.data = weight.qweight, weight.scales
    layer.post_init()
    return layer, None


def _humming(bits: int, inputs: int, outputs: int) -> tuple[Layer, Tensor | None]:
    from humming.layer import HummingLayer

    dense = torch.randn(outputs, inputs, device="cuda", dtype=torch.float16) * 0.02
    grid = {"dtype": f"uint{bits}", "group_size": GROUP_SIZE, "has_zero_point": True}
    layer = HummingLayer(
        shape_n=outputs, shape_k=inputs, weight_config=grid, torch_dtype=torch.float16
    ).to("cuda")
    layer.load_from_unquantized(dense)
    layer.transform()
    return layer, dense


def _gemlite(bits: int, inputs: int, outputs: int) -> tuple[Layer, Tensor | None]:
    from gemlite.helper import A16Wn

    integers = torch.randint(2**bits, (outputs, inputs), device="cuda", dtype=torch.uint8)
    groups = (outputs, inputs // GROUP_SIZE)
    scales = (torch.rand(groups, device="cuda") * 0.01 + 0.01).half()
    zeros = torch.full(groups, 2.0 ** (bits - 1), device="cuda", dtype=torch.float16)
    layer = A16Wn(device="cuda:0", dtype=torch.float16).from_weights(
        integers, scales.view(-1, 1), zeros.view(-1, 1), bits, GROUP_SIZE
    )
    apart = integers.view(*groups, GROUP_SIZE).half() - zeros[..., None]
    return layer, (apart * scales[..., None]).view(outputs, inputs)


PEERS: dict[str, Callable[[int, int, int], tuple[Layer, Tensor | None]]] = {
    "marlin": _marlin,
    "humming": _humming,
    "gemlite": _gemlite,
}
"""Made of bits, inputs and outputs: a layer, and if it is known the weight (out, in) that its
products are compared with."""

DISTRIBUTIONS = {"marlin": "gptqmodel", "humming": "humming-kernels", "gemlite": "gemlite"}
"""The distribution that each is in, whose version results name."""
