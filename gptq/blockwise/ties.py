"""Whether the output head shares the embedding's weight, as transformers decides it.

A configuration can say that both are one tensor while the file has two, and a file can have the one
tensor under either name.
"""

import copy

import torch
from transformers import PretrainedConfig

from gptq.files.lazy import LazyTensors
from gptq.models import ModelSpec


def resolve_ties(
    config: PretrainedConfig, spec: ModelSpec, tensors: LazyTensors
) -> tuple[PretrainedConfig, LazyTensors]:
    """The configuration and the tensors in agreement about the head; new ones where they differ.

    - Only the head is stored: its tensors become the embedding's.
    - Both are stored and equal: the head's is left out.
    - Both are stored and differ, or one of them is packed: the configuration's
      `tie_word_embeddings` becomes False.
    Reads both weights if both are stored.
    """
    embedding, head = f"{spec.embed[0]}.", f"{spec.head}."
    names = [name for name in tensors if name.startswith(head)]
    if not config.tie_word_embeddings or not names:
        return config, tensors
    if not any(name.startswith(embedding) for name in tensors):

        def rename(name: str) -> str:
            return embedding + name.removeprefix(head) if name.startswith(head) else name

        return config, tensors.renamed(rename)
    both = [f"{prefix}weight" for prefix in (embedding, head)]
    if all(name in tensors for name in both) and torch.equal(*(tensors[name] for name in both)):
        return config, tensors.changed(dict.fromkeys(names))
    config = copy.deepcopy(config)
    config.tie_word_embeddings = False
    return config, tensors
