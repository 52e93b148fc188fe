#!/usr/bin/env bash
# Everything that needs a GPU, in one call of under ten minutes, what matters most first:
# build, tests and fuzzer, benchmarks, whole training steps beside the public procedures, torch.compile as a peer, scaling.
#   bash benchmarks/gpu.sh [OUTPUT FOLDER]        default: benchmarks/results
# Every part writes its own text and JSON as soon as it ends, a failing or slow one keeps none of the others from running, and
# summary.txt has one line for each. Uses the python on PATH (or $PYTHON) with its torch and triton; needs nvcc for the
# compiled CUDA kernel, and open_clip_torch, tyro and pydantic for whole steps: WHEELS=FOLDER takes every wheel in FOLDER into a
# place of its own, theirs and what they need (beside torchvision and timm: ftfy, wcwidth, docstring_parser, typeguard,
# pydantic_core, annotated_types, typing_inspection, and typing_extensions where it is older than 4.16).
# SECONDS_LEFT (580) is the time for all of it.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUTPUT=${1:-benchmarks/results}
END=$((SECONDS + ${SECONDS_LEFT:-580}))
mkdir -p "$OUTPUT"
export PYTHONPATH="$PWD:$PWD/python" MAX_JOBS=${MAX_JOBS:-$(nproc)} PYTHONUNBUFFERED=1

"$PYTHON" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || { echo "no CUDA device: nothing to run" >&2; exit 1; }
"$PYTHON" -c 'import pytest, pytest_benchmark' || { echo "pytest and pytest-benchmark are needed" >&2; exit 1; }
: > "$OUTPUT/summary.txt"

limited() {  # limited SIGNAL NAME SECONDS COMMAND…: output to NAME.txt, a line to summary.txt; ends in time for the whole
    local signal=$1 name=$2 seconds=$3 start=$SECONDS status
    shift 3
    ((seconds > END - SECONDS)) && seconds=$((END - SECONDS))
    if ((seconds < 5)); then
        echo "$name: left out, no time" | tee -a "$OUTPUT/summary.txt" > "$OUTPUT/$name.txt"
        return
    fi
    timeout --signal="$signal" --kill-after=20 "$seconds" "$@" > "$OUTPUT/$name.txt" 2>&1
    status=$?
    case $status in
        0) status=passed ;;
        124 | 137) status="stopped after $seconds s" ;;
        *) status="failed ($status)" ;;
    esac
    echo "$name: $status, $((SECONDS - start)) s" | tee -a "$OUTPUT/summary.txt"
}

step() {  # interrupted when its time is up, so that pytest still writes what it has measured
    echo "== $1"
    limited INT "$@"
    tail -n 60 "$OUTPUT/$1.txt"
}

beside() {  # the same among others, in the background, where shells ignore interrupts
    limited TERM "$@" &
}

bench() {  # bench NAME SECONDS FILE EXPRESSION
    step "$1" "$2" "$PYTHON" -m pytest -c benchmarks/pytest.ini "benchmarks/$3" -k "$4" \
        --benchmark-max-time=0.4 --benchmark-json="$OUTPUT/gpu_$1.json"
}

if [[ -n ${WHEELS:-} ]]; then
    PACKAGES=$(mktemp -d)
    step packages 60 "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --target "$PACKAGES" "$WHEELS"/*.whl
    export PYTHONPATH="$PYTHONPATH:$PACKAGES"
    step imports 60 "$PYTHON" -c 'import open_clip, pydantic, tyro'
fi
ARCHITECTURE=$("$PYTHON" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
export CL_KERNELS_CUDA_ARCHS=${CL_KERNELS_CUDA_ARCHS:-$ARCHITECTURE}
CL_KERNELS_NATIVE=1 step build 120 "$PYTHON" setup.py build_ext --inplace
step doctor 20 "$PYTHON" -m cl_kernels.doctor

# Together, because nearly all of their time is Triton's compiler: nothing is timed here.
export OMP_NUM_THREADS=2
test_command=("$PYTHON" -m pytest -m gpu -p no:cacheprovider)
for file in $(grep -rlE "mark\.gpu" tests --include='test_*.py' | sort); do
    name=${file#tests/}
    name=${name%.py}
    beside "tests_${name//\//_}" 170 "${test_command[@]}" "$file"
done
# Every new width and rank is a kernel of its own to compile, so a GPU sees fewer cases than a CPU.
for operation in moe_adapter top_k_gating distill_kl peaked_logits feature_distill_kl peaked_features average_ blend_; do
    CLK_FUZZ_DEVICE=cuda beside "fuzz_$operation" 170 "$PYTHON" tests/fuzz/fuzz_cases.py \
        --backend triton --operation "$operation" --cases 1000 --seconds 100
done
if command -v compute-sanitizer > /dev/null; then
    # Without torch's cache every tensor is an allocation of its own, whose end the sanitizer sees.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 beside sanitizer 170 compute-sanitizer --error-exitcode 9 \
        "${test_command[@]}" -x tests/weight_average tests/gating tests/moe_adapter \
        -k "formula or (float32 and (definition or ragged or tokens))"
else
    echo "sanitizer: left out, compute-sanitizer is not on PATH" | tee -a "$OUTPUT/summary.txt"
fi
wait
unset OMP_NUM_THREADS
tail -n 15 "$OUTPUT"/tests_*.txt "$OUTPUT"/fuzz_*.txt
[[ -f $OUTPUT/sanitizer.txt ]] && tail -n 15 "$OUTPUT/sanitizer.txt"

bench moe_adapter 50 bench_moe_adapter.py "not compiled"
bench average 30 bench_weight_average.py ""
bench distill_kl 50 bench_distill_kl.py "not compiled"
# Seconds and peak memory of a training step at the published batch, beside the public procedures.
for method in moe_adapters zscl; do
    step "step_$method" 75 "$PYTHON" -m cl_methods.cli bench --suite step --model ViT-B-16 --batch 64 --methods "$method" \
        --device cuda --output "$OUTPUT/gpu_step_$method.json" --history "$OUTPUT/gpu_history.jsonl"
done
bench token_routing 40 bench_token_routing.py ""
bench compiled 90 . "(compiled or ours) and (distill or moe_adapter)"
step scaling 60 "$PYTHON" benchmarks/scaling.py --output "$OUTPUT"
echo "== summary"
cat "$OUTPUT/summary.txt"
! grep -q "failed\|stopped\|left out" "$OUTPUT/summary.txt"
