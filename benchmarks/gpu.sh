#!/usr/bin/env bash
# What this package does on the GPU of this machine, in parts:
#
#   build         builds the kernels for this GPU, if they are not there
#   tests         runs the tests that need one
#   memcheck      compute-sanitizer's memcheck over small calls of every kernel and variant
#   tune          times every variant and writes quant_cuda/cuda/tuned/<gpu>.json
#   kernels       times the kernels, beside torch's float16 and 4-bit products
#   decode        times decoding
#   racecheck     as memcheck
#   synccheck     as memcheck
#   quantization  times the quantization of a layer, of four blocks and of a whole model
#   peers         times GPTQModel (Marlin), humming-kernels and gemlite, where they are installed
#   tuning        times the training after it, of a whole model
#
#   benchmarks/gpu.sh tune kernels      these; all of them, in this order, if none is named
#   benchmarks/gpu.sh sanitize          memcheck, racecheck and synccheck
#
# Those that time write benchmarks/results/<gpu>.json, and python -m benchmarks.gpu_report puts that
# into the pages. Tuning before timing, because a table changes what is chosen. A part ends at its own
# limit, or where TOTAL ends, and keeps what it has measured.
#
# Needs nvcc (in PATH or CUDA_HOME) and a Python that has torch with CUDA and this package's
# requirements; the package itself need not be installed.
#
# PYTHON=python3.12   the interpreter to use
# PYTHONPATH=folder   where it finds further packages, of which peers are made
# OUT=folder          a folder that gets a copy of both files after each part, and a log; from the
#                     checkout, if it is no absolute path
# TOTAL=540           seconds that all parts together may take
# COMMIT=abc1234      what is measured, for a copy of the tree without .git
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
# A copy of all that is printed; whoever reads it has all of it when this script ends.
[ -z "${OUT:-}" ] || {
  mkdir -p "$OUT"
  exec > >(tee -a "$OUT/log") 2>&1
  tee=$!
  # No longer than some seconds: a process that hangs in the GPU's driver may keep the pipe open.
  trap 'exec > /dev/null 2>&1; timeout 5 tail -s 0.1 --pid "$tee" -f /dev/null || true' EXIT
}
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH}
[ -z "${CUDA_HOME:-}" ] && command -v nvcc > /dev/null || export CUDA_HOME=${CUDA_HOME:-/usr/local/cuda}

# Seconds that each part may take.
declare -A LIMITS=(
  [build]=240 [tests]=150 [memcheck]=150 [tune]=330 [kernels]=150 [decode]=180 [racecheck]=180
  [synccheck]=120 [quantization]=330 [peers]=300 [tuning]=240
)
PARTS="build tests memcheck tune kernels decode racecheck synccheck quantization peers tuning"
SANITIZE="memcheck racecheck synccheck"

wanted=()
for part in "$@"; do
  if [ "$part" = sanitize ]; then
    # shellcheck disable=SC2206
    wanted+=($SANITIZE)
  else
    [[ " $PARTS " == *" $part "* ]] ||
      { echo "error: no part $part; name some of: $PARTS sanitize"; exit 2; }
    wanted+=("$part")
  fi
