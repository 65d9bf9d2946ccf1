"""PyTorch files that claim what they do not hold: one line, and no memory asked for.

The pickles are written step by step, because no library writes such ones.
"""

import io
import pickle
import resource
import struct
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path

import pytest
import torch

from gptq.errors import UserError
from gptq.files import torch_file
from gptq.files.opening import open_tensors

ROOM = 1 << 28
"""Bytes that reading a file of a kilobyte may take."""


@pytest.fixture(autouse=True)
def little_memory():
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


# Steps of a pickle ---------------------------------------------------------------------------


def number(value: int) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


def text(value: str) -> bytes:
    raw = value.encode()
    return pickle.BINUNICODE + struct.pack("<I", len(raw)) + raw


def names(*values: bytes) -> bytes:
    return pickle.MARK + b"".join(values) + pickle.TUPLE


def call(name: str, *args: bytes) -> bytes:
    module, _, function = name.rpartition(".")
    return pickle.GLOBAL + f"{module}\n{function}\n".encode() + names(*args) + pickle.REDUCE


def storage(kind: str, numel: int, key: str = "0", *view: bytes) -> bytes:
    kind = pickle.GLOBAL + b"torch\n" + kind.encode() + b"\n"
    parts = (text("storage"), kind, text(key), text("cpu"), number(numel), *view)
    return names(*parts) + pickle.BINPERSID


def tensor(stored: bytes, offset: int, shape: tuple, strides: tuple) -> bytes:
    sizes = (names(*map(number, each)) for each in (shape, strides))
    hooks = call("collections.OrderedDict")
    return call(
        "torch._utils._rebuild_tensor_v2", stored, number(offset), *sizes, pickle.NEWFALSE, hooks
    )


def state(*entries: tuple[str, bytes]) -> bytes:
    pairs = b"".join(text(name) + value for name, value in entries)
    return pickle.EMPTY_DICT + pickle.MARK + pairs + pickle.SETITEMS


