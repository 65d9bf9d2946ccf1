"""The CUDA kernels against float64: their own source under the host's compiler, and on a GPU."""

import ctypes
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import emulated
from helpers.emulated import Kernels
from helpers.oracles import pack_columns
from test_matmul import activations, assert_as_good_as_naive, packed

from quant_cuda import PackedWeight
from quant_cuda.cuda import kernels as cuda
from quant_cuda.cuda import layout as tiles
from quant_cuda.reference import dequantize

BITS = (2, 3, 4, 8)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
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


@pytest.fixture(params=["emulated", "gpu"])
def kernels(request) -> Kernels:
    if request.param == "emulated":
        made = emulated.emulated(request.getfixturevalue("host_library"))
        made.settle(0, 0)
        return made
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU here")
    return emulated.on_gpu()


def ready(kernels: Kernels, weight: PackedWeight) -> tiles.Prepacked:
    g_idx = None if weight.g_idx is None else weight.g_idx.to(kernels.device)
    moved = {name: getattr(weight, name).to(kernels.device) for name in ("qweight", "qzeros")}
    scales = weight.scales.to(kernels.device)
    return tiles.prepack(dataclasses.replace(weight, **moved, scales=scales, g_idx=g_idx))


def check(kernels: Kernels, x: torch.Tensor, weight: PackedWeight, matrix, processors=4) -> None:
    y = kernels.matmul(x.to(kernels.device), ready(kernels, weight), processors)
    assert_as_good_as_naive(y.cpu(), x, matrix)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n_in", "n_out", "group_size"), SHAPES)
def test_against_float64(kernels, bits, dtype, n_in, n_out, group_size):
    weight, matrix = packed(bits, n_in, n_out, group_size)
    for rows in (1, 2, 8, 13, 29, 50, 70):
        check(kernels, activations(rows, n_in, dtype=dtype), weight, matrix)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("zero_offset", [0, 1])
@pytest.mark.parametrize("g_idx", [False, True])
def test_conventions(kernels, bits, zero_offset, g_idx):
    weight, matrix = packed(bits, 192, 37, 64, zero_offset, g_idx)
    for rows in (3, 12):
        check(kernels, activations(rows, 192, dtype=torch.float16), weight, matrix)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_every_integer_at_every_zero_point(kernels, bits, dtype):
    """Weights are exact in the kernels' arithmetic: unit rows of x give back each of them."""
    levels = 2**bits
    q = np.random.default_rng(bits).permutation(np.arange(512) % levels)
    n_in = len(q)
    # A v1 field of all ones is 2**bits.
    zeros = np.unique(np.linspace(1, levels, 16).astype(int))
    n_out = len(zeros)
    weight = PackedWeight(
        qweight=_pack(np.tile(q[:, None], n_out), bits),
        qzeros=_pack(zeros[None].T - 1, bits).T.contiguous(),
        scales=torch.ones(1, n_out, dtype=torch.float16),
        g_idx=None,
        bits=bits,
        group_size=-1,
        in_features=n_in,
    )
    prepacked = ready(kernels, weight)
    expected = torch.from_numpy((q[:, None] - zeros[None]).astype(np.float64))
    eye = torch.eye(n_in, dtype=dtype)
    for start in range(0, n_in, 8):
        rows = slice(start, start + 8)
        y = kernels.matmul(eye[rows].to(kernels.device), prepacked)
        assert torch.equal(y.cpu().double(), expected[rows])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("g_idx", [False, True])
def test_dequantize(kernels, bits, g_idx):
    for n_in, n_out, group_size in ((160, 37, 32), (256, 18, 64), (200, 33, 40), (96, 8, -1)):
        if (n_in * bits) % 32:
            continue
        weight, matrix = packed(bits, n_in, n_out, group_size, g_idx=g_idx and group_size > 0)
        for dtype in DTYPES:
            got = kernels.dequantize(ready(kernels, weight), dtype)
            assert torch.equal(got.cpu(), torch.from_numpy(matrix).to(dtype))
            assert torch.equal(got.cpu(), dequantize(weight, dtype))


