"""Activations between two uses of them: where they are computed, in the machine's memory where a
GPU's is short, or in files."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from gptq.files.atomic import unwritable
from gptq.files.opening import read_span

Batch = tuple[Tensor, ...]


class Shelf:
    """Batches, each some tensors that are put away and taken together.

    folder: where each batch gets a file; None keeps them in memory. Files are read and written,
        not mapped, since mapped pages count as the process's own. They are not synced: no run
        outlives its own activations.
    host: whether a GPU's are kept in the machine's memory, locked there so that they travel at full
        speed and in the order of the GPU's other work.
    """

    def __init__(self, folder: Path | None = None, host: bool = False) -> None:
        self.folder = folder
        self.host = host
        self._held: list[Batch] = []
        """The tensors, or where they are in files tensors of the same kind without memory."""
        self._devices: list[torch.device] = []

    def __len__(self) -> int:
        return len(self._held)

    def __iter__(self) -> Iterator[Batch]:
        return (self.get(index) for index in range(len(self)))

    def sizes(self) -> list[int]:
        """Windows in each batch."""
        return [len(batch[0]) for batch in self._held]

    def put(self, index: int, batch: Batch) -> None:
        """Put a batch in place `index`, or behind the last. Raises UserError for a full disk."""
        held = batch
        if self.folder is not None:
            _write(self.folder / str(index), batch)
            held = tuple(torch.empty_like(tensor, device="meta") for tensor in batch)
        elif self.host:
            held = tuple(_on_host(tensor) for tensor in batch)
        if index == len(self):
            self._held.append(held)
            self._devices.append(batch[0].device)
        self._held[index] = held

    def get(self, index: int) -> Batch:
        held = self._held[index]
        if self.folder is None:
            device = self._devices[index]
            return tuple(tensor.to(device, non_blocking=True) for tensor in held)
        start, batch = 0, []
        for like in held:
            tensor = read_span(self.folder / str(index), start, like.dtype, like.shape)
            batch.append(tensor.to(self._devices[index]))
            start += like.nbytes
        return tuple(batch)

    def beside(self, name: str) -> "Shelf":
        """An empty shelf of the same kind."""
        return Shelf(None if self.folder is None else self.folder.with_name(name), self.host)


def _on_host(tensor: Tensor) -> Tensor:
    """A copy that the device makes when its turn comes; read it on that device alone."""
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
