#!/bin/sh
# The CUDA kernels as PTX for compute capability 8.0, which drivers since CUDA 12.1 compile for the
# GPU that they find: `.ci/ptx.sh [FILE]`. nvcc names a version of PTX that only its own driver and
# later ones take, and may write hints that need it. They are hints alone: the rest is of 8.1.
set -eu
folder=$(dirname "$0")/../jadam/_kernels/native/gpu
to=${1:-$folder/kernel.ptx}
made=$to.$$
trap 'rm -f "$made"' EXIT
nvcc -std=c++17 -O3 -ftz=true --expt-relaxed-constexpr -arch=compute_80 -ptx \
  -o "$made" "$folder/kernel.cu"
sed -i -e 's/^\.version .*/.version 8.1/' -e '/\.pragma "used_bytes_mask/d' "$made"
mv "$made" "$to"
