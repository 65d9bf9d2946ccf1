#!/usr/bin/env bash
# What this package does on the GPU of this machine, in parts of at most nine minutes each:
#
#   build         builds the kernels for this GPU and runs the tests that need one
#   sanitize      compute-sanitizer's memcheck, racecheck and synccheck over every kernel and variant
#   tune          times every variant and writes quant_cuda/cuda/tuned/<gpu>.json
#   kernels       times the kernels, beside torch's float16 and 4-bit products
#   peers         times those of GPTQModel (Marlin), humming-kernels and gemlite, where they are installed
#   decode        times decoding
#   quantization  times the quantization of a layer, of two blocks and of a whole model
#   tuning        times the training after it, of a whole model
#
#   benchmarks/gpu.sh tune kernels      these; all of them, in this order, if none is named
#
# The last five write benchmarks/results/<gpu>.json, and python -m benchmarks.gpu_report puts that into
# docs/cuda.md. Tuning before timing, because a table changes what is chosen.
#
# Needs nvcc (in PATH or CUDA_HOME) and a Python that has torch with CUDA and this package's
# requirements; the package itself need not be installed.
#
# PYTHON=python3.12   the interpreter to use
# OUT=folder          a folder that gets a copy of both files after each part
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
export PYTHONPATH=.
[ -z "${CUDA_HOME:-}" ] && command -v nvcc > /dev/null || export CUDA_HOME=${CUDA_HOME:-/usr/local/cuda}
PARTS="build sanitize tune kernels peers decode quantization tuning"
LIMIT=530

for part in "$@"; do
  [[ " $PARTS " == *" $part "* ]] || { echo "error: no part $part; name some of: $PARTS"; exit 2; }
done

$PYTHON -c "import torch; assert torch.cuda.is_available()" 2> /dev/null ||
  { echo "error: torch finds no GPU here; run this where there is one"; exit 2; }

# step SECONDS COMMAND...: within its own limit and what is left of the part's
step() {
  local own=$1 left=$((LIMIT - SECONDS))
  shift
  [ "$left" -gt 0 ] || { echo "out of time: $*"; return 124; }
  timeout $((own < left ? own : left)) "$@"
}

build() {
  CUDA_TARGETS=$($PYTHON -c "import torch; print('sm_%d%d' % torch.cuda.get_device_capability())")
  export CUDA_TARGETS
  step 300 $PYTHON setup.py --quiet build_ext --inplace ||
    { echo "error: the build failed, or took more than 300 seconds"; exit 2; }
  test -e quant_cuda/cuda/_cuda.so || { echo "error: the CUDA kernels were not built"; exit 2; }
  step 200 $PYTHON -m pytest -q -k "on_a_gpu or [gpu or -cuda]" \
    tests/quant_cuda/test_cuda_kernels.py tests/quant_cuda/test_cuda_wgmma.py \
    tests/quant_cuda/test_cuda_bulk.py tests/quant_cuda/test_cuda_variants.py \
    tests/quant_cuda/test_cuda_sweep.py tests/quant_cuda/test_cuda_refine.py \
    tests/quant_cuda/test_cuda_operator.py tests/quant_cuda/test_cuda_triton.py \
    tests/quant_cuda/test_cuda_decoder_block.py tests/inference/test_gpu_decode.py \
    tests/solver/test_hessian.py tests/inference/test_cuda_graph.py \
    tests/blockwise/test_activation_cache.py || return 1
}

sanitize() {
  local failed=0 tool checked
  command -v compute-sanitizer > /dev/null || { echo "compute-sanitizer is not here: not run"; return 0; }
  for tool in memcheck racecheck synccheck; do
    for checked in cuda variants decode; do
      echo "compute-sanitizer $tool, $checked"
      step 90 compute-sanitizer --tool "$tool" --error-exitcode 1 \
        $PYTHON -m benchmarks.gpu check "$checked" || { echo "FAILED: $tool, $checked"; failed=1; }
    done
  done
  return $failed
}

tune() { step 520 $PYTHON -m benchmarks.gpu tune; }

kernels() { step 520 $PYTHON -m benchmarks.gpu measure kernels; }

# Each compiles its kernels first, which may take its whole time.
peers() {
  local peer
  for peer in humming gemlite marlin; do
    step 175 $PYTHON -m benchmarks.gpu peers $peer || echo "$peer was not timed to its end"
  done
}

decode() { step 520 $PYTHON -m benchmarks.gpu measure decode; }

quantization() { step 520 $PYTHON -m benchmarks.gpu measure solving blocks quantization; }

tuning() { step 520 $PYTHON -m benchmarks.gpu measure tuning; }

status=0
for part in ${*:-$PARTS}; do
  echo "== $part"
  SECONDS=0
  "$part" || { echo "FAILED: $part"; status=1; }
  if [ -n "${OUT:-}" ]; then
    mkdir -p "$OUT"
    cp -p benchmarks/results/nvidia-*.json "$OUT"/ 2> /dev/null || true
    mkdir -p "$OUT/tuned" && cp -p quant_cuda/cuda/tuned/*.json "$OUT/tuned"/ 2> /dev/null || true
  fi
done
exit $status
