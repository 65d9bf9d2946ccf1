"""Damaged and hostile checkpoints by the thousand: the right weights, or one clear line.

Every case is drawn from a seed that its failure names. None may hang, or ask for much memory.
"""

import copy
import json
import random
import resource
import signal
import struct
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from conftest import llama_config, make_model
from helpers.old_tools import write
from safetensors.torch import save_file
from torch import Tensor

from gptq.blockwise import empty_model
from gptq.blockwise.model import BlockwiseModel
from gptq.blockwise.source import open_model
from gptq.checkpoints.reading import attach
from gptq.errors import UserError
from gptq.models import LLAMA
from gptq.nn import QuantLinear
from quant_cuda.reference import dequantize

SETTINGS = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": 16,
    "desc_act": True,
    "sym": False,
    "checkpoint_format": "gptq",
    "meta": {"quantizer": ["x:1"]},
}
JUNK = [
    *(None, True, False, 0, 1, -1, 3, 5, 2**31, 2**62, 10**30, 0.5, 1e308, -0.0),
    *("", "4", "gptq", "\u0000", "x" * 1000, [], [4], {}, {"bits": 4}, [[[[]]]], float("nan")),
]


Found = TypeVar("Found")


SECONDS = 60
"""Of processor time, for a case that takes milliseconds: more is a hang."""
ROOM = 2 * 2**30
"""Bytes that a case may take beyond what the process has; the model has some hundred thousand."""


@pytest.fixture(autouse=True)
def bounded():
    """Memory beyond ROOM is refused, and a hang ends."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, before[1]))
    handler = signal.signal(signal.SIGVTALRM, hung)
    yield
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    signal.signal(signal.SIGVTALRM, handler)
    resource.setrlimit(resource.RLIMIT_AS, before)


def hung(*_: object) -> None:
    raise TimeoutError(f"no end after {SECONDS} seconds")


def attempt(read: Callable[[], Found], case: str) -> Found | None:
    """What `read` returns; None where it raised a UserError of one line."""
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        return read()
    except UserError as error:
        # Whoever turns a want of memory into a message has asked for the memory first.
        cause = error.__cause__
        assert not isinstance(cause, MemoryError | TimeoutError), f"{case}: {cause!r}"
        assert "allocate" not in str(cause), f"{case}: {cause!r}"
        message = str(error)
    except BaseException as error:
        raise AssertionError(f"{case}: {type(error).__name__}: {error}") from error
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    assert message.strip(), case
    assert "\n" not in message, case
    return None


class World:
    """A small model, the checkpoint that is damaged, and how one is read."""

    def __init__(self, folder: Path):
        narrow = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
        small = {"vocab_size": 64, "num_attention_heads": 2, "max_position_embeddings": 32}
        self.dir = make_model(folder / "model", llama_config(**narrow, **small))
        self.state = write_small(self.dir)
        self.source = open_model(self.dir)
        self.bare = empty_model.build(self.source.config, LLAMA, torch.device("cpu"))
        self.pt, self.safe = folder / "m.pt", folder / "m.safetensors"
        state = OrderedDict(self.state)
        state._metadata = {"quantize_config": json.dumps(SETTINGS)}
        torch.save(state, self.pt)
        metadata = {"quantize_config": json.dumps(SETTINGS)}
        save_file(dict(self.state), self.safe, metadata=metadata)
        self.packed = {name.rpartition(".")[0] for name in self.state if name.endswith("qweight")}
        self.truth = self.weights(self.safe)
        assert all(torch.equal(self.truth[k], v) for k, v in self.weights(self.pt).items())

    def weights(self, path: Path) -> dict[str, Tensor]:
        """Everything that a checkpoint makes of the model, packed layers as numbers."""
        model = copy.deepcopy(self.bare)
        opened = attach(model, LLAMA, path)
        cpu = torch.device("cpu")
        whole = BlockwiseModel(self.source, model, opened.tensors, cpu, torch.float32)
        for part in whole.parts():
            whole.load(part)
        result = dict(model.state_dict())
        for name, module in model.named_modules():
            if isinstance(module, QuantLinear):
                for key in ("qweight", "qzeros", "scales", "g_idx"):
                    result.pop(f"{name}.{key}", None)
                result[f"{name}.weight"] = dequantize(module.packed(), torch.float32)
        return result

    def outcome(self, path: Path, case: str) -> bool | None:
        """True for the right weights, False for others, None for a UserError of one line."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = attempt(lambda: self.weights(path), case)
        if found is None:
            return None
        same = found.keys() == self.truth.keys()
        return same and all(torch.equal(found[name], self.truth[name]) for name in found)


def write_small(folder: Path) -> "OrderedDict[str, Tensor]":
    return write(folder, "v1", 4, 16, act=True, probe=False).state


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("fuzz"))


