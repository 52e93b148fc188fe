#!/usr/bin/env bash
# The compiled CPU kernels under the address and undefined-behaviour sanitizers: their tests, and the fuzzer for a while.
#
# Usage: check_sanitizers.sh PYTHON [CASES]     an interpreter that has torch, pytest and the build requirements; needs g++
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
python=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
cases=${2:-10000}
source "$root/tests/packaging/environments.sh"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
unset TRITON_INTERPRET CL_KERNELS_NATIVE CL_KERNELS_BACKEND

copy_sources "$root" "$work/source"
cd "$work/source"
CL_KERNELS_NATIVE=1 CL_KERNELS_CUDA=0 CL_KERNELS_CXXFLAGS="-g -O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined" \
    "$python" setup.py --quiet build_ext --inplace

# The interpreter itself is not instrumented: the runtime libraries come first, and what Python never frees is no leak of ours.
export LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)"
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
export PYTHONPATH="$work/source" OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive
# Peak memory means nothing here: what is freed stays in the address sanitizer's quarantine.
"$python" -m pytest -c "$root/pyproject.toml" --rootdir "$root" -p no:cacheprovider -k "not compile and not peak_memory" \
    "$root"/tests/{gating,weight_average,moe_adapter,distill_kl}/test_cpu.py "$root"/tests/moe_adapter/test_routed_block.py "$root"/tests/drop_in/test_{zscl_helpers,logit_distillation}.py
"$python" "$root/tests/fuzz/fuzz_cases.py" --cases "$cases"
echo "sanitizers: nothing found"
