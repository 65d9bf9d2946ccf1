"""Scores by kind of task of a full model and its quantized files, on BELLE's form of evaluation.

    python -m benchmarks.model_compare TEST.json MODEL [--checkpoints FILE...] [--out PATH]
    python -m benchmarks.model_compare TEST.json MODEL --judge URL --judge-model NAME

TEST.json holds records of `question`, `class` and `std_answer`, as a JSON list or a line each.
Log-likelihoods of the reference answers need no writing and tell small differences; exact match,
ROUGE-L and chrF compare what the model writes; a judge is any OpenAI-compatible endpoint.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import gptq
from benchmarks import judge, scores
from gptq.data.chat import belle_prompt
from gptq.errors import UserError
from gptq.files.atomic import whole_file
from gptq.inference.generate import text

MEASURES = ("log-likelihood", "exact match", "ROUGE-L", "chrF", "judge")
# What begins the next question, if the model goes on with one itself.
END = ("\n\nHuman:", "\nHuman:")


@dataclass(frozen=True)
class Question:
    question: str
    kind: str
    """BELLE's `class`: extract, math, rewrite and so on."""
    answer: str


@dataclass(frozen=True)
class Scored:
    """One question as one model met it."""

    model: str
    kind: str
    written: str
    values: dict[str, float]
    """By measure."""


def read_questions(path: Path) -> list[Question]:
    """Records of a JSON list or of JSON lines. Raises UserError for what is neither."""
    try:
        text = path.read_text(encoding="utf-8")
        is_list = text.lstrip().startswith("[")
        lines = [line for line in text.splitlines() if line.strip()]
        records = json.loads(text) if is_list else [json.loads(line) for line in lines]
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: is no JSON list nor JSON lines ({error}); give such") from error
    questions = []
    for number, record in enumerate(records, start=1):
        fields = record if isinstance(record, dict) else {}
        stored = [fields.get(key) for key in ("question", "class", "std_answer")]
        values = [str(value or "") for value in stored]
        if values != stored or not all(values):
            raise UserError(
                f"{path}: record {number} lacks a question, class or std_answer that is text; "
                "give it one or leave it out"
            )
        questions.append(Question(*values))
    if not questions:
        raise UserError(f"{path}: holds no questions")
    return questions


def prompt_of(asked: Question) -> str:
    """What is before the answer, as in BELLE's training; the answer follows after a space."""
    return belle_prompt([{"role": "user", "content": asked.question}])


@torch.no_grad()
def log_likelihood(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: Question
) -> float:
    """Mean log-probability, in nats, of each token of the reference answer after the question."""
    prompt = tokenizer(prompt_of(asked))["input_ids"]
    whole = tokenizer(f"{prompt_of(asked)} {asked.answer}")["input_ids"]
    # Where the tokens of the two part: a piece may reach over the end of the prompt.
    prompt_tokens = next(
        (i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b),
        min(len(prompt), len(whole) - 1),
    )
    prompt_tokens = max(prompt_tokens, 1)
    tokens = torch.tensor([whole], device=model.device)
    logits = model(tokens).logits[0, prompt_tokens - 1 : -1].float()
    chosen = logits.log_softmax(-1).gather(1, tokens[0, prompt_tokens:, None])
    return float(chosen.mean())


def answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: Question, new_tokens: int
) -> str:
    """What the model writes, up to where it would go on with the next question itself."""
    written = text(model, tokenizer, prompt_of(asked), new_tokens)
    for end in END:
        written = written.partition(end)[0]
    return written.strip()


def run(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Iterable[Question],
    new_tokens: int,
    judged: judge.Judge | None = None,
) -> Iterator[Scored]:
    """Each question's scores, one after another; with `new_tokens` of 0 only likelihoods."""
    for asked in questions:
        values = {"log-likelihood": log_likelihood(model, tokenizer, asked)}
        written = answer(model, tokenizer, asked, new_tokens) if new_tokens else ""
        if new_tokens:
            values |= scores.compare(written, asked.answer)
        if judged is not None and new_tokens:
            values["judge"] = judged.score(asked.kind, asked.question, asked.answer, written)
        yield Scored(name, asked.kind, written, values)


Means = dict[str, dict[str, dict[str, float]]]


def means(scored: Iterable[Scored]) -> Means:
    """By measure, model and kind of task; `all` is the mean over questions."""
    collected: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for one in scored:
        for measure, value in one.values.items():
            for kind in (one.kind, "all"):
                collected[measure, one.model, kind].append(value)
    result: Means = {}
    for (measure, model, kind), values in collected.items():
        by_model = result.setdefault(measure, {}).setdefault(model, {})
        by_model[kind] = sum(values) / len(values)
    return result


