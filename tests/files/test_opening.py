import argparse
import io
import json
import os
import pickle
import struct
import zipfile
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import save_file

from gptq.errors import UserError
from gptq.files.opening import open_tensors

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]


def some_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    state = {str(dtype): (torch.randn(3, 5) * 9).to(dtype) for dtype in DTYPES}
    return {**state, "scalar": torch.tensor(7.5), "none": torch.empty(0, 4), "one": torch.ones(1)}


def assert_same(tensors, state):
    assert list(tensors) == list(tensors.keys())
    assert set(tensors) == set(state)
    assert len(tensors) == len(state)
    for name, expected in state.items():
        assert name in tensors
        got = tensors[name]
        assert got.dtype == expected.dtype
        assert got.shape == expected.shape
        assert torch.equal(
            got.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8)
        )


def write(path, kind, state):
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    return path


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
def test_every_format_gives_back_what_was_saved(tmp_path, kind):
    state = some_tensors()
    if kind == "legacy":  # older than the 8-bit floats
        state = {name: tensor for name, tensor in state.items() if "float8" not in name}
    assert_same(open_tensors([write(tmp_path / "model.any", kind, state)]), state)


def test_several_files_are_one_mapping(tmp_path):
    state = some_tensors()
    names = list(state)
    first = write(tmp_path / "1.safetensors", "safetensors", {n: state[n] for n in names[:4]})
    second = write(tmp_path / "2.bin", "zip", {n: state[n] for n in names[4:]})
    tensors = open_tensors([first, second])
    assert_same(tensors, state)
    assert "absent" not in tensors
    with pytest.raises(KeyError):
        tensors["absent"]


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
def test_a_tensor_is_the_callers_own(tmp_path, kind):
    path = write(tmp_path / "m", kind, {"w": torch.arange(1000.0)})
    tensors = open_tensors([path])
    held = tensors["w"]
    tensors["w"].fill_(-1)
    assert torch.equal(tensors["w"], torch.arange(1000.0))
    with path.open("r+b") as file:  # a mapped page would follow the file
        file.write(bytes(path.stat().st_size))
    assert torch.equal(held, torch.arange(1000.0))


@pytest.mark.parametrize("kind", ["safetensors", "zip"])
def test_opening_and_asking_for_names_reads_no_values(tmp_path, kind):
    path = write(tmp_path / "m", kind, {"w": torch.full((1000,), 0.3)})
    tensors = open_tensors([path])
    start = path.read_bytes().index(struct.pack("<f", 0.3) * 1000)
    with path.open("r+b") as file:
        file.seek(start)
        file.write(struct.pack("<1000f", *range(1000)))
    assert "w" in tensors
    assert torch.equal(tensors["w"], torch.arange(1000.0))