@pytest.mark.parametrize("bits", BITS)
def test_inputs_split_over_thread_blocks(kernels, bits):
    """From no split to as many as there are steps; the same call gives the same bits."""
    weight, matrix = packed(bits, 2560, 40, 128)
    prepacked = ready(kernels, weight)
    for rows in (7, 21):
        x = activations(rows, 2560, dtype=torch.float16)
        for processors in (1, 2, 3, 100):
            y = kernels.matmul(x.to(kernels.device), prepacked, processors)
            assert_as_good_as_naive(y.cpu(), x, matrix)
            assert torch.equal(y, kernels.matmul(x.to(kernels.device), prepacked, processors))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rows", [3, 20])
def test_order_of_threads_changes_nothing(kernels, bits, rows):
    """A missing barrier would show, as would an asynchronous copy nobody waited for."""
    weight, _ = packed(bits, 640, 40, 64)
    x = activations(rows, 640, dtype=torch.bfloat16).to(kernels.device)
    prepacked = ready(kernels, weight)
    first = kernels.matmul(x, prepacked)
    for order in (0, 1, 2, 3, 4):
        for eager in (0, 1):
            kernels.settle(order, eager)
            assert torch.equal(kernels.matmul(x, prepacked), first)


@pytest.mark.parametrize("bits", BITS)
def test_shapes_and_strides_of_x(kernels, bits):
    weight, matrix = packed(bits, 96, 24, 32)
    for shape in ((96,), (2, 96), (2, 3, 96), (0, 96), (2, 0, 96)):
        x = activations(*shape, dtype=torch.float16)
        check(kernels, x, weight, matrix)
    half = torch.float16
    columns = activations(96, 5, dtype=half).T
    every_other = activations(5, 192, dtype=half)[:, ::2]
    misaligned = activations(5 * 96 + 1, dtype=half)[1:].view(5, 96)
    for x in (columns, every_other, misaligned, activations(1, 96, dtype=half).expand(5, 96)):
        y = kernels.matmul(x.to(kernels.device), ready(kernels, weight))
        assert_as_good_as_naive(y.cpu(), x, matrix)


@pytest.mark.parametrize("bits", BITS)
def test_bias(kernels, bits):
    """It joins the sum before the one rounding, whichever kernel ends it."""
    weight, matrix = packed(bits, 1280, 40, 64)
    bias = 100 * torch.arange(40, dtype=torch.float16)
    with_bias = np.vstack([matrix, bias.double().numpy()])
    for rows in (3, 20, 300):
        x = activations(rows, 1280, dtype=torch.float16)
        for processors in (1, 100):
            prepacked = ready(kernels, weight)
            there = (t.to(kernels.device) for t in (x, bias))
            y = kernels.matmul(next(there), prepacked, processors, next(there))
            ones = torch.ones(rows, 1, dtype=torch.float16)
            assert_as_good_as_naive(y.cpu(), torch.cat([x, ones], 1), with_bias)


def test_inputs_of_four_more_than_a_multiple_of_eight(kernels):
    weight, matrix = packed(8, 100, 24, 32)
    for rows in (1, 9):
        check(kernels, activations(rows, 100, dtype=torch.float16), weight, matrix)


def test_errors(kernels):
    prepacked = ready(kernels, packed(4)[0])
    with pytest.raises(ValueError, match=r"^x of shape \(2, 95\) does not fit .* 96 inputs$"):
        kernels.matmul(torch.ones(2, 95, dtype=torch.float16), prepacked)
    with pytest.raises(TypeError, match=r"^x must be float16[^\n]*float64$"):
        kernels.matmul(torch.ones(2, 96, dtype=torch.float64), prepacked)
    with pytest.raises(RuntimeError, match=r"^gemv failed: invalid argument$"):
        cuda.Launch(kernels.library, 0, 1)("gemv", 5, 0, *[None] * 6, *[0] * 6)


def test_a_tensor_that_is_not_on_a_gpu():
    prepacked = tiles.prepack(packed(4)[0])
    with pytest.raises(ValueError, match="both must be a GPU's"):
        cuda.matmul(torch.ones(1, 96), prepacked)


