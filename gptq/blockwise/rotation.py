"""A full model with rotated hidden states: other weights, the same logits.

An orthogonal matrix Q is merged into all weights that read or write the hidden states, and the
weights of norms into the layers behind them, so that nothing is computed in addition when the model
runs (QuaRot, Ashkboos et al. 2024, arXiv 2404.00456, section 4; R1 of SpinQuant, Liu et al. 2024,
arXiv 2405.16406, section 3). What single channels have in excess is then spread over all of them,
and a group's weights are nearer to a normal distribution.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from gptq.blockwise.model import BlockwiseModel
from gptq.errors import SettingError
from gptq.files.lazy import Entry, LazyTensors

SEED = 0
LARGEST = 64
"""Order of a Hadamard matrix: a row costs less with small ones, and needs more of them."""
ROWS = 4096
"""Of a weight that are rotated at once, in float64: this limits memory."""


class Rotation:
    """Multiplication of rows (..., size) by an orthogonal matrix Q that is random but fixed.

    size is 2**k * odd. Q is diag(signs) times the Kronecker product of Hadamard matrices, over
    their roots, of orders that are powers of two and at most LARGEST, and of a random orthogonal
    one of order `odd`. Each row is multiplied by one after the other.
    device: where products are computed, in float64; rows come from the CPU and go back.
    """

    def __init__(self, size: int, device: torch.device | str = "cpu") -> None:
        generator = torch.Generator().manual_seed(SEED)
        self._signs = 2.0 * torch.randint(0, 2, (size,), generator=generator).double() - 1
        power = size & -size
        odd = torch.randn(size // power, size // power, generator=generator)
        self._factors = [torch.linalg.qr(odd.double()).Q]
        while power > 1:
            order = min(power, LARGEST)
            self._factors.append(_hadamard(order))
            power //= order
        self._signs = self._signs.to(device)
        self._factors = [factor.to(device) for factor in self._factors]

    def __call__(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """float32 x diag(scale) Q. x: floating (..., size); scale: (size,), by default ones."""
        rows = x.reshape(-1, len(self._signs))
        signs = self._signs if scale is None else self._signs * scale.to(self._signs)
        product = torch.empty(rows.shape, dtype=torch.float32)
        for part, place in zip(rows.split(ROWS), product.split(ROWS), strict=True):
            place.copy_(self._product(part.to(signs) * signs))
        return product.view(x.shape)

    def _product(self, x: Tensor) -> Tensor:
        """x (rows, size), float64, signs included, times the Kronecker product."""
        count, size = x.shape
        for factor in self._factors:
            # The last of the axes that x stands for is multiplied and becomes the first.
            x = (x.view(count, -1, len(factor)) @ factor).transpose(1, 2).reshape(count, size)
        return x


def _hadamard(order: int) -> Tensor:
    """Sylvester's orthogonal matrix of a power of two, symmetric, float64."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < order:
        matrix = torch.kron(matrix, torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double())
    return matrix / order**0.5


def rotated(model: BlockwiseModel) -> BlockwiseModel:
    """The same model with rotated hidden states; weights are computed when they are read.

    A head that is the embedding becomes a tensor of its own, because the last norm's weight goes
    into it. Raises SettingError for an architecture whose hidden states cannot be rotated.
    """
    source = model.source
    spec, tensors = source.spec, source.tensors
    _check(model)
    rotation = Rotation(source.config.hidden_size, model.device)
    changes: dict[str, Entry | None] = {}

    def change(name: str, compute: Callable[[], Tensor]) -> None:
        changes[name] = Entry(compute, tensors.shape(name), torch.float32)

    embedding, head = f"{spec.embed[0]}.weight", f"{spec.head}.weight"
    change(embedding, partial(_read_by, rotation, tensors, embedding, None))
    stored = embedding if source.config.tie_word_embeddings else head
    last = f"{spec.norm}.weight"
    changes[head] = Entry(
        partial(_read_by, rotation, tensors, stored, last), tensors.shape(stored), torch.float32
    )
    change(last, partial(_ones, tensors, last))
    for index in range(model.block_count):
        block = spec.block(index)
        for branch in spec.branches:
            norm = f"{block}.{branch.norm}.weight"
            change(norm, partial(_ones, tensors, norm))
            for name in (f"{block}.{layer}.weight" for layer in branch.inputs):
                change(name, partial(_read_by, rotation, tensors, name, norm))
            for part in ("weight", "bias"):
                name = f"{block}.{branch.output}.{part}"
                if name in tensors:
                    change(name, partial(_written_by, rotation, tensors, name))
    config = copy.deepcopy(source.config)
    config.tie_word_embeddings = False
    source = replace(source, config=config, tensors=tensors.changed(changes))
    return BlockwiseModel.from_source(source, model.device, model.dtype)


def _read_by(rotation: Rotation, tensors: LazyTensors, name: str, norm: str | None) -> Tensor:
    """The weight (out, hidden) of what reads the hidden states behind a norm: W diag(norm) Q.

    Also an embedding's, whose rows are hidden states.
    """
    return rotation(tensors[name], None if norm is None else tensors[norm])


def _written_by(rotation: Rotation, tensors: LazyTensors, name: str) -> Tensor:
    """The weight (hidden, in) or bias (hidden,) of what is added to the hidden states: Q^T W."""
    tensor = tensors[name]
    return rotation(tensor.T).T.contiguous() if tensor.dim() > 1 else rotation(tensor)


def _ones(tensors: LazyTensors, name: str) -> Tensor:
    return torch.ones(tensors.shape(name))


def _check(model: BlockwiseModel) -> None:
    """Raise SettingError unless all that is done to hidden states is the same in any basis."""
    spec = model.spec
    norms = [model.module.get_submodule(spec.norm)]
    plain = len(spec.embed) == 1
    for branch in spec.branches:
        plain = plain and branch.norm is not None and branch.post_norm is None
        if branch.norm is not None:
            norms.append(model.module.get_submodule(f"{spec.block(0)}.{branch.norm}"))
    head = model.module.get_submodule(spec.head)
    if not plain or getattr(head, "bias", None) is not None or not all(map(_rotates, norms)):
        raise SettingError(
            "rotate",
            True,
            f"is not possible: the hidden states of '{spec.model_type}' models cannot be rotated; "
            "leave it out",
        )


@torch.no_grad()
def _rotates(norm: nn.Module) -> bool:
    """Whether a norm is x / rms(x) times its weight: it is tried."""
    weights = dict(norm.named_parameters())
    if list(weights) != ["weight"]:
        return False
    size = len(weights["weight"])
    tried = copy.deepcopy(norm).to_empty(device="cpu").float()
    weight = dict(tried.named_parameters())["weight"]
    x = torch.randn(3, size, generator=torch.Generator().manual_seed(SEED))
    weight.fill_(1.0)
    plain, turned = tried(x), tried(Rotation(size)(x))
    weight.copy_(torch.arange(size) / size)
    same = torch.allclose(Rotation(size)(plain), turned, atol=1e-4)
    return same and torch.allclose(plain * weight, tried(x), atol=1e-5)
