"""The GPU kernels' layout: csrc/layout.h agrees with it, and it can be undone."""

import ctypes
import dataclasses

import numpy as np
import pytest
import torch
from helpers import emulated
from helpers.oracles import pack_columns
from helpers.products import packed

from quant_cuda.cuda.layout import Plain, Tiled, prepare, restore

BITS = (2, 3, 4, 8)
SHAPES = [
    (256, 64, 128),  # whole blocks, whole tiles
    (576, 48, 128),  # a short last group
    (160, 5, 32),  # groups smaller than a block, few outputs
    (416, 40, -1),  # one group, a part of a block
    (288, 33, 96),  # groups of no power of two
    (32, 1, 128),  # one output, a group larger than the layer
    (192, 40, 40),  # groups that only the plain kernels take
    (1184, 70, 64),
]


@pytest.fixture(scope="module")
def header(tmp_path_factory) -> ctypes.CDLL:
    """csrc/layout.h by itself, behind C functions."""
    folder = tmp_path_factory.mktemp("layout")
    cases = "".join(
        f"if (bits == {b}) {{ const auto p = layout::place<{b}>(i, c, n); *shift = p.shift; "
        f"return p.word; }}\n"
        for b in (4, 8)
    )
    streams = "".join(
        f"if (bits == {b}) return layout::stream_value<{b}>(w, stride, k);\n" for b in BITS
    )
    source = folder / "layout.cu"
    source.write_text(
        '#include "../layout.h"\n'
        'extern "C" long place(int bits, int i, int c, int n, int* shift) {\n'
        f"{cases} return -1; }}\n"
        'extern "C" int value(int bits, const uint32_t* w, long stride, int k) {\n'
        f"{streams} return -1; }}\n"
    )
    library = ctypes.CDLL(str(emulated.build(folder, [source])))
    library.place.restype = ctypes.c_long
    return library


@pytest.mark.parametrize("bits", BITS)
def test_stream_values(header, bits):
    """Every value at every position of a period, and of the next."""
    levels, count = 2**bits, 64
    positions = np.arange(count)
    for start in range(levels):
        column = (start + positions) % levels
        words = pack_columns(np.stack([column, column[::-1]], 1), bits)
        pointer = words.ctypes.data_as(ctypes.c_void_p)
        got = [header.value(bits, pointer, ctypes.c_long(2), int(k)) for k in positions]
        assert got == column.tolist()


@pytest.mark.parametrize("bits", [4, 8])
def test_tiles_are_where_the_layout_says(header, bits):
    """Every input of two blocks in every column of three tiles."""
    rng = np.random.default_rng(bits)
    n_in, n_out = 2 * 512 // bits - 32, 40
    q = rng.integers(0, 2**bits, (n_in, n_out))
    weight, _ = packed(bits, n_in, n_out, -1)
    weight = dataclasses.replace(weight, qweight=torch.from_numpy(pack_columns(q, bits)))
    tiled = prepare(weight)
    words = tiled.words.flatten().tolist()
    shift = ctypes.c_int()
    seen = set()
    for i in range(n_in):
        for c in range(n_out):
            at = header.place(bits, i, c, tiled.words.shape[1], ctypes.byref(shift))
            assert words[at] >> shift.value & (2**bits - 1) == q[i, c]
            seen.add((at, shift.value))
    assert len(seen) == n_in * n_out  # no two of them in one place


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("zero_offset", [0, 1])
@pytest.mark.parametrize("scales", [torch.float16, torch.float32])
@pytest.mark.parametrize(("n_in", "n_out", "group_size"), SHAPES)
def test_restoring_undoes_preparing(bits, zero_offset, scales, n_in, n_out, group_size):
    for g_idx in (False, True):
        shuffled = g_idx and 0 < group_size < n_in
        weight, _ = packed(bits, n_in, n_out, group_size, zero_offset, shuffled, scales)
        back = restore(prepare(weight))
        assert back.scales.dtype == scales
        for field in dataclasses.fields(weight):
            before, after = getattr(weight, field.name), getattr(back, field.name)
            if isinstance(before, torch.Tensor):
                assert torch.equal(before, after), field.name
            else:
                assert before == after, field.name


def test_what_is_tiled():
    def kind(bits=4, group_size=64, **changes):
        weight = dataclasses.replace(packed(bits, 192, 16, group_size)[0], **changes)
        return type(prepare(weight))

    assert kind() is kind(8) is kind(group_size=32) is kind(group_size=-1) is Tiled
    assert kind(2) is kind(3) is kind(group_size=48) is Plain
    uneven = torch.zeros(192, dtype=torch.int32)
    assert kind(g_idx=uneven) is Plain
    third = torch.full((3, 16), 1 / 3)
    assert kind(scales=third) is Plain
    assert kind(scales=third.half().float()) is Tiled
