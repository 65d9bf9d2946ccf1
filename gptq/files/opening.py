"""Tensor files of any kind, told by their first bytes and not by their names.

Nothing is unpickled beyond what torch's weights-only reader allows.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gptq.errors import UserError
from gptq.files.lazy import Entries, LazyTensors
from gptq.files.safetensors_file import open_safetensors
from gptq.files.spans import open_binary
from gptq.files.torch_file import open_torch


def open_tensors(paths: Sequence[Path]) -> LazyTensors:
    """The tensors of one or several files; only the files' headers are read now.

    Raises UserError for a file that is missing, empty, cut short, of an unknown kind or with code
    in it, and for a name that two files share.
    """
    entries: Entries = {}
    origin: dict[str, Path] = {}
    metadata: dict[str, Any] = {}
    for path in paths:
        opened = _open(Path(path))
        for name in opened:
            if name in origin:
                raise UserError(
                    f"tensor '{name}' is in both {origin[name]} and {path}: give the files of one "
                    "model only"
                )
            origin[name] = path
            entries[name] = opened.entry(name)
        metadata.update(opened.metadata)
    return LazyTensors(entries, metadata)


def _open(path: Path) -> LazyTensors:
    with open_binary(path) as file:
        head = file.read(32)
    if not head:
        raise UserError(f"{path} is empty: copy or download it again")
    if head.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is a Git LFS pointer, not the file itself: run 'git lfs pull'")
    # Eight bytes of length and a JSON object come first, since the length can begin with any byte.
    if head[8:9] == b"{":
        return open_safetensors(path)
    if head.startswith(b"PK"):
        return open_torch(path, zipped=True)
    if head[:1] == b"\x80":
        return open_torch(path, zipped=False)
    if path.suffix == ".safetensors":
        return open_safetensors(path)
    raise UserError(
        f"{path} is neither a safetensors nor a PyTorch file: it may be damaged, or encrypted as "
        "BELLE's published LLaMA files are, which BELLE's own tool must decrypt first"
    )
