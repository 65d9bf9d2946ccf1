#!/usr/bin/env bash
# What this package does on the GPU of this machine: builds the kernels, tests them on the device,
# runs compute-sanitizer over a few products, and times kernels, decoding and quantization.
# Prints a table and writes benchmarks/results/<gpu>.json. Eight minutes at most.
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

$PYTHON -c "import torch; assert torch.cuda.is_available()" 2> /dev/null ||
  { echo "error: torch finds no GPU here; run this where there is one"; exit 2; }

echo "building"
CUDA_TARGETS=$($PYTHON -c "import torch; print('sm_%d%d' % torch.cuda.get_device_capability())")
export CUDA_TARGETS
timeout 150 $PYTHON setup.py --quiet build_ext --inplace
test -e quant_cuda/_cuda.so || { echo "error: the CUDA kernels were not built"; exit 2; }

status=0
echo "tests on the device"
timeout 120 $PYTHON -m pytest -q -k "gpu or cuda" tests/test_cuda.py tests/test_gpu.py \
  tests/test_triton.py tests/test_decode.py || { echo "FAILED: tests on the device"; status=1; }

for tool in memcheck racecheck; do
  echo "compute-sanitizer $tool"
  if command -v compute-sanitizer > /dev/null; then
    timeout 60 compute-sanitizer --tool "$tool" --error-exitcode 1 \
      $PYTHON -m benchmarks.gpu check || { echo "FAILED: $tool"; status=1; }
  else
    echo "compute-sanitizer is not here: not run"
  fi
done

timeout 240 $PYTHON -m benchmarks.gpu measure || { echo "FAILED: measure"; status=1; }
exit $status
