#!/usr/bin/env bash
# Everything that needs a GPU, in one call of under ten minutes: build, GPU tests, fuzzer, sanitizer, benchmarks, scaling; JSON.
#   bash benchmarks/gpu.sh [OUTPUT FOLDER]        default: benchmarks/results
# Uses the python on PATH (or $PYTHON) with its torch and triton; needs nvcc for the compiled CUDA kernels.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUTPUT=${1:-benchmarks/results}
mkdir -p "$OUTPUT"
export PYTHONPATH="$PWD:$PWD/python" MAX_JOBS=${MAX_JOBS:-$(nproc)}

"$PYTHON" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || { echo "no CUDA device: nothing to run" >&2; exit 1; }
failed=()

step() {  # step NAME SECONDS COMMAND…: its output to the screen and to NAME.txt; a failure does not keep the others from running
    local name=$1 seconds=$2
    shift 2
    echo "== $name"
    timeout "$seconds" "$@" 2>&1 | tee "$OUTPUT/$name.txt" || failed+=("$name")
}

CL_KERNELS_NATIVE=1 step build 120 "$PYTHON" setup.py build_ext --inplace
step doctor 30 "$PYTHON" -m cl_kernels.doctor
step tests 180 "$PYTHON" -m pytest -m gpu -p no:cacheprovider
step benchmarks 120 "$PYTHON" -m pytest -c benchmarks/pytest.ini benchmarks --benchmark-json="$OUTPUT/gpu.json"
step scaling 60 "$PYTHON" benchmarks/scaling.py --output "$OUTPUT"
# Every new width and rank is a kernel of its own to compile, so a GPU sees fewer cases than a CPU.
CLK_FUZZ_DEVICE=cuda step fuzz 60 "$PYTHON" tests/fuzz/fuzz_cases.py --backend triton --cases 200
if command -v compute-sanitizer > /dev/null; then
    step sanitizer 60 compute-sanitizer --error-exitcode 9 "$PYTHON" -m pytest -m gpu -p no:cacheprovider -x tests/weight_average
else
    echo "== sanitizer: compute-sanitizer is not on PATH" | tee "$OUTPUT/sanitizer.txt"
fi
((${#failed[@]} == 0)) || { echo "failed: ${failed[*]}" >&2; exit 1; }
