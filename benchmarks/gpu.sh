#!/usr/bin/env bash
# Everything that needs a GPU, in one call of under ten minutes: build, GPU tests, GPU benchmarks, JSON.
#   bash benchmarks/gpu.sh [OUTPUT FOLDER]        default: benchmarks/results
# Uses the python on PATH (or $PYTHON) with its torch and triton; needs nvcc for the compiled CUDA kernels.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUTPUT=${1:-benchmarks/results}
mkdir -p "$OUTPUT"
export PYTHONPATH="$PWD:$PWD/python" MAX_JOBS=${MAX_JOBS:-$(nproc)}

"$PYTHON" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || { echo "no CUDA device: nothing to run" >&2; exit 1; }
failed=0
CL_KERNELS_NATIVE=1 "$PYTHON" setup.py build_ext --inplace > "$OUTPUT/build.log" 2>&1 || { tail -20 "$OUTPUT/build.log"; failed=1; }
"$PYTHON" -m cl_kernels.doctor | tee "$OUTPUT/doctor.txt"
timeout 300 "$PYTHON" -m pytest -m gpu -p no:cacheprovider 2>&1 | tee "$OUTPUT/tests.txt" || failed=1
timeout 240 "$PYTHON" -m pytest -c benchmarks/pytest.ini benchmarks --benchmark-json="$OUTPUT/gpu.json" 2>&1 | tee "$OUTPUT/benchmarks.txt" || failed=1
exit $failed
