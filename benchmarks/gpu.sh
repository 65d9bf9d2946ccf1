#!/usr/bin/env bash
# What this package does on the GPU of this machine: builds the kernels, tests them on the device,
# runs compute-sanitizer over a few products, and times kernels, decoding and quantization, and
# GPTQModel's Marlin kernel where that is installed.
# Prints tables and writes benchmarks/results/<gpu>.json. Eight minutes at most: each step has a
# limit of its own, and none goes past the whole's.
#
# Needs nvcc (in PATH or CUDA_HOME) and a Python that has torch with CUDA and this package's
# requirements; the package itself need not be installed.
#
# PYTHON=python3.12   the interpreter to use
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
export PYTHONPATH=.
[ -z "${CUDA_HOME:-}" ] && command -v nvcc > /dev/null || export CUDA_HOME=${CUDA_HOME:-/usr/local/cuda}
LIMIT=470

# step SECONDS COMMAND...: within its own limit and what is left of the whole
step() {
  local own=$1 left=$((LIMIT - SECONDS))
  shift
  [ "$left" -gt 0 ] || { echo "out of time: $*"; return 124; }
  timeout $((own < left ? own : left)) "$@"
}

$PYTHON -c "import torch; assert torch.cuda.is_available()" 2> /dev/null ||
  { echo "error: torch finds no GPU here; run this where there is one"; exit 2; }

echo "building"
CUDA_TARGETS=$($PYTHON -c "import torch; print('sm_%d%d' % torch.cuda.get_device_capability())")
export CUDA_TARGETS
step 150 $PYTHON setup.py --quiet build_ext --inplace ||
  { echo "error: the build failed, or took more than 150 seconds"; exit 2; }
test -e quant_cuda/cuda/_cuda.so || { echo "error: the CUDA kernels were not built"; exit 2; }

status=0
echo "tests on the device"
step 90 $PYTHON -m pytest -q -k "on_a_gpu or [gpu or -cuda]" \
  tests/quant_cuda/test_cuda_kernels.py tests/quant_cuda/test_cuda_wgmma.py \
  tests/quant_cuda/test_cuda_sweep.py tests/quant_cuda/test_cuda_refine.py \
  tests/quant_cuda/test_cuda_operator.py tests/quant_cuda/test_cuda_triton.py \
  tests/solver/test_hessian.py tests/inference/test_cuda_graph.py \
  tests/blockwise/test_activation_cache.py || { echo "FAILED: tests on the device"; status=1; }

for tool in memcheck racecheck; do
  echo "compute-sanitizer $tool"
  if command -v compute-sanitizer > /dev/null; then
    step 40 compute-sanitizer --tool "$tool" --error-exitcode 1 \
      $PYTHON -m benchmarks.gpu check cuda || { echo "FAILED: $tool"; status=1; }
  else
    echo "compute-sanitizer is not here: not run"
  fi
done

step 300 $PYTHON -m benchmarks.gpu measure || { echo "FAILED: measure"; status=1; }
# Last, since GPTQModel may compile it first.
step 120 $PYTHON -m benchmarks.gpu marlin || echo "Marlin was not timed"
exit $status
