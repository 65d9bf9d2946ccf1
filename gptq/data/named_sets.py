"""Data sets on the Hugging Face hub that have a name, split as GPTQ-for-LLaMa splits them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from gptq.data.local_files import FILE_KINDS, MISSING_PACKAGES
from gptq.errors import UserError


@dataclass(frozen=True)
class HubDataset:
    """Where a data set is on the Hugging Face hub, and its column of text."""

    repo: str
    column: str
    config: str | None = None
    revision: str | None = None
    files: Mapping[str, str] | None = None
    """One file for each split, if not all of them are to be fetched."""


@dataclass(frozen=True)
class Split:
    """A split of a data set and how it becomes windows."""

    dataset: HubDataset
    name: str
    separator: str | None = None
    """Joins all documents into one text; None takes each window from a document of its own."""
    documents: int | None = None
    """Joined documents, from the first; None for all."""
    windows: int | None = None
    """At most so many in an evaluation."""


class NamedSet(NamedTuple):
    """The splits that a name means."""

    calibration: Split
    evaluation: Split


_WIKITEXT2 = HubDataset("Salesforce/wikitext", "text", config="wikitext-2-raw-v1")
_C4 = HubDataset(
    "allenai/c4",
    "text",
    files={
        "train": "en/c4-train.00000-of-01024.json.gz",
        "validation": "en/c4-validation.00000-of-00008.json.gz",
    },
)
# The set itself is a script, which `datasets` no longer runs; the hub keeps a Parquet copy of it.
_PTB = HubDataset(
    "ptb-text-only/ptb_text_only",
    "sentence",
    revision="refs/convert/parquet",
    files={
        split: f"penn_treebank/{split}/0000.parquet" for split in ("train", "validation", "test")
    },
)

NAMED_SETS = {
    "c4": NamedSet(Split(_C4, "train"), Split(_C4, "validation", windows=256)),
    "wikitext2": NamedSet(Split(_WIKITEXT2, "train", "\n\n"), Split(_WIKITEXT2, "test", "\n\n")),
    "ptb": NamedSet(Split(_PTB, "train", "\n\n"), Split(_PTB, "validation", "\n\n")),
    "c4-new": NamedSet(
        Split(_C4, "train"), Split(_C4, "validation", " ", documents=1100, windows=256)
    ),
    "ptb-new": NamedSet(Split(_PTB, "train", " "), Split(_PTB, "test", " ")),
}


def load_split(split: Split, name: str | Path) -> Any:
    """A split as a `datasets.Dataset`.

    name: of the data set, for error messages.
    Raises UserError without the package `datasets`, and for a hub that cannot be reached.
    """
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"{name}: {MISSING_PACKAGES}, or pass the path of a local text file"
        ) from error
    hub = split.dataset
    try:
        return datasets.load_dataset(
            hub.repo,
            name=hub.config,
            data_files=hub.files and {split.name: hub.files[split.name]},
            split=split.name,
            revision=hub.revision,
        )
    # httpx, huggingface_hub, datasets and the file system each have their own errors for a hub
    # that is offline, refuses or has changed; the user can do the same about all of them.
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"{name}: cannot get {hub.repo} from the Hugging Face hub "
            f"({type(error).__name__}: {reason}); "
            f"pass the path of a local {FILE_KINDS} file instead"
        ) from error


def joined_text(split: Split, name: str | Path) -> str:
    """The documents of a split with a separator, as one text; errors as `load_split`."""
    documents = load_split(split, name)[: split.documents]
    return str(split.separator).join(documents[split.dataset.column])
