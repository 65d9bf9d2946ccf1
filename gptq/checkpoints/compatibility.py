"""Which other programs load a quantized folder, and which flags would let more of them.

As of November 2026: vLLM 0.33, SGLang 0.5.23, GPTQModel 7.7, exllamav2 0.3.2, transformers 5.24,
mlx-lm 0.32; docs/format.md says what each reads, and a test holds the two together.
"""

import shlex
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import cast

from gptq.blockwise.weight_files import read_json
from gptq.checkpoints.layouts import stored_bits
from gptq.checkpoints.reading import open_checkpoint
from gptq.checkpoints.settings import folder_settings
from gptq.checkpoints.translation import fitting_group
from gptq.checkpoints.widths import declared_group_sizes
from gptq.models import SPECS


@dataclass(frozen=True)
class Written:
    """The properties of a folder that decide who loads it."""

    bits: int
    group_size: int
    sym: bool
    format: str
    """A key of `formats.FORMATS`."""
    sizes: frozenset[tuple[int, int]]
    """(in, out) of its packed layers."""
    embeddings: bool = False
    """Whether the embedding and the head are packed too."""
    desc_act: bool = False
    """Whether groups are not runs of neighbouring inputs."""
    model_type: str = "llama"
    others: frozenset[tuple[int, int, frozenset[tuple[int, int]]]] = frozenset()
    """Bits, group size and (in, out) of the layers of each width that is not the most common."""
    mixed: bool = False
    """Whether it is a part of a folder of several widths."""

    @property
    def parts(self) -> tuple["Written", ...]:
        """A record for each width, as if a folder had no other."""
        most = replace(self, others=frozenset(), mixed=bool(self.others))
        others = sorted(self.others, key=lambda other: other[:2])
        return most, *(replace(most, bits=b, group_size=g, sizes=s) for b, g, s in others)

    @property
    def short_groups(self) -> bool:
        """Whether some layer's last group is shorter than the others."""
        return self.group_size > 0 and any(size % self.group_size for size, _ in self.sizes)


Needs = Callable[[Written], Iterator[str]]
"""Flags without which a program does not load a folder of some format; none if it does."""


def _four_bits(folder: Written) -> Iterator[str]:
    if folder.bits != 4:
        yield "--wbits 4"


def _gptqmodel(folder: Written) -> Iterator[str]:
    if folder.format == "gptq" and not folder.sym:
        yield "--sym"
    if folder.group_size not in (-1, 16, 32, 64, 128, 256, 512, 1024):
        yield "--groupsize 128"


def _marlin(folder: Written) -> Iterator[str]:
    """vLLM's and SGLang's kernels for the format gptq."""
    if folder.bits not in (4, 8):
        yield "--wbits 4"
    if not folder.sym:
        yield "--sym"
    yield from _server_groups(folder)


def _server_groups(folder: Written) -> Iterator[str]:
    yield from _plain_groups(folder)
    if not folder.short_groups and folder.group_size not in (-1, 32, 64, 128):
        yield _whole_groups(folder)


def _plain_groups(folder: Written) -> Iterator[str]:
    """What formats without g_idx hold: whole groups of neighbouring inputs."""
    if folder.desc_act:
        yield "--order gar"
    if folder.short_groups:
        yield _whole_groups(folder)


def _sglang_compressed(folder: Written) -> Iterator[str]:
    yield from _four_bits(folder)
    yield from _server_groups(folder)


def _awq(folder: Written) -> Iterator[str]:
    # All layers of that format have one width: the flag makes a model of one.
    if folder.bits != 4 or folder.mixed:
        yield "--wbits 4"
    yield from _plain_groups(folder)


def _transformers(folder: Written) -> Iterator[str]:
    # It dequantizes zero points, all with the bits and groups of one layer.
    if folder.mixed and not folder.sym:
        yield "--sym"
    yield from _plain_groups(folder)


def _mlx(folder: Written) -> Iterator[str]:
    yield from _plain_groups(folder)
    if not folder.short_groups and folder.group_size not in (32, 64, 128):
        yield _whole_groups(folder)


def _exllamav2(folder: Written) -> Iterator[str]:
    yield from _four_bits(folder)
    if folder.short_groups:
        yield _whole_groups(folder)


def _whole_groups(folder: Written) -> str:
    return f"--groupsize {min(fitting_group(inputs) for inputs, _ in folder.sizes)}"


@dataclass(frozen=True)
class Reader:
    """A program, and what it needs of each format that it loads."""

    formats: Mapping[str, Needs]
    """Of those that need as few flags the first is proposed."""
    without: tuple[str, ...] = ()
    """Architectures of this package that it does not run."""
    packed_embeddings: tuple[str, ...] = ()
    """Formats in which it takes a packed embedding and head."""


