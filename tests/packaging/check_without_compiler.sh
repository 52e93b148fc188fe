#!/usr/bin/env bash
# Installation where no compiler is found, with and without Triton: it installs, warns once, computes on the reference, and
# `python -m cl_kernels.doctor` says why. Then the tests of what is left run against that installation.
#
# Usage: check_without_compiler.sh PYTHON     an interpreter that has torch, pytest and the build requirements
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
python=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
source "$root/tests/packaging/environments.sh"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
unset PYTHONPATH TRITON_INTERPRET CL_KERNELS_NATIVE CL_KERNELS_BACKEND CXX NVCC
export PYTHONDONTWRITEBYTECODE=1

check() {  # check NAME triton|no-triton [PATTERN of packages to hide]
    local place=$work/$2
    copy_sources "$root" "$place/source"
    borrowed_environment "$python" "$place/env" "${3:-}"
    echo "== $1"
    CXX=/nonexistent/c++ NVCC=/nonexistent/nvcc "$place/env/bin/python" -m pip install --quiet --no-index --no-deps \
        --no-build-isolation "$place/source"
    (cd "$place" && env/bin/python "$root/tests/packaging/installed.py" reference "$2")
    (cd "$place" && CL_KERNELS_NATIVE=0 OMP_NUM_THREADS=2 env/bin/python -P -m pytest -c "$root/pyproject.toml" \
        --rootdir "$root" -p no:cacheprovider -m "not interpreter and not aot and not native" \
        "$root"/tests/{gating,weight_average,moe_adapter,distill_kl})
}

check "without a compiler" triton
check "without a compiler and without Triton" no-triton 'triton*'
