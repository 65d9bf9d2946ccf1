"""One fine-tuning run: the model, its examples, transformers' Trainer, and what is written."""

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from belle import records
from belle.finetune.encoding import Encoded, Example, collate, encode_all, uses_template
from belle.finetune.order import shuffled
from belle.finetune.output import write_result
from belle.finetune.recipes import Recipe
from belle.finetune.trained import Trained, prepare
from belle.finetune.watch import Interrupts, Snapshots, Watch
from gptq import torchrun
from gptq.blockwise.source import ModelSource, max_positions, open_model
from gptq.checkpoints.formats import container_of
from gptq.checkpoints.writing import FOLDER
from gptq.cli.progress import progress_bar
from gptq.errors import UserError
from gptq.files.atomic import check_apart, check_writable, whole_file
from gptq.inference.loading import Opened, load_weights, open_blockwise, open_weights

_IDENTITY = "run.json"
_COMPLETE = "trainer_state.json"  # The Trainer writes it last into a checkpoint.
_MOST_ON_A_DEVICE = 8


@dataclass(frozen=True)
class Job:
    """One run. Raises UserError for settings that contradict each other."""

    model: str
    data: Path
    out: Path
    recipe: Recipe
    trained: Trained
    load: str | None = None
    """A quantized file made from `model`."""
    scales: tuple[int, ...] = ()
    """Numbers of examples after each of which the model is written."""
    file_order: bool = False
    """Take examples in the order of the file; else shuffled, and grouped by length."""
    prompt: str = "auto"
    too_long: str = "cut"
    merge: bool = False
    device_batch: int | None = None
    """Examples that a device takes at once."""
    recompute: bool = False
    """Compute activations again for the backward pass, which saves memory."""
    save_every: int = 100
    """Steps between two states that a run can be resumed from."""
    seed: int = 0
    resume: bool = False

    def __post_init__(self) -> None:
        recipe = self.recipe
        if self.merge and (self.trained.lora is None or self.load is not None):
            raise UserError("--merge adds a LoRA adapter to a full model; leave it out")
        if not self.trained.scales and container_of(self.out) != FOLDER:
            raise UserError(f"{self.out}: only --train scales writes a file; give a folder's name")
        if recipe.batch % self.examples_at_once:
            raise UserError(
                f"--batch {recipe.batch}: is no multiple of the {self.examples_at_once} examples "
                f"that {torchrun.size()} devices take at once; change it or --device-batch"
            )
        if self.scales:
            self._check_scales()

    def _check_scales(self) -> None:
        recipe = self.recipe
        if not (recipe.rate_is_constant() and recipe.epochs == 1):
            raise UserError(
                "--scales is exact only at a constant rate and in one epoch: add --schedule "
                "constant --warmup 0 --epochs 1, or run once for each scale"
            )
        for count in self.scales:
            if count % recipe.batch:
                raise UserError(
                    f"--scales {count}: is no multiple of the batch of {recipe.batch}; the model "
                    "would not be that of a run on so many examples"
                )
        if container_of(self.out) != FOLDER:
            raise UserError(f"{self.out}: --scales writes a folder for each; give a folder's name")

    @property
    def examples_at_once(self) -> int:
        """On all devices together."""
        size, batch = torchrun.size(), self.recipe.batch
        if self.device_batch is not None:
            return self.device_batch * size
        fitting = (n for n in range(_MOST_ON_A_DEVICE, 0, -1) if batch % (n * size) == 0)
        return next(fitting, 1) * size

    @property
    def work(self) -> Path:
        """The folder of states to resume from; it is removed at the end."""
        return self.out.with_name(f"{self.out.name}.training")


@dataclass(frozen=True)
class Result:
    """What a run came to."""

    encoded: Encoded
    examples: int
    """Different ones that were trained on."""
    losses: tuple[float, ...]
    """Of each step: the mean over the answers' tokens."""
    seconds: float
    """Of this process: not those before it was resumed."""
    written: tuple[Path, ...]