READERS: dict[str, Reader] = {
    "vLLM": Reader(
        {
            "compressed-tensors": _server_groups,
            "awq": _awq,
            "gptq": _marlin,
            "gptq_v2": _marlin,
        },
        # Its BLOOM reorders the rows of query_key_value, but not those of packed weights (0.32).
        without=("bloom",),
    ),
    "SGLang": Reader(
        {"compressed-tensors": _sglang_compressed, "awq": _awq, "gptq": _marlin},
        without=("bloom",),
    ),
    "transformers with compressed-tensors": Reader({"compressed-tensors": _transformers}),
    "GPTQModel": Reader({"gptq_v2": _gptqmodel, "gptq": _gptqmodel, "awq": _awq}),
    "exllamav2": Reader({"gptq_v2": _exllamav2, "gptq": _exllamav2}, without=("bloom",)),
    "mlx-lm": Reader({"mlx": _mlx}, without=("bloom",), packed_embeddings=("mlx",)),
}
OURS = ("this package", "transformers with gptq.hf.register()")


def flags_for(reader: Reader, folder: Written) -> tuple[str, ...] | None:
    """The fewest that a quantization would need so that a program loads it, in whatever format;
    None if none help."""
    if folder.model_type in reader.without:
        return None
    choices = []
    for name, needs in reader.formats.items():
        change = [] if name == folder.format else [f"--format {name}"]
        own = [flag for part in folder.parts for flag in needs(replace(part, format=name))]
        choices.append(_without_repetition([*change, *own]))
    return min(choices, key=len)


def _without_repetition(flags: list[str]) -> tuple[str, ...]:
    """Each flag once. Of several group sizes the least: every layer has to take it."""
    sizes = [flag for flag in flags if flag.startswith("--groupsize ")]
    least = min(sizes, key=lambda flag: int(flag.split()[1]), default=None)
    return tuple(dict.fromkeys(flag for flag in flags if flag not in sizes or flag == least))


def loads(reader: Reader, folder: Written) -> bool:
    return flags_for(reader, folder) == () and not _embeddings_in_the_way(reader, folder)


def _embeddings_in_the_way(reader: Reader, folder: Written) -> bool:
    return folder.embeddings and folder.format not in reader.packed_embeddings


def facts(path: Path) -> Written:
    """Of a packed folder, by its settings and the headers of its files."""
    tensors, settings = open_checkpoint(path)
    declared = folder_settings(path)
    method = declared.get("quant_method", "mlx")
    format = str(settings["format"] if method == "gptq" else method)
    base = cast(int, settings["bits"]), cast(int, settings["group_size"])
    model_type = str(read_json(path / "config.json").get("model_type"))
    spec = SPECS[model_type]
    names = {name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")}
    ends = names & {spec.embed[0], spec.head}
    own = declared_group_sizes(settings, names - ends)
    sizes: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    for name, size in own.items():
        words, outputs = tensors.shape(f"{name}.qweight")
        bits = stored_bits(tensors, name)
        sizes[bits, size or base[1]].append((words * 32 // bits, outputs))
    base = max(sizes, key=lambda width: sum(map(prod, sizes[width])), default=base)
    most = frozenset(sizes.pop(base, ()))
    return Written(
        *base,
        settings["sym"] is True,
        format,
        most,
        embeddings=bool(ends),
        desc_act=settings.get("desc_act") is True,
        model_type=model_type,
        others=frozenset((*width, frozenset(it)) for width, it in sizes.items()),
    )


def lines(folder: Written) -> list[str]:
    """Which programs load it, and which flags the others need: a line for each answer."""
    needed: dict[str, list[str]] = defaultdict(list)
    loads_in = list(OURS)
    for name, reader in READERS.items():
        flags = flags_for(reader, folder)
        if flags is None:
            continue
        advice = [f"quantize with {' '.join(flags)}"] if flags else []
        if _embeddings_in_the_way(reader, folder):
            advice.append("leave out --quantize-embeddings")
        if advice:
            needed[", and ".join(advice)].append(name)
        else:
            loads_in.append(name)
    return [
        f"format {folder.format}: loads in {', '.join(loads_in)}",
        *(f"for {', '.join(readers)}: {advice}" for advice, readers in needed.items()),
    ]


def run_line(folder: Written, path: Path) -> str:
    """A command that runs the folder: of the first server that takes it, else of this package."""
    name = shlex.quote(str(path))
    if folder.format == "mlx":
        return f"run it with: mlx_lm.generate --model {name} --prompt '...'"
    if loads(READERS["vLLM"], folder):
        return f"run it with: vllm serve {name}"
    return f"run it with: gptq {name} --chat"


def output_lines(path: Path) -> list[str]:
    """What is printed of a written folder or .gguf file; nothing of other files."""
    if path.is_dir():
        return folder_lines(path)
    if path.suffix != ".gguf":
        return []
    return [
        "format gguf: loads in this package, llama.cpp and what is built on it",
        f"run it with: llama-cli -m {shlex.quote(str(path))}",
    ]


def folder_lines(path: Path) -> list[str]:
    """What is printed of a written folder; nothing of a full model."""
    if not folder_settings(path):
        return []
    folder = facts(path)
    return [*lines(folder), run_line(folder, path)]
