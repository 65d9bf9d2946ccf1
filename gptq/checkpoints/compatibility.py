"""Which other programs load a quantized folder, and which flags would let more of them."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from gptq.checkpoints.reading import open_checkpoint
from gptq.checkpoints.settings import folder_settings


@dataclass(frozen=True)
class Written:
    """The properties of a folder that decide who loads it."""

    bits: int
    group_size: int
    sym: bool
    layout: str
    """ "gptq" or "gptq_v2"."""
    sizes: frozenset[tuple[int, int]]
    """(in, out) of its packed layers."""
    embeddings: bool = False
    """Whether the embedding and the head are packed too."""

    @property
    def short_groups(self) -> bool:
        """Whether some layer's last group is shorter than the others."""
        return self.group_size > 0 and any(size % self.group_size for size, _ in self.sizes)


def _gptqmodel(folder: Written) -> Iterator[str]:
    if folder.layout == "gptq" and not folder.sym:
        yield "--format gptq_v2"
    if folder.group_size not in (-1, 16, 32, 64, 128, 256, 512, 1024):
        yield "--groupsize 128"


def _autogptq(folder: Written) -> Iterator[str]:
    if folder.layout != "gptq":
        yield "--format gptq"


def _vllm(folder: Written) -> Iterator[str]:
    if folder.bits not in (4, 8):
        yield "--wbits 4"
    if not folder.sym:
        yield "--sym"
    elif folder.layout != "gptq":
        yield "--format gptq"
    if folder.short_groups or folder.group_size not in (-1, 32, 64, 128):
        yield _whole_groups(folder, (128, 64, 32))


def _sglang(folder: Written) -> Iterator[str]:
    if folder.short_groups:
        yield _whole_groups(folder, (128, 64, 32, 16))


def _exllamav2(folder: Written) -> Iterator[str]:
    if folder.bits != 4:
        yield "--wbits 4"
    if folder.layout != "gptq":
        yield "--format gptq"
    if folder.short_groups:
        yield _whole_groups(folder, (128, 64, 32))


def _whole_groups(folder: Written, sizes: tuple[int, ...]) -> str:
    fitting = [n for n in sizes if all(inputs % n == 0 for inputs, _ in folder.sizes)]
    return f"--groupsize {fitting[0] if fitting else -1}"


# docs/format.md says what each program reads; a test holds the two together.
READERS: dict[str, Callable[[Written], Iterator[str]]] = {
    "GPTQModel": _gptqmodel,
    "AutoGPTQ": _autogptq,
    "vLLM": _vllm,
    "SGLang": _sglang,
    "exllamav2": _exllamav2,
}
OURS = ("this package", "transformers with gptq.hf.register()")


def facts(path: Path) -> Written:
    """Of a folder in format gptq or gptq_v2, by its settings and the headers of its files."""
    tensors, settings = open_checkpoint(path)
    meta = settings.get("meta")
    embeddings = isinstance(meta, dict) and meta.get("embedding_bits", 16) != 16
    names = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    bits, group_size = cast(int, settings["bits"]), cast(int, settings["group_size"])
    sizes = {
        (packed_words * 32 // bits, outputs)
        for packed_words, outputs in (tensors.shape(f"{name}.qweight") for name in names)
    }
    sym, layout = settings["sym"] is True, str(settings["format"])
    return Written(bits, group_size, sym, layout, frozenset(sizes), embeddings)


def lines(folder: Written) -> list[str]:
    """Which programs load it, and which flags the others need: a line for each answer."""
    if folder.embeddings:
        return [
            f"format {folder.layout}: loads in {', '.join(OURS)}",
            f"for {', '.join(READERS)}: leave out --quantize-embeddings",
        ]
    needed: dict[str, list[str]] = defaultdict(list)
    loads_in = list(OURS)
    for reader, check in READERS.items():
        flags = " ".join(dict.fromkeys(check(folder)))
        if flags:
            needed[flags].append(reader)
        else:
            loads_in.append(reader)
    return [
        f"format {folder.layout}: loads in {', '.join(loads_in)}",
        *(f"for {', '.join(readers)}: quantize with {flags}" for flags, readers in needed.items()),
    ]


def folder_lines(folder: Path) -> list[str]:
    """`lines` of a written folder; none for a full model and other formats than GPTQ's."""
    is_gptq = folder_settings(folder).get("quant_method") == "gptq"
    return lines(facts(folder)) if is_gptq else []
