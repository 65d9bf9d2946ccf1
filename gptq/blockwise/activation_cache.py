"""Activations between two uses of them: in memory, in the machine's memory if a GPU's is short, or
in files."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from gptq.files.atomic import unwritable
from gptq.files.spans import read_span

Batch = tuple[Tensor, ...]


class ActivationCache:
    """Batches of activations; a batch is a few tensors that are stored and read together.

    folder: each batch is one file in it; None keeps batches in memory. Files are read and written,
        not mapped, because mapped pages count as the process's own memory. They are not synced,
        because no run outlives its own activations.
    host: whether a GPU's activations are kept in the machine's memory. That memory is pinned, so
        that copies run at full speed and in the order of the GPU's other work.
    """

    def __init__(self, folder: Path | None = None, host: bool = False) -> None:
        self.folder = folder
        self.host = host
        self._batches: list[Batch] = []
        """The tensors; if they are in files, meta tensors of the same shapes and dtypes."""
        self._devices: list[torch.device] = []

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        return (self.get(index) for index in range(len(self)))

    def sizes(self) -> list[int]:
        """Windows in each batch."""
        return [len(batch[0]) for batch in self._batches]

    def put(self, index: int, batch: Batch) -> None:
        """Store a batch at `index`, or append it. Raises UserError if the disk is full."""
        stored = batch
        if self.folder is not None:
            _write(self.folder / str(index), batch)
            stored = tuple(torch.empty_like(tensor, device="meta") for tensor in batch)
        elif self.host:
            stored = tuple(_on_host(tensor) for tensor in batch)
        if index == len(self):
            self._batches.append(stored)
            self._devices.append(batch[0].device)
        self._batches[index] = stored

    def get(self, index: int) -> Batch:
        """The batch at `index`, on the device that it was stored from."""
        stored = self._batches[index]
        if self.folder is None:
            device = self._devices[index]
            return tuple(tensor.to(device, non_blocking=True) for tensor in stored)
        start, batch = 0, []
        for like in stored:
            tensor = read_span(self.folder / str(index), start, like.dtype, like.shape)
            batch.append(tensor.to(self._devices[index]))
            start += like.nbytes
        return tuple(batch)

    def empty_like(self, name: str) -> "ActivationCache":
        """An empty cache of the same kind; `name` is its folder's, if it is in files."""
        return ActivationCache(
            None if self.folder is None else self.folder.with_name(name), self.host
        )


def _on_host(tensor: Tensor) -> Tensor:
    """A copy in pinned memory, which the device makes in the order of its work.

    Only the same device may read it: the host does not wait for the copy."""
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return copy.copy_(tensor, non_blocking=True)


def _write(path: Path, batch: Batch) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            for tensor in batch:
                data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                file.write(data.numpy())  # type: ignore[arg-type]
    except OSError as error:
        raise unwritable(path, error) from error
