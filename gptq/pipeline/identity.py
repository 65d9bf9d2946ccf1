"""What decides the blocks of a run, as a journal remembers it."""

import hashlib
import json
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from gptq import __version__
from gptq.blockwise.model import BlockwiseModel
from gptq.blockwise.source import ModelSource
from gptq.config import QuantConfig, Widths
from gptq.errors import UserError
from gptq.pipeline.widths import unlike
from quant_cuda.cpu import library
from quant_cuda.cuda import kernels

# Settings of QuantConfig that no block depends on.
WRITTEN_LATER = ("embedding_bits",)


def fingerprint(source: ModelSource) -> str:
    """A short hash that tells models apart: configuration, embeddings, the first and last block.

    The journal has a hash of each other block, see `digest`.
    """
    result = hashlib.sha256(source.config.to_json_string().encode())
    last = source.config.num_hidden_layers - 1
    parts = (*source.spec.embed, *(source.spec.block(index) for index in {0, last}))
    prefixes = tuple(f"{part}." for part in parts)
    for name in sorted(source.tensors):
        if name.startswith(prefixes):
            result.update(name.encode())
            result.update(source.tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return result.hexdigest()[:16]


def digest(block: nn.Module) -> str:
    """A short hash of a block's weights: of their names, types and bytes."""
    result = hashlib.sha256()
    for name, weight in block.named_parameters():
        result.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        data = weight.detach().cpu().contiguous().view(-1).view(torch.uint8)
        result.update(data.numpy().data)
    return result.hexdigest()[:16]


def identity(
    model: BlockwiseModel, config: QuantConfig, widths: Widths | None = None, **others: object
) -> dict[str, object]:
    """Everything that decides the blocks of a run.

    widths: of layers that do not have the bits and group size of `config`.
    What the outputs are, their format and the bits of the embedding come later: finished blocks
    can be written in any number of ways.
    """
    settings = {key: it for key, it in config.to_dict().items() if key not in WRITTEN_LATER}
    exceptions = unlike(config, widths)
    parts = {
        **settings,
        **({"widths": exceptions} if exceptions else {}),
        "version": __version__,
        "model": fingerprint(model.source),
        "dtype": model.dtype,
        "device": model.device.type,
        "solver": _solver(model.device),
        **others,
    }
    return json.loads(json.dumps(parts, default=str))


def agreed(identities: Sequence[Mapping[str, object]]) -> dict[str, object]:
    """The identity of a run that several processes share, from each one's own.

    They may sweep with different code: each solves outputs of its own.
    Raises UserError if they differ in anything else.
    """
    solvers = sorted({str(one["solver"]) for one in identities})
    merged = {**identities[0], "solver": "+".join(solvers)}
    for rank, one in enumerate(identities):
        changed = [key for key in merged if key != "solver" and one.get(key) != merged[key]]
        if changed:
            raise UserError(
                f"process {rank} differs from the first in {', '.join(changed)}; give all the "
                "same MODEL, DATASET, flags and version"
            )
    return merged


def _solver(device: torch.device) -> str:
    """Which code sweeps and refines: each rounds ties in its own way."""
    if device.type == "cuda":
        return "cuda" if kernels.available() else "torch"
    return (*library.instruction_sets(), "torch")[0]
