#!/usr/bin/env bash
# Compiles every kernel with the pinned nvcc and fails where registers spill or the embedded PTX is stale. The compiler comes
# as Python packages into target/nvcc, some 500 MB, once.
set -euo pipefail
cd "$(dirname "$0")/../.."
venv="${CARGO_TARGET_DIR:-target}/nvcc"
packages=$(python3 kernels/cuda/build.py --packages)
if [ "$(cat "$venv/packages" 2>/dev/null)" != "$packages" ]; then
    rm -rf "$venv"
    python3 -m venv "$venv"
    # shellcheck disable=SC2086 # a list of words
    "$venv/bin/pip" install --quiet --disable-pip-version-check $packages
    echo "$packages" >"$venv/packages"
fi
# The packages and no other nvcc that may be here.
env -u NVCC "$venv/bin/python" kernels/cuda/build.py --check
