"""lm-evaluation-harness on passages: a task of its own, from a local file."""

import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.tasks.passages import Passage
from gptq.errors import UserError

REQUIREMENT = "lm_eval>=0.4.9"
TASK = "last_word"
# JSON is YAML too. The harness puts nothing between context and target of a loglikelihood.
SETTINGS = {
    "task": TASK,
    "dataset_path": "json",
    "test_split": "train",
    "output_type": "loglikelihood",
    "doc_to_text": "{{context}}",
    "doc_to_target": "{{' ' + word}}",
    "metric_list": [{"metric": "acc"}, {"metric": "perplexity"}],
}


@dataclass(frozen=True)
class Score:
    """How a model finds the last words."""

    accuracy: float
    """The share of passages whose word is the model's first choice, token by token."""
    standard_error: float
    """Of the accuracy, from the choice of passages."""
    perplexity: float
    """exp of the mean of -ln P(word)."""


def check_installed() -> str:
    """The version of lm_eval. Raises UserError without it."""
    if find_spec("lm_eval") is None:
        raise UserError(f"benchmarks.tasks needs lm_eval: pip install '{REQUIREMENT}' first")
    return version("lm_eval")


def last_words(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, passages: Sequence[Passage]
) -> Score:
    """What lm_eval finds. Raises UserError without it."""
    check_installed()
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    with tempfile.TemporaryDirectory(prefix="tasks-") as name:
        folder = Path(name)
        data = folder / "passages.jsonl"
        data.write_text("".join(json.dumps(asdict(it)) + "\n" for it in passages))
        local = {"data_files": str(data), "cache_dir": str(folder / "cache")}
        settings = {**SETTINGS, "dataset_kwargs": local}
        (folder / f"{TASK}.yaml").write_text(json.dumps(settings))
        found = lm_eval.simple_evaluate(
            HFLM(pretrained=model, tokenizer=tokenizer),
            tasks=[TASK],
            task_manager=TaskManager(include_path=str(folder), include_defaults=False),
            bootstrap_iters=0,
        )
    scores = found["results"][TASK]
    accuracy = float(scores["acc,none"])
    error = math.sqrt(accuracy * (1 - accuracy) / max(1, len(passages) - 1))
    return Score(accuracy, error, float(scores["perplexity,none"]))
