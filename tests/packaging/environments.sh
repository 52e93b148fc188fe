# Sourced by the checks beside it: throw-away sources and environments.

copy_sources() {  # copy_sources ROOT TARGET: what an sdist holds, without anything that was built
    mkdir -p "$2"
    (cd "$1" && cp -r csrc cl_kernels python setup.py pyproject.toml README.md LICENSE "$2")
    rm -f "$2"/cl_kernels/*.so "$2"/cl_kernels/_build.json
}

borrowed_environment() {  # borrowed_environment PYTHON TARGET [PATTERN]: its packages by link, without ours and without PATTERN
    "$1" -m venv --without-pip "$2"
    "$1" - "$2" "${3:-}" <<'PYTHON'
import fnmatch, sys, sysconfig
from pathlib import Path

source, target = Path(sysconfig.get_path("purelib")), next(Path(sys.argv[1]).glob("lib/python*/site-packages"))
hidden = ["__editable__*", "cl_kernels*", "cl_methods*", "_virtualenv*", *filter(None, [sys.argv[2]])]
for entry in source.iterdir():
    if not any(fnmatch.fnmatch(entry.name, pattern) for pattern in hidden):
        (target / entry.name).symlink_to(entry)
PYTHON
}
