"""One quantization as it was asked for: what is written where, on which text, in what size."""

from dataclasses import dataclass, replace
from pathlib import Path

from gptq import torchrun
from gptq.allocation.target import Target
from gptq.checkpoints.formats import FORMATS, folder_formats
from gptq.checkpoints.names import FILE_ENDINGS
from gptq.checkpoints.sizes import Output
from gptq.checkpoints.writing import is_ours
from gptq.config import QuantConfig, Widths
from gptq.errors import UserError
from gptq.files.atomic import check_apart, check_writable

DEFAULT_NSAMPLES = 128


@dataclass(frozen=True)
class Outputs:
    """Where a quantized model is written, and how. Raises UserError if it cannot be."""

    save: Path | None = None
    save_safetensors: Path | None = None
    save_dir: Path | None = None
    format: str | None = None
    quantize_embeddings: bool = False
    report: Path | None = None
    """A folder for a page about the run, which the command line writes afterwards."""

    def __post_init__(self) -> None:
        if not self.paths:
            raise UserError("nothing to write: give save=, save_safetensors= or save_dir=")
        if self.format not in (None, *folder_formats()):
            raise UserError(
                f"format {self.format!r} is not known; choose one of {', '.join(folder_formats())}"
            )
        for name, endings in FILE_ENDINGS.items():
            path = getattr(self, name)
            if path is not None and path.suffix not in endings:
                raise UserError(f"{path}: {name} needs a name that ends in {' or '.join(endings)}")
        if self.save_dir is not None and self.save_dir.suffix == ".gguf":
            raise UserError(f"{self.save_dir}: a folder cannot be read by that name; give another")
        # The other processes of a run write nothing, and may be on machines without these folders.
        for path in self.paths if torchrun.rank() == 0 else ():
            check_writable(path, folder=path is self.save_dir, ours=is_ours)

    @classmethod
    def of(
        cls,
        save: str | Path | None,
        save_safetensors: str | Path | None,
        save_dir: str | Path | None,
        format: str | None = None,
        quantize_embeddings: bool = False,
    ) -> "Outputs":
        """The record of paths that may be strings."""
        pt, safetensors, folder = (
            None if path is None else Path(path) for path in (save, save_safetensors, save_dir)
        )
        return cls(pt, safetensors, folder, format, quantize_embeddings)

    def check_apart(self, model: Path, dataset: str | Path | None) -> None:
        """Raise UserError if an output lies inside another one, or would replace an input."""
        outputs = [*self.paths, *([] if self.report is None else [self.report])]
        inputs = [model, *([] if dataset is None else [Path(dataset)])]
        check_apart(outputs, inputs, self.save_dir)

    @property
    def pt(self) -> Path | None:
        """`save`, unless it is a .gguf file."""
        return None if self.gguf is not None else self.save

    @property
    def gguf(self) -> Path | None:
        """`save`, if it is a .gguf file."""
        return self.save if self.save is not None and self.save.suffix == ".gguf" else None

    @property
    def paths(self) -> tuple[Path, ...]:
        """In the order in which they are reported; the journal lies next to the first."""
        return tuple(filter(None, (self.save, self.save_safetensors, self.save_dir)))


@dataclass(frozen=True)
class Job:
    """One quantization, as `quantize` documents its parts."""

    config: QuantConfig
    outputs: Outputs
    dataset: str | Path | None
    nsamples: int = DEFAULT_NSAMPLES
    seqlen: int | None = None
    seed: int = 0
    resume: bool = False
    max_memory: str | None = None
    widths: Widths | None = None
    target: Target | None = None
    """Widths are chosen so that the outputs fit this."""

    def __post_init__(self) -> None:
        if not isinstance(self.config, QuantConfig):
            raise UserError(f"config {self.config!r}: give a QuantConfig")
        if not isinstance(self.dataset, str | Path | None):
            raise UserError(f"dataset {self.dataset!r:.50}: give a name or a path")
        if type(self.seed) is not int:
            raise UserError(f"seed {self.seed!r}: give a whole number")
        for name, least in (("nsamples", 1), ("seqlen", 2)):
            value = getattr(self, name)
            if value is not None and not (type(value) is int and value >= least):
                raise UserError(f"{name} {value!r}: give a whole number from {least} on")

    def with_embedding_bits(self, bits: int) -> "Job":
        """The same job with so many bits for the embedding and the head, where they are packed."""
        return replace(self, config=replace(self.config, embedding_bits=bits))

    @property
    def possible_outputs(self) -> dict[int, list[Output]]:
        """What is written, by the bits of the embedding and the head that it may have."""
        chosen = () if self.target is None else self.target.embedding_bits
        return {
            bits: self.with_embedding_bits(bits).written
            for bits in chosen or (self.config.embedding_bits,)
        }

    @property
    def folder_bits(self) -> int:
        """Bits of the embedding and the head in a folder."""
        name = self.outputs.format
        packs = self.outputs.quantize_embeddings or (
            name in FORMATS and FORMATS[name].packs_embeddings
        )
        return self.config.embedding_bits if packs else 16

    @property
    def written(self) -> list[Output]:
        """What is written, each with its format; a folder's may turn out to be another one."""
        outputs, bits = self.outputs, self.config.embedding_bits
        written = [Output("gptq", bits)] if outputs.pt or outputs.save_safetensors else []
        if outputs.gguf is not None:
            written.append(Output("gguf", bits))
        if outputs.save_dir is not None:
            usual = "gptq" if self.config.sym else "compressed-tensors"
            written.append(Output(outputs.format or usual, self.folder_bits))
        return written