def _pack(values: np.ndarray, bits: int) -> torch.Tensor:
    return torch.from_numpy(pack_columns(values, bits))


# --- the layout ---


@pytest.fixture(scope="module")
def layout(tmp_path_factory) -> ctypes.CDLL:
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
def test_stream_values(layout, bits):
    """Every value at every position of a period, and of the next."""
    levels, count = 2**bits, 64
    positions = np.arange(count)
    for start in range(levels):
        column = (start + positions) % levels
        words = pack_columns(np.stack([column, column[::-1]], 1), bits)
        pointer = words.ctypes.data_as(ctypes.c_void_p)
        got = [layout.value(bits, pointer, ctypes.c_long(2), int(k)) for k in positions]
        assert got == column.tolist()


@pytest.mark.parametrize("bits", [4, 8])
def test_tiles_are_where_the_layout_says(layout, bits):
    """Every input of two blocks in every column of three tiles."""
    rng = np.random.default_rng(bits)
    n_in, n_out = 2 * 512 // bits - 32, 40
    q = rng.integers(0, 2**bits, (n_in, n_out))
    weight, _ = packed(bits, n_in, n_out, -1)
    weight = dataclasses.replace(weight, qweight=_pack(q, bits))
    tiled = tiles.prepack(weight)
    words = tiled.words.flatten().tolist()
    shift = ctypes.c_int()
    seen = set()
    for i in range(n_in):
        for c in range(n_out):
            at = layout.place(bits, i, c, tiled.words.shape[1], ctypes.byref(shift))
            assert words[at] >> shift.value & (2**bits - 1) == q[i, c]
            seen.add((at, shift.value))
    assert len(seen) == n_in * n_out  # no two of them in one place


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("zero_offset", [0, 1])
@pytest.mark.parametrize("scales", [torch.float16, torch.float32])
@pytest.mark.parametrize(("n_in", "n_out", "group_size"), SHAPES)
def test_prepacking_can_be_undone(bits, zero_offset, scales, n_in, n_out, group_size):
    for g_idx in (False, True):
        shuffled = g_idx and 0 < group_size < n_in
        weight, _ = packed(bits, n_in, n_out, group_size, zero_offset, shuffled, scales)
        back = tiles.unprepack(tiles.prepack(weight))
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
        return type(tiles.prepack(weight))

    assert kind() is kind(8) is kind(group_size=32) is kind(group_size=-1) is tiles.Tiled
    assert kind(2) is kind(3) is kind(group_size=48) is tiles.Plain
    uneven = torch.zeros(192, dtype=torch.int32)
    assert kind(g_idx=uneven) is tiles.Plain
    third = torch.full((3, 16), 1 / 3)
    assert kind(scales=third) is tiles.Plain
    assert kind(scales=third.half().float()) is tiles.Tiled


# --- the emulation itself ---

TRAPS = {
    "a barrier was reached by only some threads": "if (threadIdx.x < 32) __syncthreads();",
    "threads of a block wait at two barriers": """
        if (threadIdx.x < 32)
          __syncthreads();
        else
          __syncthreads();""",
    "a warp-wide operation was reached by only some lanes": """
        if (threadIdx.x != 3) y[0] = __shfl_xor_sync(~0u, 1.0f, 1);""",
    "lanes of a warp met in": """
        if (threadIdx.x % 2) __syncwarp(); else y[0] = __shfl_xor_sync(~0u, 1.0f, 1);""",
    "a barrier in shared memory is never completed": """
        SHARED(barrier_t, b, [1]);
        if (threadIdx.x == 0) barrier_start(b, 65);
        __syncthreads(); barrier_arrive(b); barrier_wait(b, 0);""",
    "a product without a fence": """
        float d[64]; const uint32_t a[4] = {};
        wgmma(d, a, 0, 0, half_t()); wgmma_commit(); wgmma_wait<0>();""",
    "sums are read before all products are done": """
        float d[64]; const uint32_t a[4] = {};
        wgmma_fence(); wgmma(d, a, 0, 0, half_t()); wgmma_commit(); wgmma_settle(d);""",
}
STALE = {
    "no barrier between writing and reading": """
        SHARED(float, s, [64]);
        s[threadIdx.x] = 1; y[threadIdx.x] = s[63 - threadIdx.x];""",
    "no wait for a copy": """
        SHARED(uint4, s, [64]);
        copy_async(&s[threadIdx.x], y + 4 * (threadIdx.x % 16), true); copy_commit();
        __syncthreads();
        y[threadIdx.x] = reinterpret_cast<float*>(s)[threadIdx.x];""",
    "no fence after stores of matrices": """
        SHARED(uint4, s, [64]);
        store_matrices(&s[threadIdx.x], uint4{0, 0, 0, 0});
        __syncthreads();
        y[threadIdx.x] = reinterpret_cast<float*>(s)[threadIdx.x];""",
}