def cases(count: int, seed: int) -> list[random.Random]:
    return [random.Random(seed * 100_000 + i) for i in range(count)]


def test_headers(world, tmp_path):
    """A safetensors header with something changed in it."""
    raw = world.safe.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    path = tmp_path / "m.safetensors"
    outcomes = []
    for i, rng in enumerate(cases(900, 1)):
        changed, what = mutated_header(copy.deepcopy(header), rng)
        text = json.dumps(changed).encode()
        claimed = rng.choice([0, 1, 2**40, 2**63, len(text) - 1]) if i % 9 == 0 else len(text)
        path.write_bytes(struct.pack("<Q", claimed) + text + data)
        outcomes.append(world.outcome(path, f"header {i}: {what}"))
        # Types of one width are told apart by nothing but the header's own word.
        assert outcomes[-1] is not False or what.startswith("dtype"), f"header {i}: {what}"
    assert outcomes.count(None) > 400


def mutated_header(header: dict, rng: random.Random) -> tuple[object, str]:
    name = rng.choice([key for key in header if key != "__metadata__"])
    other = rng.choice([key for key in header if key != "__metadata__"])
    entry = header[name]
    kind = rng.choice(["dtype", "shape", "dim", "offset", "drop", "rename", "swap", "junk", "root"])
    if kind == "dtype":
        types = ["F16", "BF16", "F32", "I32", "I64", "U8", "F8_E4M3", "X", "", "C64", "F4"]
        entry["dtype"] = rng.choice(types)
    elif kind == "shape":
        entry["shape"] = rng.choice([[], [0], entry["shape"][::-1], [*entry["shape"], 1], "x", 4])
    elif kind == "dim":
        place = rng.randrange(len(entry["shape"]))
        entry["shape"][place] = rng.choice([0, -1, 1, 2**31, 2**62, 2**64, 1.5, None, "4"])
    elif kind == "offset":
        place = rng.randrange(2)
        entry["data_offsets"][place] = rng.choice([0, -1, 1, 2**31, 2**63, 10**30, "0", None])
    elif kind == "drop":
        del header[name]
    elif kind == "rename":
        header[rng.choice(["", "x", "model", name + "x", "model.layers.0"])] = header.pop(name)
    elif kind == "swap":
        if header[name]["shape"] == header[other]["shape"]:
            return header, "nothing"
        header[name], header[other] = header[other], header[name]
    elif kind == "junk":
        header[name] = rng.choice(JUNK[:-1])
    else:
        return rng.choice([[], 1, "x", {}, {"__metadata__": 3}, [header], None]), kind
    return header, f"{kind} of {name}"


@pytest.mark.parametrize("kind", ["pt", "safe"])
def test_cut_short(kind, world, tmp_path):
    whole = getattr(world, kind).read_bytes()
    path = tmp_path / f"m.{'pt' if kind == 'pt' else 'safetensors'}"
    for i, rng in enumerate(cases(150, 2)):
        kept = rng.randrange(len(whole))
        path.write_bytes(whole[:kept])
        assert world.outcome(path, f"{kind} {i}: {kept} bytes") is None


def test_flipped_bits_in_a_torch_file(world, tmp_path):
    """Its check sums tell: what is read is right or refused."""
    whole = world.pt.read_bytes()
    path = tmp_path / "m.pt"
    refused = 0
    for i, rng in enumerate(cases(400, 3)):
        data, place = bytearray(whole), rng.randrange(len(whole))
        data[place] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        outcome = world.outcome(path, f"flip {i} at {place}")
        assert outcome is not False, f"flip {i} at {place}"
        refused += outcome is None
    assert refused > 200


def test_flipped_bits_in_a_safetensors_file(world, tmp_path):
    """It has no check sums; no flip may crash or hang the reader."""
    whole = world.safe.read_bytes()
    path = tmp_path / "m.safetensors"
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    for i, rng in enumerate(cases(400, 4)):
        place = rng.randrange(header if i % 2 else len(whole))
        data = bytearray(whole)
        data[place] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        world.outcome(path, f"flip {i} at {place}")


def test_settings(world, tmp_path):
    """Settings of the wrong types: right weights or a clear line, never other weights."""
    state, path = OrderedDict(world.state), tmp_path / "m.pt"
    keys = ["bits", "group_size", "sym", "checkpoint_format", "format", "quant_method"]
    keys += ["desc_act", "meta", "pack_dtype", "dynamic", "packing_format", "lm_head"]
    for i, rng in enumerate(cases(250, 5)):
        said: object = {**SETTINGS, **{rng.choice(keys): rng.choice(JUNK) for _ in range(2)}}
        text: object = json.dumps(said)
        if i % 10 == 0:
            text = rng.choice(["", "{", "[]", "1", "null", "[" * 5000, 7, None, b"{}"])
        state._metadata = {"quantize_config": text}
        torch.save(state, path)
        if world.outcome(path, f"settings {i}: {str(text)[:200]}") is False:
            # Without a word about its format, or with the other, a file means something else.
            assert '"gptq_v2"' in str(text), text


