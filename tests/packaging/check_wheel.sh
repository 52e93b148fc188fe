#!/usr/bin/env bash
# One wheel for every supported Python and torch: builds it, looks at its tag and contents, installs it without its dependencies
# into throw-away environments that borrow each interpreter's packages, and computes there.
#
# Usage: check_wheel.sh PYTHON [OTHER_PYTHON …]     PYTHON has torch and the build requirements, the others have torch
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
source "$root/tests/packaging/environments.sh"
absolute() { echo "$(cd "$(dirname "$1")" && pwd)/$(basename "$1")"; }
builder=$(absolute "$1")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
unset PYTHONPATH TRITON_INTERPRET CL_KERNELS_NATIVE CL_KERNELS_BACKEND
export PYTHONDONTWRITEBYTECODE=1

copy_sources "$root" "$work/source"
CL_KERNELS_NATIVE=1 "$builder" -m pip wheel "$work/source" --quiet --no-index --no-deps --no-build-isolation --wheel-dir "$work/dist"
wheel=$(ls "$work"/dist/*.whl)
echo "== $(basename "$wheel"), $(stat -c %s "$wheel") bytes, built with $("$builder" -c 'import platform, torch; print("Python", platform.python_version(), "torch", torch.__version__)')"
[[ $wheel == *-py3-none-linux_*.whl ]]
"$builder" - "$wheel" <<'PYTHON'
import sys, zipfile

names = zipfile.ZipFile(sys.argv[1]).namelist()
for needed in ("cl_kernels/_ops.so", "cl_kernels/_build.json", "cl_kernels/py.typed", "cl_methods/cli.py"):
    assert needed in names, needed
strange = [n for n in names if n.split("/")[0].split("-")[0] not in ("cl_kernels", "cl_methods", "cl_kernels.libs")]
assert not strange, strange
PYTHON

for python in "$@"; do
    python=$(absolute "$python")
    place=$work/$(echo "$python" | tr / _)
    borrowed_environment "$python" "$place"
    echo "== $("$place/bin/python" -c 'import platform, torch; print("Python", platform.python_version(), "torch", torch.__version__)')"
    "$builder" -m pip --python "$place/bin/python" install --quiet --no-index --no-deps "$wheel"
    triton=$("$place/bin/python" -c 'import importlib.util as u; print("triton" if u.find_spec("triton") else "no-triton")')
    (cd "$work" && "$place/bin/python" "$root/tests/packaging/installed.py" native "$triton")
done
