"""Decoder blocks of random packed weights, and what they compute: in float64, and in any dtype."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from helpers.emulated import Kernels
from helpers.products import packed
from quant_cuda.cuda import decoder_block, operator
from quant_cuda.cuda.decoder_block import Block, Cache, Norm
from quant_cuda.weight import PreparedWeight

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
    is_bloom: bool = False
    dtype: torch.dtype = torch.float16

    @property
    def sizes(self) -> list[tuple[int, int] | None]:
        """Inputs and outputs, in the order of WEIGHTS."""
        q, kv = self.heads * self.dim, self.key_heads * self.dim
        if self.is_bloom:
            fused, up = (self.hidden, 3 * q), (self.hidden, self.inner)
            return [fused, None, None, (q, self.hidden), None, up, (self.inner, self.hidden)]
        inward = [(self.hidden, size) for size in (q, kv, kv)]
        gates = [(self.hidden, self.inner)] * 2
        return [*inward, (q, self.hidden), *gates, (self.inner, self.hidden)]


@dataclass(frozen=True)
class Made:
    """A block, and the same numbers for the oracle."""

    block: Block
    matrices: list[Tensor | None]
    biases: list[Tensor | None]
    norms: list[Norm]
    slopes: Tensor | None


def random(*shape: int, dtype: torch.dtype, seed: int, around: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (around + torch.randn(shape, generator=generator) / 4).to(dtype)


def make(shape: Shape, device: str, seed: int = 0) -> Made:
    """A block of random weights, whose outputs are about as large as its inputs."""
    weights: list[PreparedWeight | None] = []
    matrices: list[Tensor | None] = []
    biases: list[Tensor | None] = []
    for index, size in enumerate(shape.sizes):
        if size is None:
            for kept in (weights, matrices, biases):
                kept.append(None)
            continue
        weight, matrix = packed(shape.bits[index], *size, shape.group_size)
        # A power of two, so that the scales stay exact.
        moved = {name: getattr(weight, name).to(device) for name in ("qweight", "qzeros")}
        scales = (weight.scales / 8).to(device)
        weights.append(operator.prepare(replace(weight, **moved, scales=scales)))
        matrices.append(torch.from_numpy(matrix) / 8)
        bias = random(size[1], dtype=shape.dtype, seed=10 * seed + index)
        biases.append(bias if shape.has_bias else None)
    sizes = (shape.hidden, shape.hidden, *((shape.dim,) * 2 if shape.has_head_norms else ()))
    norms = [
        Norm(
            random(size, dtype=shape.dtype, seed=20 + seed + i, around=1.0),
            EPSILONS[i],
            random(size, dtype=shape.dtype, seed=40 + seed + i) if shape.is_bloom else None,
        )
        for i, size in enumerate(sizes)
    ]
    slopes = 0.7 ** torch.arange(1, 1 + shape.heads).float() if shape.is_bloom else None
    block = Block(
        weights,
        [moved_to(device, bias) for bias in biases],
        [
            norm._replace(weight=norm.weight.to(device), bias=moved_to(device, norm.bias))
            for norm in norms
        ],
        shape.dim,
        SCALE,
        moved_to(device, slopes),
    )
    return Made(block, matrices, biases, norms, slopes)


def moved_to(device: str, tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(device)


def normed(x: Tensor, norm: Norm) -> Tensor:
    wide = x.double() if x.dtype == torch.float64 else x.float()
    if norm.bias is not None:
        by, more = (it.to(wide.dtype) for it in (norm.weight, norm.bias))
        return functional.layer_norm(wide, by.shape, by, more, norm.epsilon).to(x.dtype)
    factor = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.epsilon)
    return norm.weight.to(x.dtype) * (wide * factor).to(x.dtype)


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
    rows = len(x)

    def linear(index: int, h: Tensor) -> Tensor:
        bias = made.biases[index]
        return h @ made.matrices[index].to(x.dtype) + (0 if bias is None else bias.to(x.dtype))

    h = normed(x, made.norms[0])
    if shape.is_bloom:
        query, key, value = linear(0, h).view(rows, shape.heads, 3, shape.dim).unbind(2)
    else:
        query, key, value = (linear(i, h).view(rows, -1, shape.dim) for i in range(3))
        if shape.has_head_norms:
            query, key = normed(query, made.norms[2]), normed(key, made.norms[3])
        cosines, sines = (angle.view(-1).to(x.dtype) for angle in angles)
        query, key = turned(query, cosines, sines), turned(key, cosines, sines)
    keys, values = (
        torch.cat([old.to(x.dtype), new[:, :, None]], 2).repeat_interleave(
            shape.heads // shape.key_heads, 1
        )
        for old, new in zip(past, (key, value), strict=True)
    )
    scores = (query[:, :, None] @ keys.transpose(2, 3)) * SCALE
    if made.slopes is not None:
        distances = torch.arange(keys.shape[2]) - (keys.shape[2] - 1)
        scores = scores + (made.slopes[:, None] * distances).to(x.dtype)[:, None]
    attended = (scores.softmax(-1) @ values).reshape(rows, -1)
    x = x + linear(3, attended)
    h = normed(x, made.norms[1])
    if shape.is_bloom:
        inner = functional.gelu(linear(5, h), approximate="tanh")
    else:
        inner = functional.silu(linear(4, h)) * linear(5, h)
    return x + linear(6, inner), key, value


def run_and_compare(
    kernels: Kernels,
    shape: Shape,
    rows: int = 1,
    length: int = 5,
    blocks: int = 1,
    processors: int = 4,
    captured: bool = False,
    overlaps: bool = False,
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
        None if shape.is_bloom else tuple(it.to(device) for it in angles),
        caches,
        launch=kernels.launch(processors),
        overlaps=overlaps,
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
