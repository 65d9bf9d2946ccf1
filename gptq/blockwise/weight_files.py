"""The weight files of a model's folder: which they are, and their tensors."""

import os
import re
from collections.abc import Iterable
from pathlib import Path, PurePath
from typing import Any

from gptq.errors import UserError, first_line
from gptq.files.json_text import parse, read_text
from gptq.files.lazy import LazyTensors
from gptq.files.opening import open_tensors

# A single file, the index of several, several without an index; the first kind found is read.
FULL = (
    ("model.safetensors", "model.safetensors.index.json", "*.safetensors"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model*.bin"),
)
# The names that quantizers have given their files besides.
PACKED = (
    ("model.safetensors", "*.safetensors.index.json", "*.safetensors"),
    ("pytorch_model.bin", "*.bin.index.json", "*.bin"),
    ("model.pt", "*.pt.index.json", "*.pt"),
)
# Of tensors that only packed layers have, in the formats that can be read.
PACKED_ENDINGS = (".qweight", ".weight_packed", ".scales")


def open_full_weights(folder: Path) -> LazyTensors:
    """The tensors of a full model's folder. Raises UserError if files are absent or damaged.

    Files of packed layers are not the model if the folder has other weights: somebody wrote a
    quantized model beside the one that it was made from.
    """
    for kind in FULL:
        tensors = _open_kind(folder, kind)
        if tensors is not None and not is_packed(tensors):
            return tensors
        unpacked = [] if tensors is None else _parts(folder, kind[2])
        unpacked = [file for file in unpacked if not is_packed(open_tensors([file]))]
        if unpacked:
            _check_numbering(unpacked)
            return open_tensors(unpacked)
    return _open_weights(folder, FULL)


def is_packed(tensors: Iterable[str]) -> bool:
    """Whether these names are of a checkpoint with packed layers."""
    return any(name.endswith(PACKED_ENDINGS) for name in tensors)


def is_packed_file_of(folder: Path, file: Path) -> bool:
    """Whether `open_packed_weights(folder)` reads this file."""
    for single, index, parts in PACKED:
        if (folder / single).is_file():
            return file == folder / single
        if indices := sorted(folder.glob(index)):
            weight_map = read_json(indices[0]).get("weight_map")
            names = weight_map.values() if isinstance(weight_map, dict) else ()
            return file in {folder / name for name in names if isinstance(name, str)}
        if files := _parts(folder, parts):
            return file in files
    return False


def open_packed_weights(folder: Path) -> LazyTensors:
    """The tensors of a quantized checkpoint's folder, by the names they have in its files."""
    return _open_weights(folder, PACKED)


def _open_weights(folder: Path, kinds: tuple[tuple[str, str, str], ...]) -> LazyTensors:
    for kind in kinds:
        tensors = _open_kind(folder, kind)
        if tensors is not None:
            return tensors
    wanted = " or ".join(single for single, _, _ in kinds)
    original = any(folder.glob("consolidated*.pth"))
    hint = (
        "convert Meta's original files to Hugging Face's" if original else "copy the weights there"
    )
    raise UserError(f"no weights in {folder} ({wanted}, whole or in parts): {hint}")


def _open_kind(folder: Path, kind: tuple[str, str, str]) -> LazyTensors | None:
    """The tensors in files of one kind; None if there are none."""
    single, index, parts = kind
    if (folder / single).is_file():
        return open_tensors([folder / single])
    if indices := sorted(folder.glob(index)):
        return _open_indexed(indices[0])
    files = _parts(folder, parts)
    if not files:
        return None
    _check_numbering(files)
    return open_tensors(files)


def _parts(folder: Path, pattern: str) -> list[Path]:
    return sorted(file for file in folder.glob(pattern) if not file.name.startswith("adapter_"))


def _open_indexed(index: Path) -> LazyTensors:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise UserError(f"{index} has no usable 'weight_map': copy it again")
    files = [_file_of_index(index, name) for name in sorted(set(weight_map.values()))]
    tensors = open_tensors(files)
    for name, file_name in weight_map.items():
        if name not in tensors:
            raise UserError(
                f"tensor '{name}' is not in {index.parent / file_name}, where {index.name} says it "
                "is: copy or download that file again"
            )
    return tensors


def _file_of_index(index: Path, name: str) -> Path:
    """A weight file that an index names, in the index's folder or below it.

    It can be a symbolic link to anywhere, as in the hub's cache: whoever made the folder made the
    link, whereas an index is downloaded. Raises UserError for a name that leaves the folder, is
    not of the index's kind of file, or is missing.
    """
    relative, ending = PurePath(name), PurePath(index.name.removesuffix(".index.json")).suffix
    if relative.is_absolute() or ".." in relative.parts or relative.suffix != ending:
        raise UserError(
            f"{index} names '{name}', which is no {ending} file of its folder: copy the index again"
        )
    # os.path, since it returns False for a name that is too long; pathlib raises.
    if not os.path.isfile(index.parent / relative):
        raise UserError(
            f"{index.parent / relative}, which {index.name} names, is missing: copy or download it"
        )
    return index.parent / relative


def _check_numbering(files: list[Path]) -> None:
    """Refuse `x-00001-of-00003` without its fellows, where no index tells what there should be."""
    names = {file.name for file in files}
    for file in files:
        match = re.fullmatch(r"(.*-)(\d+)-of-(\d+)(\..*)", file.name)
        if match is None:
            continue
        stem, number, total, ending = match.groups()
        for wanted in range(1, min(int(total), 10_000) + 1):
            other = f"{stem}{wanted:0{len(number)}d}-of-{total}{ending}"
            if other not in names:
                raise UserError(f"{file.parent / other} is missing: copy or download it")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises UserError if it is none."""
    try:
        content = parse(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path} cannot be read as JSON ({first_line(error)}): copy it again"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object: copy it again")
    return content
