"""Tensors by name, each read when it is asked for."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from math import prod
from typing import Any, NamedTuple

import torch

from gptq.errors import UserError
from gptq.files.spans import prefetch_span, read_span

Read = Callable[[], torch.Tensor]
Shape = tuple[int, ...]


class Entry(NamedTuple):
    """A tensor that is read or computed when asked for."""

    read: Read
    shape: Shape
    """What the tensor that `read` returns has; known without reading."""
    dtype: torch.dtype


Entries = dict[str, Entry]


class LazyTensors(Mapping[str, torch.Tensor]):
    """Tensors by name, each read from disk when it is asked for. The caller owns what it gets.

    `metadata` is what the files say about themselves: a safetensors header's strings, or the
    `_metadata` that torch.save keeps with a state dict.
    """

    def __init__(
        self, entries: Mapping[str, Entry] | None = None, metadata: Mapping[str, Any] | None = None
    ) -> None:
        self._entries = dict(entries or {})
        self.metadata: dict[str, Any] = dict(metadata or {})

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._entries[name].read()

    def __contains__(self, name: object) -> bool:
        # Mapping's own would read the tensor.
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def entry(self, name: str) -> Entry:
        """A tensor, still unread."""
        return self._entries[name]

    def shape(self, name: str) -> Shape:
        """The shape of a tensor, which is not read."""
        return self._entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """The type of a tensor, which is not read."""
        return self._entries[name].dtype

    def nbytes(self, name: str) -> int:
        """The size of a tensor in bytes; it is not read."""
        return prod(self.shape(name)) * self.dtype(name).itemsize

    def prefetch(self, prefix: str) -> None:
        """Ask the system to read tensors with this prefix into its page cache.

        Only for tensors that are plain bytes of a file, which `read_span` reads.
        """
        for name, entry in self._entries.items():
            read = entry.read
            if name.startswith(prefix) and isinstance(read, partial) and read.func is read_span:
                prefetch_span(*read.args)

    def changed(self, changes: Mapping[str, Entry | None]) -> "LazyTensors":
        """The same tensors with some replaced or added, and those that are None left out."""
        entries = {**self._entries, **changes}
        kept = {name: entry for name, entry in entries.items() if entry is not None}
        return LazyTensors(kept, self.metadata)

    def renamed(self, rename: Callable[[str], str | None]) -> "LazyTensors":
        """The same tensors by other names; a name that becomes None is left out.

        Raises UserError if two tensors get the same name.
        """
        entries: Entries = {}
        for old, entry in self._entries.items():
            new = rename(old)
            if new is None:
                continue
            if new in entries:
                raise UserError(f"two tensors become '{new}' once old names are brought up to date")
            entries[new] = entry
        return LazyTensors(entries, self.metadata)


def as_lazy(tensors: Mapping[str, torch.Tensor]) -> LazyTensors:
    """Tensors in memory as LazyTensors, which share their memory; LazyTensors as they are."""
    if isinstance(tensors, LazyTensors):
        return tensors
    return LazyTensors(
        {
            name: Entry(partial(tensors.__getitem__, name), tuple(tensor.shape), tensor.dtype)
            for name, tensor in tensors.items()
        }
    )
