#!/bin/sh
# Fits all kernel surfaces anew from CSV files of kernel timings and writes them beside this script.
#
#   profiles/kernels/regenerate.sh DIRECTORY_OF_CSV
#
# The directory holds gemm.csv, attn_prefill.csv, attn_decode.csv, attn_mixed.csv, comm.csv and memops.csv in the layout
# that `batchmax import` writes. Takes about ten seconds after the build.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
points=$1
cd "$here/../.."
cargo run --release -- calibrate --alone --quiet --out "$here" --points \
    "$points"/gemm.csv "$points"/attn_prefill.csv "$points"/attn_decode.csv "$points"/attn_mixed.csv \
    "$points"/comm.csv "$points"/memops.csv