@pytest.fixture(scope="module")
def traps(tmp_path_factory) -> ctypes.CDLL:
    """A kernel of two warps for each of TRAPS and STALE, in this order."""
    folder = tmp_path_factory.mktemp("traps")
    source = folder / "traps.cu"
    bodies = enumerate([*TRAPS.values(), *STALE.values()])
    kernels = "".join(
        f"__global__ void trap{i}(float* y) {{ (void)y; {body} }}\n"
        f"EXPORT const char* run{i}(float* y) {{\n"
        f"  LAUNCH(trap{i}, 1, 64, 4096, nullptr, y);\n"
        '  const int code = cudaGetLastError(); return code ? cudaGetErrorString(code) : "";\n}\n'
        for i, body in bodies
    )
    source.write_text(f'#include "common.cuh"\n{kernels}')
    return ctypes.CDLL(str(emulated.build(folder, [source])))


def run_trap(traps: ctypes.CDLL, index: int) -> tuple[str, np.ndarray]:
    """What a trap did: an error in words, and its array of ones."""
    run = getattr(traps, f"run{index}")
    run.restype = ctypes.c_char_p
    y = np.ones(64 + 4, dtype=np.float32)
    y = y[(-y.ctypes.data // 4) % 4 :][:64]
    return run(y.ctypes.data_as(ctypes.c_void_p)).decode(), y


@pytest.mark.parametrize("message", TRAPS)
def test_threads_that_part_are_caught(traps, message):
    assert message in run_trap(traps, list(TRAPS).index(message))[0]


@pytest.mark.parametrize("name", STALE)
def test_what_is_read_too_early_is_nan(traps, name):
    error, y = run_trap(traps, len(TRAPS) + list(STALE).index(name))
    assert error == ""
    assert np.isnan(y).any()


SANITIZED = """
import sys
from pathlib import Path
import torch, emulated
from quant_cuda import tiles
from test_matmul import activations, packed
kernels = emulated.emulated(Path(sys.argv[1]))
for bits in (2, 3, 4, 8):
    for n_in, n_out, group_size, g_idx in ((160, 5, 32, True), (576, 40, 128, False)):
        weight = tiles.prepack(packed(bits, n_in, n_out, group_size, g_idx=g_idx)[0])
        for rows in (1, 8, 20, 70):
            kernels.matmul(activations(rows, n_in, dtype=torch.float16), weight, 2 * rows)
        if bits in (4, 8):
            x = activations(5, n_in, dtype=torch.float16)
            kernels.matmul(x, weight, 12, kernel="wgmma")
        kernels.dequantize(weight, torch.bfloat16)
print("clean")
x = activations(1, 576, dtype=torch.float16)
short = tiles.prepack(packed(4, 576, 40, 128)[0])
object.__setattr__(short, "words", short.words[:, :-1].clone())
kernels.matmul(x, short)
"""


def test_no_access_outside_an_array(tmp_path):
    """Under AddressSanitizer, which must stop a product whose weight is a block short."""
    library = emulated.build(tmp_path, emulated.KERNELS, sanitize=True)
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", SANITIZED, str(library)],
        env={
            **os.environ,
            "PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}",
            "LD_PRELOAD": emulated.sanitizer(),
            "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "clean\n", done.stderr[-2000:]
    assert "heap-buffer-overflow" in done.stderr
