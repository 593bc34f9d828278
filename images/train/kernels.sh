#!/bin/sh
# kernels.sh LINE ARCHITECTURE PACKAGE...: compile packages' CUDA kernels for one architecture, such as 8.0, into /kernels.
# Runs in the builder stage of the train image, which has nvcc in /usr/local/cuda.
set -eu
line=$1 architecture=$2
shift 2
cd /opt/requirements
[ ! -s /run/secrets/ca ] || export PIP_CERT=/run/secrets/ca
export CUDA_HOME=/usr/local/cuda PATH="/usr/local/cuda/bin:$PATH" PIP_NO_CACHE_DIR=1
export TORCH_CUDA_ARCH_LIST="$architecture"
FLASH_ATTN_CUDA_ARCHS=$(echo "$architecture" | tr -d .)
export FLASH_ATTN_CUDA_ARCHS FLASH_ATTENTION_FORCE_BUILD=TRUE
# otherwise DeepSpeed uses the accelerator of the building machine, which has no GPU
export DS_ACCELERATOR=cuda DS_BUILD_OPS=0 DS_BUILD_FUSED_ADAM=1 DS_BUILD_CPU_ADAM=1
pip install --no-deps --require-hashes --only-binary :all: --requirement "$line.txt"
for package in "$@"; do
  # the package's entry in the locks: lines up to the first that does not end in a backslash
  awk -v name="$package==" 'index($0, name) == 1 { on = 1 } on { print } !/\\$/ { on = 0 }' \
    kernels.txt "$line.source.txt" > "one-$package.txt"
  pip wheel --no-deps --require-hashes --no-build-isolation --wheel-dir /kernels --requirement "one-$package.txt"
done