def test_views_and_shared_storage_come_out_whole(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    state = {"t": base.t(), "row": base[2], "tied": base, "also": base}
    torch.save(state, tmp_path / "m.pt")
    tensors = open_tensors([tmp_path / "m.pt"])
    assert_same(tensors, {name: tensor.contiguous() for name, tensor in state.items()})
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    assert tensors["row"].untyped_storage().nbytes() == 6 * 4


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_a_container_is_unwrapped(tmp_path, key):
    torch.save({key: {"w": torch.ones(2)}, "epoch": 3}, tmp_path / "m.bin")
    assert list(open_tensors([tmp_path / "m.bin"])) == ["w"]


def test_parameters_lose_their_gradient_and_other_values_are_left_out(tmp_path):
    torch.save({"w": torch.nn.Parameter(torch.ones(2)), "step": 3}, tmp_path / "m.bin")
    tensors = open_tensors([tmp_path / "m.bin"])
    assert list(tensors) == ["w"]
    assert not tensors["w"].requires_grad


def test_metadata_of_each_format(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors", metadata={"format": "pt"})
    state = OrderedDict(b=torch.ones(1))
    state._metadata = {"": {"version": 1}, "settings": {"bits": 4}}
    torch.save(state, tmp_path / "b.pt")
    merged = open_tensors([tmp_path / "a.safetensors", tmp_path / "b.pt"]).metadata
    assert merged == {"format": "pt", "": {"version": 1}, "settings": {"bits": 4}}
    save_file({"a": torch.ones(1)}, tmp_path / "plain.safetensors")
    assert open_tensors([tmp_path / "plain.safetensors"]).metadata == {}


def test_a_header_whose_length_looks_like_a_pickle(tmp_path):
    header = json.dumps({"w": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}).encode()
    header = header.ljust(0x80)
    (tmp_path / "m").write_bytes(struct.pack("<Q", len(header)) + header + b"\x05\x06")
    assert open_tensors([tmp_path / "m"])["w"].tolist() == [5, 6]


# Bad files -------------------------------------------------------------------------------------


def refused(paths, *words):
    with pytest.raises(UserError) as caught:
        open_tensors(paths)
    message = str(caught.value)
    assert "\n" not in message
    for word in (paths[-1].name, *words):
        assert word in message
    return message


def test_missing_empty_folder_and_pointer(tmp_path):
    refused([tmp_path / "absent.safetensors"], "cannot be read", "No such file")
    refused([tmp_path], "cannot be read", "directory")
    (tmp_path / "empty.bin").write_bytes(b"")
    refused([tmp_path / "empty.bin"], "is empty")
    (tmp_path / "lfs.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid")
    refused([tmp_path / "lfs.safetensors"], "git lfs pull")


def test_a_name_in_two_files(tmp_path):
    for name in ("1", "2"):
        save_file({"w": torch.ones(1)}, tmp_path / name)
    refused([tmp_path / "1", tmp_path / "2"], "'w'", str(tmp_path / "1"))


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
def test_cut_short_anywhere(tmp_path, kind):
    whole = write(tmp_path / "whole", kind, {"a": torch.ones(40), "b": torch.ones(3)}).read_bytes()
    cut = tmp_path / "cut.safetensors"
    step = max(1, len(whole) // 60)
    for length in [*range(1, 24), *range(24, len(whole), step), len(whole) - 1]:
        cut.write_bytes(whole[:length])
        refused([cut])


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
def test_flipped_bytes_never_escape_as_other_errors(tmp_path, kind):
    whole = write(tmp_path / "whole", kind, {"a": torch.ones(8), "b": torch.ones(3)}).read_bytes()
    bad = tmp_path / "bad"
    generator = torch.Generator().manual_seed(1)
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(3):
            at = int(torch.randint(len(data), (1,), generator=generator))
            data[at] = int(torch.randint(256, (1,), generator=generator))
        bad.write_bytes(data)
        try:  # a flip in the values is not to be found; whatever opens must also read
            for tensor in open_tensors([bad]).values():
                assert tensor.nbytes < 10_000
        except UserError as error:
            assert "\n" not in str(error)  # noqa: PT017


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("bomb-went-off",)


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("value", [Bomb(), argparse.Namespace(lr=1)], ids=["bomb", "class"])
def test_code_is_named_and_not_run(tmp_path, monkeypatch, new_format, value):
    monkeypatch.chdir(tmp_path)
    state = {"w": torch.ones(2), "x": value}
    torch.save(state, tmp_path / "m.pt", _use_new_zipfile_serialization=new_format)
    message = refused([tmp_path / "m.pt"], "holds code (", "not loaded", "safetensors")
    assert "mkdir" in message or "argparse.Namespace" in message
    assert "weights_only" not in message
    assert not (tmp_path / "bomb-went-off").exists()


def test_a_plain_pickle_with_code(tmp_path, monkeypatch, recwarn):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.pt").write_bytes(pickle.dumps({"w": Bomb()}))
    refused([tmp_path / "m.pt"], "not loaded", "safetensors")
    assert not (tmp_path / "bomb-went-off").exists()
    assert not recwarn.list


@pytest.mark.parametrize("content", [[torch.ones(1)], {"epoch": 3}, torch.ones(2)])
def test_no_state_dict(tmp_path, content):
    torch.save(content, tmp_path / "m.pt")
    refused([tmp_path / "m.pt"], "holds no tensors by name")


def test_names_that_are_not_text(tmp_path):
    torch.save({3: torch.ones(1)}, tmp_path / "m.pt")
    refused([tmp_path / "m.pt"], "tensor 3 has no name")


def test_an_expanded_tensor_cannot_fill_the_memory(tmp_path):
    torch.save({"w": torch.ones(1).expand(1 << 20, 1 << 20)}, tmp_path / "m.pt")
    refused([tmp_path / "m.pt"], "'w'", "more values than the file holds")


def test_sparse_tensors(tmp_path):
    torch.save({"w": torch.eye(3).to_sparse()}, tmp_path / "m.pt")
    refused([tmp_path / "m.pt"], "'w'", "sparse")


def test_archives_that_are_no_models(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    refused([tmp_path / "a.zip"], "not a PyTorch file")
    torch.save({"w": torch.zeros(100)}, plain := io.BytesIO())
    with (
        zipfile.ZipFile(plain) as source,
        zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for entry in source.namelist():
            target.writestr(entry, source.read(entry))
    refused([tmp_path / "b.pt"], "compressed")


def test_unknown_bytes_may_be_encrypted(tmp_path):
    (tmp_path / "m.bin").write_bytes(bytes(range(1, 200)))
    refused([tmp_path / "m.bin"], "encrypted", "BELLE")
    (tmp_path / "m.safetensors").write_bytes(bytes(range(1, 200)))
    refused([tmp_path / "m.safetensors"], "not a safetensors file")


def header(entries) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 1 << 62) + b"{}",
        header(b'{"w":'),
        header({"w": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 4]}}) + bytes(4),
        header({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4 << 40]}}) + bytes(4),
        header({"w": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}) + bytes(4),
        header({"w": {"dtype": "F32", "shape": [1 << 63, 0], "data_offsets": [0, 0]}}),
        header({"w": {"dtype": "F32", "shape": [1] * 2000, "data_offsets": [0, 4]}}) + bytes(4),
        header({"w": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}) + bytes(4),
        header({"w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}) + bytes(4),
        header({"w": {"dtype": "F32", "shape": [1 << 33] * 2, "data_offsets": [0, 4]}}) + bytes(4),
        # Two tensors on the same bytes, bytes that overlap, and bytes of no tensor.
        header({n: {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]} for n in "ab"}) + bytes(4),
        header(
            {
                "a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]},
                "b": {"dtype": "U8", "shape": [4], "data_offsets": [2, 6]},
            }
        )
        + bytes(6),
        header({"w": {"dtype": "U8", "shape": [4], "data_offsets": [2, 6]}}) + bytes(6),
        header(b'{"w":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
        header({"w": [1, 2]}),
        header({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}) + bytes(9),
    ],
)
def test_safetensors_headers_that_lie(tmp_path, content):
    (tmp_path / "m.safetensors").write_bytes(content)
    refused([tmp_path / "m.safetensors"])


def test_a_file_cut_while_it_is_read(tmp_path):
    path = write(tmp_path / "m", "safetensors", {"w": torch.ones(100)})
    tensors = open_tensors([path])
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match="became shorter"):
        tensors["w"]
