"""Which cases run, in which order, and tiny random models as Hugging Face folders.

`--cases` says which: `corners` (`make test`), `rest` (what that leaves out) or, without it, all;
helpers/selection.py has the rule. Models, text and compiled kernels are made once a session.
"""

import os
from pathlib import Path

import pytest
import torch
from helpers import emulated, selection
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

import gptq
from quant_cuda.cpu import decoder_block

ROOT = Path(__file__).parent.parent
# Where the package that is tested lies: the checkout, or what pip has installed.
PACKAGES = Path(gptq.__file__).parents[1]
WORDS = "the cat sat on a mat and saw that one dog run over hills while rain fell in the night"

# Nothing a test does may reach for a model hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

# One of several processes that share the tests, and what it starts, keep to one thread each.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

# Files that take the longest, which several processes should start with.
LONG = ("test_train_tiny.py", "test_cpu_library.py", "test_trained.py", "test_cuda_emulation.py")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--cases",
        choices=selection.CHOICES,
        default="all",
        help="corners: of each test the cases with every pair of values; rest: all others",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before fixtures, which may need the GPU too."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU here")


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """After an illegal access every call of this process fails: one of several processes ends, in
    place of which xdist starts another. Last: the report has been sent then."""
    if not report.failed or "gpu" not in report.keywords or "PYTEST_XDIST_WORKER" not in os.environ:
        return
    from benchmarks.common.gpu_facts import is_usable

    if not is_usable():
        os._exit(3)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Last: the corners are those of the tests that -m and -k have chosen."""
    chosen = selection.select(items, config.getoption("--cases"))
    kept = set(chosen)
    if dropped := [item for item in items if item not in kept]:
        config.hook.pytest_deselected(items=dropped)
    order = {name: i for i, name in enumerate(LONG)}
    items[:] = sorted(chosen, key=lambda item: order.get(item.path.name, len(LONG)))


def make_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of 300 pieces."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([WORDS] * 4, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    return fast


# Grouped-query heads, and an intermediate width of which groups of 64 leave a short last one.
SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
}


def llama_config(**changes) -> LlamaConfig:
    return LlamaConfig(**{**SIZES, **changes})


def bloom_config(**changes) -> BloomConfig:
    settings = {
        "vocab_size": 320,
        "hidden_size": 64,
        "n_layer": 2,
        "n_head": 4,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "tie_word_embeddings": True,
    }
    return BloomConfig(**{**settings, **changes})


def make_model(folder: Path, config) -> Path:
    """A random model of this configuration, its biases and norms random too, with a tokenizer."""
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif "embed" not in name:
                parameter.mul_(4)
    model.half().save_pretrained(folder)
    make_tokenizer(folder)
    return folder


def words_file(path: Path) -> Path:
    """About 9,000 tokens of shuffled words."""
    generator = torch.Generator().manual_seed(3)
    words = WORDS.split()
    picks = torch.randint(len(words), (4000,), generator=generator).tolist()
    path.write_text(" ".join(words[i] for i in picks), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def llama_dir(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "Tiny-Llama", llama_config())


@pytest.fixture(scope="session")
def bloom_dir(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "Tiny-Bloom", bloom_config())


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    return words_file(tmp_path_factory.mktemp("text") / "words.txt")


@pytest.fixture(scope="session")
def host_library() -> Path:
    """The CUDA kernels' own source, compiled for the host."""
    return emulated.library()


@pytest.fixture(params=["llama", "bloom"])
def model_dir(request) -> Path:
    """Both architectures in turn."""
    return request.getfixturevalue(f"{request.param}_dir")


@pytest.fixture(params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def kernels(request) -> emulated.Kernels:
    """The GPU has to have the CAPABILITY of the test's module, if that names one."""
    if request.param == "emulated":
        made = emulated.emulated(request.getfixturevalue("host_library"))
        made.settle(0, 0)
        return made
    wanted = getattr(request.module, "CAPABILITY", None)
    if wanted not in (None, torch.cuda.get_device_capability()):
        pytest.skip("no such NVIDIA GPU here")
    return emulated.on_gpu()


@pytest.fixture
def compiled_steps(monkeypatch):
    """A list that gets an entry for each block and token that compiled code runs."""
    calls = []
    compiled_run = decoder_block.BoundBlocks.run

    def run(self, *args):
        calls.extend(self.blocks)
        return compiled_run(self, *args)

    monkeypatch.setattr(decoder_block.BoundBlocks, "run", run)
    return calls