CHANGES: dict[str, Callable[[Tensor, random.Random], Tensor]] = {
    "cut": lambda t, rng: t[: rng.randrange(len(t))].clone(),
    "grown": lambda t, rng: torch.cat([t, t[: rng.randrange(1, 5)]]),
    "turned": lambda t, rng: t.T.contiguous(),
    "flat": lambda t, rng: t.reshape(-1),
    "deeper": lambda t, rng: t[None],
    "float": lambda t, rng: t.float(),
    "long": lambda t, rng: t.long(),
    "byte": lambda t, rng: t.to(torch.uint8),
    "complex": lambda t, rng: t.to(torch.complex64),
    "empty": lambda t, rng: t[:0].clone(),
    "scalar": lambda t, rng: t.reshape(-1)[0].clone(),
    "expanded": lambda t, rng: t.reshape(-1)[:1].expand(2**40),
    "sparse": lambda t, rng: t.to_sparse(),
    "nan": lambda t, rng: torch.full(t.shape, float("nan")),
}


def test_tensors(world, tmp_path):
    """Shapes and types that disagree with the rest."""
    path = tmp_path / "m.pt"
    names = list(world.state)
    for i, rng in enumerate(cases(250, 6)):
        name, change = rng.choice(names), rng.choice(list(CHANGES))
        state = OrderedDict(world.state)
        state[name] = CHANGES[change](state[name], rng)
        torch.save(state, path)
        outcome = world.outcome(path, f"tensor {i}: {name} {change}")
        # Of what is not packed, a value is as good as another, and any type can be cast.
        packed = any(name.startswith(f"{layer}.") for layer in world.packed)
        shape_kept = change in ("nan", "byte", "long", "float")
        assert outcome is not False or (shape_kept and not packed), (name, change)


def test_g_idx(world, tmp_path):
    path = tmp_path / "m.pt"
    name = "model.layers.0.mlp.up_proj.g_idx"
    for rng in cases(50, 7):
        state = OrderedDict(world.state)
        state[name] = state[name].clone()
        wrong = rng.choice([-1, -(2**31), 2, 3, 100, 2**31 - 1])
        state[name][rng.randrange(32)] = wrong
        torch.save(state, path)
        assert world.outcome(path, f"g_idx {wrong}") is None


def test_configurations(world, tmp_path):
    """config.json with junk in it: a model of the right sizes, or a clear line."""
    config = json.loads((world.dir / "config.json").read_text())
    (tmp_path / "m.pt").write_bytes(world.pt.read_bytes())
    keys = [*config, "quantization_config", "rope_scaling", "head_dim", "attention_bias"]
    for i, rng in enumerate(cases(250, 8)):
        changed = {**config, rng.choice(keys): rng.choice(JUNK)}
        text = json.dumps(changed)
        if i % 25 == 0:
            text = rng.choice(["", "{", "[]", "null", '{"a":' * 3000, "\\ud800"])
        (tmp_path / "config.json").write_text(text)
        case = f"config {i}: { ({k: v for k, v in changed.items() if config.get(k) != v}) }"
        attempt(lambda: build(tmp_path), case)


@pytest.mark.parametrize("name", ["quantize_config.json", "quant_config.json", "config.json"])
def test_settings_beside_a_file(name, world, tmp_path):
    """A folder's own word about packed weights: right weights or a clear line, never others."""
    config = json.loads((world.dir / "config.json").read_text())
    state = OrderedDict(world.state)
    save_file(state, tmp_path / "model.safetensors")
    outcomes = []
    for i, rng in enumerate(cases(100, 9)):
        said: object = {**SETTINGS, rng.choice(list(SETTINGS)): rng.choice(JUNK)}
        if i % 10 == 0:
            said = rng.choice([*JUNK[:-1], [said], {"": said}])
        whole = {**config, "quantization_config": said} if name == "config.json" else said
        text = json.dumps(whole)
        if i % 25 == 0:
            text = rng.choice([text[: rng.randrange(len(text))], "\ud800", "[" * 5000])
        (tmp_path / name).write_text(text, encoding="utf-8", errors="surrogatepass")
        outcomes.append(world.outcome(tmp_path, f"{name} {i}: {text[-300:]}"))
        assert outcomes[-1] is not False, text[-300:]
    assert outcomes.count(None) > 20
    assert outcomes.count(True) > 20


def build(folder: Path) -> bool:
    source = open_model(folder, weights=False)
    model = empty_model.build(source.config, source.spec, torch.device("cpu"))
    attach(model, source.spec, folder / "m.pt")
    return True
