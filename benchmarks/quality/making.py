"""One quantized model, by this package or by another toolkit in its own environment."""

import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from time import process_time
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.measures import bits_per_weight, children_seconds, version
from benchmarks.llama_cpp_files import Peer, full_file, importance
from benchmarks.quality.methods import LLAMA_CPP, METHODS, OURS, PACKAGES, SETTINGS, Method, Setting
from benchmarks.quality.results import UNKNOWN
from benchmarks.quality.subjects import SEED, Subject
from gptq import QuantConfig, api
from gptq.allocation.target import Target
from gptq.cli.progress import show_training
from gptq.config import QUALITIES
from gptq.data.tuning_windows import tuning_windows
from gptq.device import pick_device
from gptq.errors import UserError

PEERS = Path(__file__).parents[1] / "peers"


@dataclass(frozen=True)
class Made:
    """A quantized model in files."""

    folder: Path
    """The model's, or a .gguf file that is complete in itself."""
    checkpoint: Path | None
    cpu_seconds: float
    bits_per_weight: float


@dataclass(frozen=True, eq=False)
class Workshop:
    """What all methods quantize one model from, and with."""

    subject: Subject
    calibration: Tensor
    """int64 (nsamples, seqlen)."""
    pythons: Mapping[str, str | None]
    """Of the environments of other toolkits, by the keys of PACKAGES."""
    device: str | None = None
    """None: a GPU if there is one. llama.cpp quantizes on the CPU."""

    def make(self, method: str, setting: str, out: Path) -> Made:
        """Quantize, with files under `out`. Raises UserError if that fails."""
        how, what = METHODS[method], SETTINGS[setting]
        if how.toolkit == LLAMA_CPP:
            return self._llama_cpp(how, what, out)
        if how.toolkit == OURS:
            checkpoint, seconds = self._ours(how, what, out)
        else:
            checkpoint, seconds = self._peers(method, how, what, out)
        opened = api.open_weights(self.subject.folder, checkpoint, device="cpu")
        return Made(self.subject.folder, checkpoint, seconds, bits_per_weight(opened))

    def _ours(self, method: Method, setting: Setting, out: Path) -> tuple[Path, float]:
        # Other toolkits leave embeddings and heads as they are; what packing them costs is measured
        # by benchmarks/embeddings.py.
        options: dict[str, Any] = {**setting.config, **method.options, "embedding_bits": 16}
        path, bits = out / "model.pt", setting.average_bits
        job = api.Job(
            QuantConfig(**options),
            api.Outputs(path),
            self.subject.calibration,
            nsamples=method.nsamples or self.subject.nsamples,
            seqlen=self.subject.seqlen,
            seed=SEED,
            target=None if bits is None else Target(bits=bits),
        )
        started = process_time()
        full = api.open_full(self.subject.folder, self.device, self.subject.dtype)
        api.run(full, job, training=show_training)
        return path, process_time() - started

    def _peers(self, name: str, method: Method, setting: Setting, out: Path) -> tuple[Path, float]:
        tokens = out / "tokens.json"
        windows = self._tuning_windows() if method.has_tuning_text else self.calibration
        tokens.write_text(json.dumps(windows.tolist()))
        script = PEERS / f"{method.toolkit}_run.py"
        settings = json.dumps({**setting.config, **method.options})
        files = (self.subject.folder.resolve(), tokens, out / "peer")
        python, device = self.pythons[method.toolkit], pick_device(self.device)
        before = children_seconds()
        # With fewer than two workers GPTQModel stops with an error.
        done = subprocess.run(
            [str(word) for word in (python, script, *files, settings, device)],
            capture_output=True,
            text=True,
            check=False,
            cwd=out,  # they write logs where they run
            env={**os.environ, "GPTQMODEL_CPU_WORKERS": str(max(2, torch.get_num_threads()))},
        )
        if done.returncode:
            raise UserError(f"{name} failed: {done.stderr.strip().splitlines()[-1:]}")
        # This includes starting Python and reading the model, which take little of it.
        return _checkpoint_folder(out / "peer"), children_seconds() - before

    def _llama_cpp(self, method: Method, setting: Setting, out: Path) -> Made:
        """A .gguf file whose embedding and head have 16 bits, as in files of the other methods."""
        full = full_file(self.subject.folder, out / "full.gguf")
        peer = Peer(str(self.pythons[LLAMA_CPP]), out, torch.get_num_threads(), f"--{LLAMA_CPP}")
        started, before = process_time(), children_seconds()
        argv: list[object] = [full, path := out / "model.gguf", setting.llama_cpp_type, "f16"]
        if method.options.get("importance"):
            argv.append(importance(self.subject.folder, self.calibration, out / "importance.npz"))
        about = peer("quantize", *argv)
        seconds = process_time() - started + children_seconds() - before
        return Made(path, None, seconds, about["bits"])

    def _tuning_windows(self) -> Tensor:
        """What "tune" is trained on: int64 (n, seqlen); the calibration windows come first."""
        tokenizer = api.open_model(self.subject.folder, weights=False).tokenizer()
        tokens = QUALITIES["tune"]["tune_tokens"]
        text = self.subject.calibration
        return tuning_windows(text, tokenizer, self.calibration, tokens, SEED)[0]


def _checkpoint_folder(out: Path) -> Path:
    """The folder with a peer's files: its output folder or one inside."""
    return next(path.parent for path in sorted(out.rglob("*.safetensors")))


def toolkit_version(method: str, pythons: Mapping[str, str | None]) -> str:
    """Which code a method is: this package's version, or another toolkit's in its environment."""
    toolkit = METHODS[method].toolkit
    if toolkit == OURS:
        return version()
    script = "import importlib.metadata, sys; print(importlib.metadata.version(sys.argv[1]))"
    argv = [str(pythons[toolkit]), "-c", script, PACKAGES[toolkit]]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    return f"{PACKAGES[toolkit]} {done.stdout.strip() or UNKNOWN}"
