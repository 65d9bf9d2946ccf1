"""The compiled CPU code under AddressSanitizer and UndefinedBehaviorSanitizer."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from quant_cuda.cpu import library

SANITIZED = """
import sys
from pathlib import Path
import torch
from quant_cuda.cpu import library
library.LIBRARY = Path(sys.argv[1])
sys.path.insert(0, "tests")
import quant_cuda, random
from helpers.products import packed, activations, assert_as_good_as_naive
from quant_cuda.cpu import half_matmul, layout
from quant_cuda.cpu.decoder_block import Block, run
from gptq.config import ORDERS, QuantConfig
from gptq.solver.hessian import Hessian
from gptq.solver.layer import solve_layer
random.seed(int(sys.argv[2]))
torch.set_num_threads(2)
for trial in range(60):
    bits = random.choice((2, 3, 4, 8))
    inputs = 32 * random.randint(1, 24)
    shape = inputs, random.randint(1, 90), random.choice((-1, 8, 24, 32, 64, 128, 600))
    scales = random.choice((torch.float16, torch.float32))
    weight, matrix = packed(bits, *shape, random.randint(0, 1), random.random() < 0.5, scales)
    prepared = quant_cuda.prepare(weight)
    assert torch.equal(quant_cuda.restore(prepared).qweight, weight.qweight)
    w = layout.dequantize(prepared)
    assert abs(w.double().numpy().T - matrix).max() < 1e-5 * abs(matrix).max()
    for name in library.instruction_sets():
        dtype = random.choice((torch.float32, torch.bfloat16, torch.float16))
        x = activations(random.choice((*range(1, 80), 200)), inputs, dtype=dtype)
        assert_as_good_as_naive(quant_cuda.matmul(x, prepared, name), x, matrix, name)
        quant_cuda.matmul(x, prepared, name, int8=True, bias=torch.ones(shape[1]))
    rows, outputs = random.randint(1, 40), random.randint(1, 90)
    inputs = random.randint(1, 100)
    its = torch.randn(outputs, inputs).to(random.choice((torch.float16, torch.bfloat16)))
    for name in library.instruction_sets():
        half_matmul.matmul(torch.randn(rows, inputs), its, library.compiled().index(name))
for trial in range(20):
    size, key_heads, shared = 8 * random.randint(1, 6), random.randint(1, 3), random.randint(1, 3)
    hidden, inner, length = 32 * random.randint(1, 5), 32 * random.randint(1, 5), trial * 3
    query, key = size * key_heads * shared, size * key_heads
    shapes = [(hidden, query), (hidden, key), (hidden, key), (query, hidden)]
    shapes += [(hidden, inner), (hidden, inner), (inner, hidden)]
    weights = [quant_cuda.prepare(packed(4, *shape, 32)[0]) for shape in shapes]
    biases = [random.choice((None, torch.randn(outputs))) for _, outputs in shapes]
    gains = [(torch.ones(hidden), 1e-6)] * 2 + [(torch.ones(size), 1e-6)] * random.choice((0, 2))
    block = Block(weights, biases, gains, size, size**-0.5, random.random() < 0.5)
    caches = torch.randn(2, 2, 1, key_heads, length + random.randint(1, 4), size)
    caches = [(*cache, length) for cache in caches]
    turn = torch.randn(2, 1, 1, size)
    for name in library.instruction_sets():
        index = library.compiled().index(name)
        y = run([block, block], torch.randn(1, 1, hidden), *turn, caches, index)
        assert y.isfinite().all()
built = library.instruction_sets()
for trial in range(40):
    inputs, outputs = random.randint(1, 300), random.randint(1, 90)
    x = torch.randn(400, inputs)
    config = QuantConfig(
        bits=random.choice((2, 3, 4, 8)),
        group_size=random.choice((-1, 8, 50, 128, 150)),
        sym=random.random() < 0.5,
        order=random.choice(ORDERS),
        static_groups=random.random() < 0.5,
    )
    for name in built:
        library.instruction_sets = lambda: (name,)
        hessian = Hessian(x.T @ x / 400)
        solution = solve_layer(torch.randn(outputs, inputs), hessian, config)
        assert solution.loss.isfinite().all()
print("clean")
"""


@pytest.mark.slow
def test_under_address_and_undefined_behaviour_sanitizers(tmp_path):
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    assert compiler, "needs a C++ compiler"
    folders = ["--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "objects")]
    flags = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -g -O1"
    subprocess.run(
        [sys.executable, "setup.py", "build_ext", *folders],
        cwd=ROOT,
        env={**os.environ, "CXXFLAGS": flags},
        check=True,
        capture_output=True,
    )
    asan, ubsan = (
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    )
    built = tmp_path / "lib" / "quant_cuda" / "cpu" / library.LIBRARY.name
    done = subprocess.run(
        [sys.executable, "-c", SANITIZED, str(built), "1"],
        cwd=ROOT,
        # Python itself keeps what it does not free.
        env={
            **os.environ,
            "LD_PRELOAD": f"{asan} {ubsan}",
            "ASAN_OPTIONS": "detect_leaks=0",
            "PYTHONPATH": str(ROOT),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "clean\n"
    assert Path(asan).is_absolute()