def run(job: Job) -> Result:
    """Train and write. Raises UserError before the training for what cannot work, and
    KeyboardInterrupt, with how to go on, if Ctrl-C stopped it."""
    started = perf_counter()
    _check_paths(job)
    source = open_model(job.model, weights=job.load is None)
    tokenizer = source.tokenizer()
    # Positions are learned or trained for up to this; BLOOM has no limit.
    limit = max_positions(source.config) or job.recipe.length
    encoded = encode_all(
        records.read(job.data),
        tokenizer,
        min(job.recipe.length, limit),
        prompt=job.prompt,
        too_long=job.too_long,
    )
    order = _order(job, encoded)
    if torchrun.rank() == 0:
        _take_up(job)
    try:
        trainer = _trainer(job, source, [encoded.examples[index] for index in order])
    except BaseException:
        if torchrun.rank() == 0 and _last_state(job.work) is None:
            shutil.rmtree(job.work, ignore_errors=True)
        raise

    def write(target: Path) -> None:
        about = _about(job, encoded, trainer)
        state = gathered_state(trainer)
        if torchrun.rank() == 0 and not target.exists():
            write_result(
                target,
                trainer.accelerator.unwrap_model(trainer.model),
                state,
                trained=job.trained,
                source=source,
                base=(job.model, job.load),
                belle_prompt=not uses_template(tokenizer, job.prompt),
                merge=job.merge,
                about=about,
            )
        trainer.accelerator.wait_for_everyone()

    steps = {count // job.recipe.batch: job.out / str(count) for count in job.scales}
    trainer.add_callback(Snapshots(set(steps), lambda step: write(steps[step])))
    with progress_bar("training") as show, Interrupts() as interrupts:
        trainer.add_callback(Watch(show))
        trainer.add_callback(interrupts)
        trainer.train(resume_from_checkpoint=_last_state(job.work) if job.resume else None)
    if interrupts.stopped:
        step = trainer.state.global_step
        raise KeyboardInterrupt(f"step {step} is saved in {job.work}; add --resume to go on")
    if not job.scales:
        write(job.out)
    if torchrun.rank() == 0:
        shutil.rmtree(job.work, ignore_errors=True)
    written = tuple(steps.values()) or (job.out,)
    return Result(encoded, len(set(order)), _losses(trainer), perf_counter() - started, written)


def gathered_state(trainer: Trainer) -> dict[str, Tensor]:
    """The trained model's state dict, whole on the first device."""
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        return trainer.accelerator.get_state_dict(trainer.model_wrapped)
    return trainer.accelerator.unwrap_model(trainer.model).state_dict()


def _check_paths(job: Job) -> None:
    goes_on = job.resume and job.scales and _last_state(job.work) is not None
    if job.out.exists() and not goes_on:
        raise UserError(f"{job.out}: exists; give a new name, or remove it")
    if torchrun.rank() == 0 and not job.out.exists():
        check_writable(job.out, folder=container_of(job.out) == FOLDER)
    inputs = [job.data, Path(job.model), *([] if job.load is None else [Path(job.load)])]
    check_apart([job.out], inputs, job.out)


def _order(job: Job, encoded: Encoded) -> list[int]:
    """The examples to train on, in order, each once an epoch."""
    count = len(encoded.examples)
    if job.scales:
        if max(job.scales) > count:
            raise UserError(
                f"--scales {max(job.scales)}: only {count} records of {job.data} can be used"
            )
        return list(range(max(job.scales)))
    if job.file_order:
        return list(range(count)) * job.recipe.epochs
    lengths = [len(it.tokens) for it in encoded.examples]
    return shuffled(lengths, job.recipe.batch, job.recipe.epochs, job.seed)


def _trainer(job: Job, source: ModelSource, examples: list[Example]) -> Trainer:
    recipe, on_gpu = job.recipe, torch.cuda.is_available()
    set_seed(job.seed)
    model = prepare(_load(job, source), source.spec, job.trained)
    arguments = TrainingArguments(
        output_dir=str(job.work),
        per_device_train_batch_size=job.examples_at_once // torchrun.size(),
        gradient_accumulation_steps=recipe.batch // job.examples_at_once,
        # All epochs are one, in an order that is known before: see `order`.
        num_train_epochs=1,
        train_sampling_strategy="sequential",
        learning_rate=recipe.rate,
        lr_scheduler_type=recipe.schedule,
        warmup_steps=recipe.warmup,
        weight_decay=recipe.decay,
        # Never float16, whose range gradients leave (BELLE issue 133).
        bf16=on_gpu and torch.cuda.is_bf16_supported(),
        use_cpu=not on_gpu,
        dataloader_pin_memory=on_gpu,
        seed=job.seed,
        save_steps=job.save_every,
        save_total_limit=1,
        logging_steps=1,
        # The Trainer would show the mean of other steps instead of a NaN.
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to="none",
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
    )
    trainer = Trainer(model, arguments, data_collator=collate, train_dataset=examples)
    trainer.remove_callback(PrinterCallback)
    if job.merge and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        raise UserError("--merge: an adapter of sharded weights is not added; merge it afterwards")
    return trainer


def _load(job: Job, source: ModelSource) -> PreTrainedModel:
    """The model in float32, in which small steps are not rounded away; on a GPU products are
    computed in bfloat16."""
    model = open_blockwise(source, device="cpu", dtype=torch.float32)
    if source.gguf is not None and not job.trained.scales:
        # Its weights are packed too, but stand for a full model here.
        opened = Opened(model, None)
    else:
        opened = open_weights(model, job.load, device="cpu", dtype="float32")
    if job.merge and opened.checkpoint is not None:
        raise UserError("--merge: the model is quantized; leave the flag out")
    loaded = load_weights(opened)
    loaded.config.use_cache = False
    if job.recompute:
        # Its name before transformers renamed it is the other one.
        enable = getattr(loaded, "activation_checkpointing_enable", None)
        (enable or loaded.gradient_checkpointing_enable)({"use_reentrant": False})
    # PEFT writes it into an adapter's configuration.
    loaded.name_or_path = str(job.load or job.model)
    return loaded


# A state to resume from ----------------------------------------------------------------------


def _take_up(job: Job) -> None:
    """Begin the work folder, or check that it is of the same run. Raises UserError if it is not,
    or if it is there although the run is not to be resumed."""
    file = job.work / _IDENTITY
    identity = json.loads(json.dumps(_identity(job)))
    if _last_state(job.work) is None:
        if job.work.exists() and not file.exists() and any(job.work.iterdir()):
            raise UserError(f"{job.work}: is not of a training; move it away, or give another OUT")
        shutil.rmtree(job.work, ignore_errors=True)
        job.work.mkdir(parents=True)
        with whole_file(file) as temporary:
            temporary.write_text(json.dumps(identity, indent=1, sort_keys=True))
        return
    if not job.resume:
        raise UserError(
            f"{job.work}: holds an earlier run's state; add --resume to go on with it, or delete "
            "the folder to start afresh"
        )
    try:
        before = dict(json.loads(file.read_text()))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read; delete {job.work} to start afresh") from error
    changed = [key for key in sorted({*before, *identity}) if before.get(key) != identity.get(key)]
    if changed:
        raise UserError(
            f"{job.work}: is of a run that differs in {', '.join(changed)}; give the same "
            "arguments to go on with it, or delete the folder to start afresh"
        )


def _identity(job: Job) -> dict[str, Any]:
    """What decides the weights that come out."""
    own = asdict(job)
    for name in ("out", "resume", "save_every", "merge", "recompute", "device_batch"):
        del own[name]
    data = hashlib.sha256(job.data.read_bytes()).hexdigest()
    together = {"examples_at_once": job.examples_at_once, "devices": torchrun.size()}
    return {**own, "data": data, **together}


def _last_state(work: Path) -> str | None:
    """The folder of the last complete state; None if there is none."""
    complete = [path.parent for path in work.glob(f"checkpoint-*/{_COMPLETE}") if _is_json(path)]
    steps = {int(path.name.rpartition("-")[2]): path for path in complete}
    return str(steps[max(steps)]) if steps else None


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return True


# What is said of a run -----------------------------------------------------------------------


def _losses(trainer: Trainer) -> tuple[float, ...]:
    return tuple(it["loss"] for it in trainer.state.log_history if "loss" in it)


def _about(job: Job, encoded: Encoded, trainer: Trainer) -> dict[str, object]:
    return {
        "model": job.model,
        "data": str(job.data),
        "trained": str(job.trained),
        "recipe": asdict(job.recipe),
        "seed": job.seed,
        "examples": len(encoded.examples),
        "cut": encoded.cut,
        "dropped": encoded.dropped,
        "losses": _losses(trainer),
    }