def zipped(path: Path, pickled: bytes, *parts: tuple[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.PROTO + b"\x02" + pickled + pickle.STOP)
        for name, data in parts:
            archive.writestr(f"archive/{name}", data)
    return path


def stream(path: Path, pickled: bytes, *storages: bytes, keys: tuple = ("0",)) -> Path:
    magic, protocol = 0x1950A86A20F9469CFC6C, 1001
    start = [magic, protocol, {"little_endian": True}]
    body = pickle.PROTO + b"\x02" + pickled + pickle.STOP
    path.write_bytes(
        b"".join(pickle.dumps(each, 2) for each in start)
        + body
        + pickle.dumps(list(keys), 2)
        + b"".join(storages)
    )
    return path


FOUR = struct.pack("<4f", 1, 2, 3, 4)
GOOD = tensor(storage("FloatStorage", 4), 0, (2, 2), (2, 1))


def refused(path: Path, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        open_tensors([path])
    message = str(caught.value)
    assert not isinstance(caught.value.__cause__, MemoryError)
    assert "\n" not in message
    assert all(word in message for word in (path.name, *words)), message


def test_a_file_by_hand_is_right(tmp_path):
    """So that the ones below are wrong only in what they say."""
    path = zipped(tmp_path / "m.pt", state(("w", GOOD)), ("data/0", FOUR))
    assert open_tensors([path])["w"].tolist() == [[1, 2], [3, 4]]
    old = storage("FloatStorage", 4, "0", pickle.NONE)
    whole = state(("w", tensor(old, 0, (2, 2), (1, 2))))
    path = stream(tmp_path / "old.pt", whole, struct.pack("<q", 4) + FOUR)
    assert open_tensors([path])["w"].tolist() == [[1, 3], [2, 4]]
    part = storage("FloatStorage", 4, "0", names(text("1"), number(1), number(2)))
    path = stream(
        tmp_path / "part.pt",
        state(("w", tensor(part, 1, (1,), (1,)))),
        struct.pack("<q", 4) + FOUR,
    )
    assert open_tensors([path])["w"].tolist() == [3]


HUGE = 1_700_000_000


@pytest.mark.parametrize("write", [zipped, stream])
def test_values_that_a_call_would_make_are_not_made(tmp_path, write):
    """Calls beside the tensors that would take gigabytes; the tensors are read."""
    calls = [
        call("builtins.bytearray", number(HUGE)),
        call("torch._utils._rebuild_nothing", number(HUGE)),
        call("_codecs.encode", text("x"), text("latin1")),
        # To remember something under a number is to ask some readers for that many places.
        pickle.NONE + pickle.LONG_BINPUT + struct.pack("<I", HUGE),
    ]
    for i, wanted in enumerate(calls):
        data = struct.pack("<q", 4) + FOUR if write is stream else ("data/0", FOUR)
        path = write(
            tmp_path / f"{i}.pt", state(("x", wanted), ("state_dict", state(("w", GOOD)))), data
        )
        if i == 1:
            refused(path, "'x'")
            continue
        assert list(open_tensors([path])) == ["w"]


CLAIMS = {
    "long storage": tensor(storage("FloatStorage", HUGE), 0, (2, 2), (2, 1)),
    "long shape": tensor(storage("FloatStorage", 4), 0, (HUGE,), (1,)),
    "both": tensor(storage("FloatStorage", HUGE), 0, (HUGE,), (1,)),
    "expanded": tensor(storage("FloatStorage", 4), 0, (HUGE, HUGE), (0, 0)),
    "one more": tensor(storage("FloatStorage", 4), 0, (5,), (1,)),
    "wide strides": tensor(storage("FloatStorage", 4), 0, (2,), (HUGE,)),
    "one stride more": tensor(storage("FloatStorage", 4), 0, (2, 2), (3, 1)),
    "offset": tensor(storage("FloatStorage", 4), 1, (4,), (1,)),
    "far offset": tensor(storage("FloatStorage", 4), HUGE, (1,), (1,)),
    "negative offset": tensor(storage("FloatStorage", 4), -1, (1,), (1,)),
    "negative size": tensor(storage("FloatStorage", 4), 0, (-1, -4), (1, 1)),
    "negative stride": tensor(storage("FloatStorage", 4), 3, (4,), (-1,)),
    "negative storage": tensor(storage("FloatStorage", -4), 0, (4,), (1,)),
    "fewer strides": tensor(storage("FloatStorage", 4), 0, (2, 2), (2,)),
    "huge and empty": tensor(storage("FloatStorage", 4), 0, (1 << 64, 0), (1, 1)),
    "many sizes": tensor(storage("FloatStorage", 4), 0, (1,) * 2000, (1,) * 2000),
    "wider type": tensor(storage("DoubleStorage", 4), 0, (4,), (1,)),
    "another's bytes": tensor(storage("FloatStorage", 8), 0, (8,), (1,)),
    "no storage": tensor(storage("FloatStorage", 4, "7"), 0, (4,), (1,)),
    "no sizes": call("torch._utils._rebuild_tensor_v2", storage("FloatStorage", 4)),
    "text as size": call(
        "torch._utils._rebuild_tensor_v2",
        *(storage("FloatStorage", 4), number(0), text("44"), text("11")),
        *(pickle.NEWFALSE, pickle.NONE),
    ),
}


@pytest.mark.parametrize("case", CLAIMS)
@pytest.mark.parametrize("write", [zipped, stream])
def test_tensors_that_the_file_does_not_hold(tmp_path, write, case):
    parts = (("data/0", FOUR), ("data/1", FOUR * 9))
    if write is stream:
        parts = (struct.pack("<q", 4) + FOUR,)
    refused(write(tmp_path / "m.pt", state(("w", CLAIMS[case])), *parts))


@pytest.mark.parametrize("claimed", [5, HUGE, 1 << 62, -1])
def test_storages_that_an_old_file_does_not_hold(tmp_path, claimed):
    path = stream(tmp_path / "m.pt", state(("w", GOOD)), struct.pack("<q", claimed) + FOUR)
    refused(path, "lies past its end")


def test_archives_that_contradict_themselves(tmp_path, monkeypatch):
    two = zipped(tmp_path / "two.pt", state(("w", GOOD)), ("data/0", FOUR), ("data/1", FOUR))
    two.write_bytes(two.read_bytes().replace(b"archive/data/1", b"archive/data/0"))
    refused(two, "two parts")
    big = zipped(tmp_path / "big.pt", state(("w", GOOD)), ("data/0", FOUR), ("byteorder", b"big"))
    refused(big, "big-endian")
    monkeypatch.setattr(torch_file, "MAX_BYTES", 50)
    refused(zipped(tmp_path / "long.pt", state(("w", GOOD)), ("data/0", FOUR)), "are enough")
    refused(stream(tmp_path / "old.pt", state(("w", GOOD)), FOUR), "not enough data")


def test_a_part_longer_than_the_file(tmp_path):
    path = zipped(tmp_path / "m.pt", state(("w", GOOD)), ("data/0", FOUR))
    whole = path.read_bytes()
    # The directory's entry has the size once compressed and the size, 26 bytes before the name.
    place = whole.rindex(b"archive/data/0") - 26
    assert whole[place : place + 8] == struct.pack("<II", 16, 16)
    path.write_bytes(whole[:place] + struct.pack("<II", HUGE, HUGE) + whole[place + 8 :])
    refused(path, "lies past its end")


@pytest.mark.parametrize(
    "pickled",
    [
        b"",
        pickle.POP * 3,
        pickle.TUPLE,
        pickle.BINGET + b"\x07",
        pickle.EMPTY_LIST + pickle.EMPTY_TUPLE + pickle.REDUCE,
        b"(ios\nsystem\n",
        b"\x82\x01",
        pickle.LONG4 + struct.pack("<i", HUGE) + b"\x01",
        pickle.BINBYTES8 + struct.pack("<Q", 1 << 60),
        # A key whose hash would overflow the processor's stack.
        pickle.EMPTY_DICT
        + pickle.EMPTY_TUPLE
        + pickle.TUPLE1 * 200_000
        + pickle.NONE
        + pickle.SETITEM,
    ],
)
@pytest.mark.parametrize("write", [zipped, stream])
def test_pickles_of_other_steps(tmp_path, write, pickled):
    refused(write(tmp_path / "m.pt", pickled))


# What torch itself writes --------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_and_kind_of_value(tmp_path, protocol):
    base = torch.arange(12.0).view(3, 4)
    held = {
        "turned": base.T,
        "row": base[1],
        "parameter": torch.nn.Parameter(base[1:]),
        "odd": torch.tensor([1, 65_000]).to(torch.uint16),
        "eight": torch.ones(3).to(torch.float8_e5m2),
        "complex": torch.tensor([1 + 2j]),
        "empty": torch.empty(0, 3),
    }
    others = {"step": 3, "type": torch.float16, "shape": base.shape, "seen": Counter("ab")}
    buffer = io.BytesIO()
    torch.save({"model": OrderedDict(held), **others}, buffer, pickle_protocol=protocol)
    (tmp_path / "m.pt").write_bytes(buffer.getvalue())
    tensors = open_tensors([tmp_path / "m.pt"])
    assert list(tensors) == list(held)
    for name, expected in held.items():
        assert tensors[name].dtype == expected.dtype
        assert tensors[name].is_contiguous()
        assert torch.equal(tensors[name], expected)


def test_tensors_of_other_kinds_are_named(tmp_path):
    conjugate = torch.tensor([1 + 2j]).conj()
    for word, value in (("sparse", torch.eye(2).to_sparse()), ("conjugated", conjugate)):
        torch.save({"w": value}, tmp_path / "m.pt")
        refused(tmp_path / "m.pt", "'w'", word)
