"""The emulation of CUDA itself: it catches what would be wrong on a GPU."""

import ctypes
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from helpers import emulated

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
    "a barrier in shared memory is never completed (bytes)": """
        DYNAMIC_SHARED(uint4, s); SHARED(barrier_t, b, [1]);
        if (threadIdx.x == 0) {
          barrier_start(b, 1); barrier_expect(b, 32); copy_bulk(s, y, 16, b);
        }
        __syncthreads(); barrier_wait(b, 0);""",
    "a bulk copy whose addresses or size are no multiples of 16": """
        DYNAMIC_SHARED(uint4, s); SHARED(barrier_t, b, [1]);
        if (threadIdx.x == 0) { barrier_start(b, 1); copy_bulk(s, y + 1, 16, b); }""",
    "a box whose place is no multiple of 1024": """
        DYNAMIC_SHARED(uint4, s); SHARED(barrier_t, b, [1]); tensor_map_t map;
        map_rows(&map, y, 2, 8, 8);
        if (threadIdx.x == 0) { barrier_start(b, 1); copy_box(s + 8, &map, 0, 0, b); }""",
    "threads of a block wait at two barriers (one of a cluster)": """
        if (threadIdx.x < 32) cluster_sync(); else __syncthreads();""",
    "shared memory of a thread block that has not started": """
        DYNAMIC_SHARED(float, s);
        if (blockIdx.z == 0) y[threadIdx.x] = cluster_shared(s, 1)[0];""",
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
    "no wait for a bulk copy": """
        DYNAMIC_SHARED(float, s); SHARED(barrier_t, b, [1]);
        s[threadIdx.x] = 1;
        __syncthreads();
        if (threadIdx.x == 0) {
          barrier_start(b, 1); barrier_expect(b, 256); copy_bulk(s, y, 256, b);
        }
        __syncthreads();
        if (blockIdx.z == 0) y[threadIdx.x] = s[threadIdx.x];""",
    "a thread block ends while its shared memory is read": """
        DYNAMIC_SHARED(float, s);
        s[threadIdx.x] = 1;
        cluster_sync();
        if (blockIdx.z == 1) return;
        for (int i = 0; i < 9; ++i) __syncthreads();
        y[threadIdx.x] = cluster_shared(s, 1)[threadIdx.x];""",
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
        f"  launch_cluster(trap{i}, dim3(1, 1, 2), 1, 64, 4096, nullptr, y);\n"
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
    assert message.partition(" (")[0] in run_trap(traps, list(TRAPS).index(message))[0]


@pytest.mark.parametrize("name", STALE)
def test_what_is_read_too_early_is_nan(traps, name):
    error, y = run_trap(traps, len(TRAPS) + list(STALE).index(name))
    assert error == ""
    assert np.isnan(y).any()


SANITIZED = """
import sys
from pathlib import Path
import torch
from helpers import emulated
from helpers.decoding import ROOM, Shape, run_and_compare
from helpers.products import activations, packed
from quant_cuda.cuda import layout
VARIANTS = [f"{tile}-splits2" for tile in ("bulk-16x128-stages4", "gemm_deep-16x128-stages4")]
kernels = emulated.emulated(Path(sys.argv[1]))
for bits in (2, 3, 4, 8):
    for n_in, n_out, group_size, g_idx in ((160, 5, 32, True), (576, 40, 128, False)):
        weight = layout.prepare(packed(bits, n_in, n_out, group_size, g_idx=g_idx)[0])
        for rows in (1, 8, 20, 70):
            kernels.matmul(activations(rows, n_in, dtype=torch.float16), weight, 2 * rows)
        if bits in (4, 8):
            x = activations(5, n_in, dtype=torch.float16)
            for kernel in ("wgmma", *VARIANTS):
                kernels.matmul(x, weight, 12, kernel=kernel)
        kernels.dequantize(weight, torch.bfloat16)
run_and_compare(kernels, Shape(heads=3, key_heads=1), rows=3, length=ROOM - 1, processors=30)
print("clean")
x = activations(1, 576, dtype=torch.float16)
short = layout.prepare(packed(4, 576, 40, 128)[0])
object.__setattr__(short, "words", short.words[:, :-1].clone())
kernels.matmul(x, short)
"""


def test_the_library_is_kept_until_its_source_changes(tmp_path, monkeypatch):
    folder = tmp_path / "csrc" / "cuda"
    folder.mkdir(parents=True)
    source, header = folder / "one.cu", folder.parent / "number.h"
    source.write_text('#include "../number.h"\nextern "C" int number() { return NUMBER; }\n')
    monkeypatch.setattr(emulated, "KERNELS", [source])
    monkeypatch.setattr(emulated, "CACHE", tmp_path / "cache")
    paths = []
    for number in (3, 3, 4):
        header.write_text(f"#define NUMBER {number}\n")
        paths.append(emulated.library())
        assert ctypes.CDLL(str(paths[-1])).number() == number
    assert paths[0] == paths[1] != paths[2]
    assert not paths[0].exists()


def test_no_access_outside_an_array(tmp_path):
    """Under AddressSanitizer, which must stop a product whose weight is a block short."""
    library = emulated.build(tmp_path, emulated.KERNELS, sanitize=True)
    done = subprocess.run(
        [sys.executable, "-c", SANITIZED, str(library)],
        env={
            **os.environ,
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
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