def markdown(averages: Means) -> str:
    """A table for each measure: a row for each kind of task, a column for each model."""
    parts = []
    for measure in (name for name in MEASURES if name in averages):
        models = list(averages[measure])
        kinds = [kind for kind in averages[measure][models[0]] if kind != "all"]
        lines = [(measure, *models), ("---",) * (1 + len(models))]
        for kind in (*kinds, "all"):
            values = (format(averages[measure][model][kind], ".3f") for model in models)
            lines.append((kind, *values))
        parts.append("\n".join("| " + " | ".join(line) + " |" for line in lines))
    return "\n\n".join(parts) + "\n"


def chart(averages: Means, path: Path) -> None:
    """A panel for each measure: kinds of task side by side, a bar for each model."""
    import matplotlib

    matplotlib.use("Agg")
    # Names of models and classes may be Chinese.
    matplotlib.rcParams["font.sans-serif"] = ["Noto Sans CJK SC", "DejaVu Sans"]
    from matplotlib import pyplot

    shown = [name for name in MEASURES if name in averages]
    figure, axes = pyplot.subplots(len(shown), 1, figsize=(12, 3.2 * len(shown)), squeeze=False)
    for axis, measure in zip(axes[:, 0], shown, strict=True):
        models = list(averages[measure])
        kinds = list(averages[measure][models[0]])
        width = 0.8 / len(models)
        for place, model in enumerate(models):
            at = [i + (place - (len(models) - 1) / 2) * width for i in range(len(kinds))]
            axis.bar(
                at, [averages[measure][model][kind] for kind in kinds], 0.92 * width, label=model
            )
        axis.set(title=measure, xticks=range(len(kinds)))
        axis.set_xticklabels(kinds, rotation=20, ha="right")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].legend(fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.5, 1.35))
    figure.tight_layout()
    with whole_file(path) as unfinished:
        figure.savefig(unfinished, dpi=110, format="png")
    pyplot.close(figure)


def write(path: Path, scored: Sequence[Scored], averages: Mapping) -> None:
    """`path` with the endings .jsonl (every answer), .json, .md and .png."""
    lines = (json.dumps(asdict(one), ensure_ascii=False) for one in scored)
    for ending, content in (
        (".jsonl", "".join(f"{line}\n" for line in lines)),
        (".json", json.dumps(averages, indent=1, ensure_ascii=False) + "\n"),
        (".md", markdown(dict(averages))),
    ):
        with whole_file(Path(f"{path}{ending}")) as unfinished:
            unfinished.write_text(content, encoding="utf-8")
    chart(dict(averages), Path(f"{path}.png"))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.model_compare", description=(__doc__ or "").splitlines()[0]
    )
    add = parser.add_argument
    add("questions", type=Path, metavar="TEST.json")
    add("models", nargs="+", metavar="MODEL", help="of one or several sizes")
    add("--checkpoints", nargs="+", type=Path, default=[], metavar="FILE", help="of one MODEL")
    add("--max-new-tokens", type=int, default=128, metavar="N", help="0 for likelihoods alone")
    add("--limit", type=int, metavar="N", help="the first N questions of each class")
    add("--judge", metavar="URL", help="an OpenAI-compatible endpoint, such as .../v1")
    add("--judge-model", metavar="NAME", help="its name there; the key is OPENAI_API_KEY's")
    add("--out", type=Path, help="folder and beginning of .jsonl, .json, .md and .png to write")
    return parser.parse_args(argv)


def limited(questions: list[Question], most: int | None) -> list[Question]:
    """The first of each class."""
    counts: dict[str, int] = defaultdict(int)
    kept = []
    for asked in questions:
        counts[asked.kind] += 1
        if most is None or counts[asked.kind] <= most:
            kept.append(asked)
    return kept


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        if args.checkpoints and len(args.models) != 1:
            raise UserError("--checkpoints belong to one MODEL; give one")
        if bool(args.judge) != bool(args.judge_model):
            raise UserError("--judge and --judge-model go together; give both")
        if args.max_new_tokens:
            scores.check()
        questions = limited(read_questions(args.questions), args.limit)
        judged = judge.Judge(args.judge, args.judge_model) if args.judge else None
        runs = [(model, None) for model in args.models]
        runs += [(args.models[0], file) for file in args.checkpoints]
        scored: list[Scored] = []
        for model, file in runs:
            name = Path(model).stem if file is None else file.name
            loaded, tokenizer = gptq.load(model, file)
            scored += run(name, loaded, tokenizer, questions, args.max_new_tokens, judged)
            print(f"{name}: {len(questions)} questions", flush=True)
        averages = means(scored)
        print("\n" + markdown(averages))
        if args.out is not None:
            write(args.out, scored, averages)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
