"""Decoder blocks of random packed weights, and what they compute: in float64, and in any dtype."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from helpers.emulated import Kernels
from helpers.products import packed
from quant_cuda.cuda import decoder_block, operator
from quant_cuda.cuda.decoder_block import Block, Cache

EPSILONS = (1e-5, 3e-5, 1e-6, 2e-6)
SCALE = 0.3
ROOM = 200


@dataclass(frozen=True)
class Shape:
    """Of blocks and their weights."""

    hidden: int = 128
    heads: int = 4
    key_heads: int = 2
    dim: int = 32
    inner: int = 160
    bits: tuple[int, ...] = (4,) * 7
    group_size: int = 32
    has_bias: bool = False
    has_head_norms: bool = False
    dtype: torch.dtype = torch.float16

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Inputs and outputs, in the order of WEIGHTS."""
        q, kv = self.heads * self.dim, self.key_heads * self.dim
        inward = [(self.hidden, size) for size in (q, kv, kv)]
        gates = [(self.hidden, self.inner)] * 2
        return [*inward, (q, self.hidden), *gates, (self.inner, self.hidden)]


@dataclass(frozen=True)
class Made:
    """A block, and the same numbers for the oracle."""

    block: Block
    matrices: list[Tensor]
    biases: list[Tensor | None]
    norms: list[Tensor]


def random(*shape: int, dtype: torch.dtype, seed: int, around: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (around + torch.randn(shape, generator=generator) / 4).to(dtype)


def make(shape: Shape, device: str, seed: int = 0) -> Made:
    """A block of random weights, whose outputs are about as large as its inputs."""
    weights, matrices = [], []
    for index, (n_in, n_out) in enumerate(shape.sizes):
        weight, matrix = packed(shape.bits[index], n_in, n_out, shape.group_size)
        # A power of two, so that the scales stay exact.
        moved = {name: getattr(weight, name).to(device) for name in ("qweight", "qzeros")}
        scales = (weight.scales / 8).to(device)
        weights.append(operator.prepare(replace(weight, **moved, scales=scales)))
        matrices.append(torch.from_numpy(matrix) / 8)
    biases: list[Tensor | None] = [
        random(n_out, dtype=shape.dtype, seed=10 * seed + i) if shape.has_bias else None
        for i, (_, n_out) in enumerate(shape.sizes)
    ]
    sizes = (shape.hidden, shape.hidden, *((shape.dim,) * 2 if shape.has_head_norms else ()))
    norms = [
        random(size, dtype=shape.dtype, seed=20 + seed + i, around=1.0)
        for i, size in enumerate(sizes)
    ]
    there = [norm.to(device) for norm in norms]
    block = Block(
        weights,
        [None if bias is None else bias.to(device) for bias in biases],
        list(zip(there, EPSILONS, strict=False)),
        shape.dim,
        SCALE,
    )
    return Made(block, matrices, biases, norms)


def norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    wide = x.double() if x.dtype == torch.float64 else x.float()
    factor = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return weight.to(x.dtype) * (wide * factor).to(x.dtype)


def turned(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """x (rows, heads, dim)."""
    first, second = x.chunk(2, -1)
    return x * cosines + torch.cat([-second, first], -1) * sines


def oracle(
    made: Made, shape: Shape, x: Tensor, angles: tuple[Tensor, Tensor], past: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """The block's output (rows, hidden), and the new key and value, in x's dtype.

    past: keys and values (rows, key heads, n, dim).
    """
    linears = [
        lambda h, m=matrix, b=bias: h @ m.to(x.dtype) + (0 if b is None else b.to(x.dtype))
        for matrix, bias in zip(made.matrices, made.biases, strict=True)
    ]
    rows = len(x)
    h = norm(x, made.norms[0], EPSILONS[0])
    query, key, value = (linear(h).view(rows, -1, shape.dim) for linear in linears[:3])
    if shape.has_head_norms:
        query = norm(query, made.norms[2], EPSILONS[2])
        key = norm(key, made.norms[3], EPSILONS[3])
    cosines, sines = (angle.view(-1).to(x.dtype) for angle in angles)
    query, key = turned(query, cosines, sines), turned(key, cosines, sines)
    keys, values = (
        torch.cat([old.to(x.dtype), new[:, :, None]], 2).repeat_interleave(
            shape.heads // shape.key_heads, 1
        )
        for old, new in zip(past, (key, value), strict=True)
    )
    scores = (query[:, :, None] @ keys.transpose(2, 3)) * SCALE
    attended = (scores.softmax(-1) @ values).reshape(rows, -1)
    x = x + linears[3](attended)
    h = norm(x, made.norms[1], EPSILONS[1])
    x = x + linears[6](torch.nn.functional.silu(linears[4](h)) * linears[5](h))
    return x, key, value


def run_and_compare(
    kernels: Kernels,
    shape: Shape,
    rows: int = 1,
    length: int = 5,
    blocks: int = 1,
    processors: int = 4,
    captured: bool = False,
) -> None:
    """Blocks on random tokens and caches, against float64 and against torch in the same dtype."""
    device, dtype = kernels.device, shape.dtype
    made = [make(shape, device, seed) for seed in range(blocks)]
    x = random(rows, 1, shape.hidden, dtype=dtype, seed=1)
    angle = torch.arange(shape.dim // 2).repeat(2).double() * 0.37
    angles = angle.cos().to(dtype).view(1, 1, -1), angle.sin().to(dtype).view(1, 1, -1)
    room = (rows, shape.key_heads, ROOM, shape.dim)
    pasts = [
        tuple(random(*room, dtype=dtype, seed=30 + 2 * i + j) for j in range(2))
        for i in range(blocks)
    ]
    # Past the tokens so far there may be anything.
    caches = []
    for keys, values in pasts:
        there = [it.clone() for it in (keys, values)]
        for it in there:
            it[:, :, length:] = float("nan")
        there = [it.to(device) for it in there]
        position = torch.tensor([length], device=device) if captured else None
        caches.append(Cache(*there, 0 if captured else length, position))
    result = decoder_block.run(
        [it.block for it in made],
        x.to(device),
        *(it.to(device) for it in angles),
        caches,
        launch=kernels.launch(processors),
    )
    outputs = {}
    for kind in (torch.float64, dtype):
        y, new = x[:, 0].to(kind), []
        for it, past in zip(made, pasts, strict=True):
            seen = tuple(states[:, :, :length] for states in past)
            y, key, value = oracle(it, shape, y, angles, seen)
            new += [key, value]
        outputs[kind] = [y, *new]
    ours = [result[:, 0].cpu()]
    for cache in caches:
        ours += [states[:, :, length].cpu() for states in (cache.keys, cache.values)]
    for mine, naive, exact in zip(ours, outputs[dtype], outputs[torch.float64], strict=True):
        assert mine.dtype == dtype
        limit = 2 * (naive.double() - exact).norm() + torch.finfo(dtype).eps * exact.norm()
        assert (mine.double() - exact).norm() <= limit
    for cache, past in zip(caches, pasts, strict=True):
        for states, old in zip((cache.keys, cache.values), past, strict=True):
            assert torch.equal(states[:, :, :length].cpu(), old[:, :, :length])
            assert bool(states[:, :, length + 1 :].isnan().all())