done
# shellcheck disable=SC2206
[ $# -gt 0 ] || wanted=($PARTS)

$PYTHON -c "import torch; assert torch.cuda.is_available()" 2> /dev/null ||
  { echo "error: torch finds no GPU here; run this where there is one"; exit 2; }

# step SECONDS COMMAND...: within its own limit, what is left of the part's, and what is of TOTAL;
# SIGNAL ends it
step() {
  local seconds=$1 left=$((LIMITS[$part] - (SECONDS - begun)))
  shift
  [ "$seconds" -lt "$left" ] || seconds=$left
  [ -z "${TOTAL:-}" ] || [ "$seconds" -lt $((TOTAL - SECONDS)) ] || seconds=$((TOTAL - SECONDS))
  [ "$seconds" -gt 0 ] || { echo "out of time: $*"; return 124; }
  # A process that waits for the GPU may not answer the first signal.
  timeout --signal "${SIGNAL:-TERM}" --kill-after 10 "$seconds" "$@"
}

# Where there are no objects setup.py would compile all again, also beside a library that is right.
build() {
  if step 60 $PYTHON -m benchmarks.gpu_built; then
    echo "quant_cuda/cuda/_cuda.so is of these sources and runs here"
    return
  fi
  CUDA_TARGETS=$($PYTHON -c "import torch; print('sm_%d%d' % torch.cuda.get_device_capability())")
  export CUDA_TARGETS
  step "${LIMITS[build]}" $PYTHON setup.py --quiet build_ext --inplace ||
    { echo "error: the build failed, or took more than ${LIMITS[build]} seconds"; exit 2; }
  test -e quant_cuda/cuda/_cuda.so || { echo "error: the CUDA kernels were not built"; exit 2; }
}

has() { $PYTHON -c "import $1" 2> /dev/null; }

# In several processes, and so that one that hangs ends and is named, where pytest can do that: a
# thread has to end it, because the main one waits for the GPU in code that takes no signal.
tests() {
  local options=() files
  if has xdist; then options+=(-n 8); fi
  if has pytest_timeout; then options+=(--timeout=60 --timeout-method=thread); fi
  mapfile -t files < <(grep -rlE "$NEEDS_GPU" --include="test_*.py" tests | sort)
  # At the limit pytest is interrupted as by a keyboard: it then tells what has failed so far.
  SIGNAL=INT step "${LIMITS[tests]}" \
    $PYTHON -m pytest -rfEs -m "$GPU_TESTS" "${options[@]}" "${files[@]}"
}
# Of the files that may have such tests (marked, or by the fixture) those that are marked.
NEEDS_GPU='mark\.gpu|def .*[(, ]kernels[,)]'
GPU_TESTS="gpu and not slow and not peers and not extras"

# under_sanitizer TOOL OPTIONS FAMILY...: only this package's kernels, as the mangled names of others
# have none of its files in them, and only those that are in its library: Triton's are compiled anew
# in each process.
under_sanitizer() {
  local sanitizer nvcc filters=() file tool=$1 options=$2 logs
  shift 2
  # Where nvcc is, links followed: PATH may have a link to nvcc alone.
  nvcc=$(readlink -f "$(command -v "${CUDA_HOME:+$CUDA_HOME/bin/}nvcc")" || true)
  sanitizer=$(command -v compute-sanitizer || command -v "${CUDA_HOME:-}/bin/compute-sanitizer" ||
    command -v "$(dirname "$nvcc")/compute-sanitizer") ||
    { echo "compute-sanitizer is in none of PATH, CUDA_HOME/bin, nvcc's folder: no $tool"; return 1; }
  for file in quant_cuda/csrc/cuda/*.cu; do
    filters+=(--kernel-name "kns=_$(basename "$file" .cu)_cu_")
  done
  logs=$(mktemp -d "${OUT:-${TMPDIR:-/tmp}}/$tool-XXXXXX")
  options="--tool $tool --error-exitcode 1 --target-processes application-only $options"
  step "${LIMITS[$tool]}" $PYTHON -m benchmarks.gpu check "$@" --logs "$logs" \
    --under "$sanitizer $options --log-file '$logs/%p' ${filters[*]}"
}

# torch's allocator puts small tensors side by side, where a kernel that leaves one is not seen:
# without it each is an allocation of its own. Graphs, by which `decode` runs, cannot do without.
memcheck() {
  local failed=0
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
    under_sanitizer memcheck "--report-api-errors no" cuda variants solver || failed=1
  under_sanitizer memcheck "--report-api-errors no" decode || failed=1
  return $failed
}
racecheck() { under_sanitizer racecheck "" cuda variants solver decode; }
synccheck() { under_sanitizer synccheck "" cuda variants solver decode; }

tune() { step "${LIMITS[tune]}" $PYTHON -m benchmarks.gpu tune; }

kernels() { step "${LIMITS[kernels]}" $PYTHON -m benchmarks.gpu measure kernels; }

decode() { step "${LIMITS[decode]}" $PYTHON -m benchmarks.gpu measure decode; }

quantization() {
  step "${LIMITS[quantization]}" $PYTHON -m benchmarks.gpu measure solving blocks quantization
}

# Each compiles its kernels first, which may take its whole time.
peers() {
  local peer
  for peer in humming gemlite marlin; do
    step $((LIMITS[peers] / 3)) $PYTHON -m benchmarks.gpu peers $peer ||
      echo "$peer was not timed to its end"
  done
}

tuning() { step "${LIMITS[tuning]}" $PYTHON -m benchmarks.gpu measure tuning; }

status=0
for part in "${wanted[@]}"; do
  echo "== $part"
  begun=$SECONDS
  "$part" || { echo "FAILED: $part"; status=1; }
  echo "$part took $((SECONDS - begun)) seconds"
  if [ -n "${OUT:-}" ]; then
    mkdir -p "$OUT"
    cp -p benchmarks/results/nvidia-*.json "$OUT"/ 2> /dev/null || true
    mkdir -p "$OUT/tuned" && cp -p quant_cuda/cuda/tuned/*.json "$OUT/tuned"/ 2> /dev/null || true
  fi
done
exit $status
