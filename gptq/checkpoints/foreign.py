"""Checkpoints in other formats than GPTQ's own, read as GPTQ's.

A format that is read has a row in READERS: a module with `recognizes` and `as_gptq`.
"""

from collections.abc import Mapping
from pathlib import Path

from gptq.checkpoints import awq, compressed_tensors, mlx
from gptq.checkpoints.settings import META_KEY, parse
from gptq.files.lazy import LazyTensors

READERS = (compressed_tensors, awq, mlx)


def as_gptq(
    path: Path, tensors: LazyTensors, settings: Mapping[str, object]
) -> tuple[LazyTensors, dict[str, object]]:
    """The tensors and settings of "gptq_v2"; those of GPTQ's own formats as they are.

    path: named in messages. Raises UserError for a file of another format that is damaged or of a
    kind that cannot be read.
    """
    for reader in READERS:
        if reader.recognizes(tensors, settings):
            translated, declared = reader.as_gptq(path, tensors, settings)
            if META_KEY in tensors.metadata:
                declared["meta"] = parse(path, tensors.metadata[META_KEY])
            return translated, declared
    return tensors, dict(settings)
