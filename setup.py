"""Builds the compiled kernels: one stable-ABI library of csrc/ and a small host-only pybind11 module.

Driven through ninja directly, because torch.utils.cpp_extension refuses to compile CUDA on a CPU build of torch. No GPU is
probed and no CUDA build of torch is needed. What cannot be built is left out with a reason that `clk doctor` repeats.

Environment:
    CL_KERNELS_NATIVE=0          build nothing; =1 fail instead of installing without the compiled kernels
    CL_KERNELS_CUDA=0            leave CUDA out even where nvcc is found
    CL_KERNELS_CUDA_ARCHS        semicolon-separated, instead of CUDA_ARCHITECTURES below
    CXX, NVCC, MAX_JOBS          compilers and number of parallel jobs
    CL_KERNELS_CXXFLAGS          added to every C++ compilation and to the link, such as -fsanitize=address
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools < 70.1
    from wheel.bdist_wheel import bdist_wheel

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"
CUDA_ARCHITECTURES = ("80", "86", "89", "90", "100", "120")
TORCH_TARGET_VERSION = "0x020a000000000000"  # 2.10: compiles on 2.13 and loads on 2.11 to 2.13
INSTRUCTION_SETS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": [
        "-mavx2",
        "-mfma",
        "-mf16c",
        "-mavx512f",
        "-mavx512bw",
        "-mavx512vl",
        "-mavx512dq",
        "-mprefer-vector-width=512",
    ],
}
FIND_TORCH = "import json, torch, os; print(json.dumps([os.path.dirname(torch.__file__), torch.__version__]))"


class CannotBuildError(Exception):
    """A part cannot be built on this machine; the message is shown to the user."""


def find_torch() -> tuple[Path, str]:
    """Folder and version of the torch that will be used.

    pip builds in an isolated environment without torch, by pointing PYTHONPATH at its overlay; without PYTHONPATH the same
    interpreter sees the environment that is being installed into.
    """
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONNOUSERSITE")}
    for environment in (os.environ, clean):
        found = subprocess.run(
            [sys.executable, "-c", FIND_TORCH], env=environment, capture_output=True, text=True, check=False
        )
        if found.returncode == 0:
            folder, version = json.loads(found.stdout.strip().splitlines()[-1])
            return Path(folder), version
    raise CannotBuildError(
        "torch is not installed where the build runs; install torch first (or use --no-build-isolation)"
    )


def find_program(variable: str, *names: str) -> str | None:
    wanted = os.environ.get(variable)
    for name in (wanted,) if wanted else names:
        path = shutil.which(name)
        if path:
            return path
    return None


def cuda_architectures() -> list[str]:
    chosen = os.environ.get("CL_KERNELS_CUDA_ARCHS")
    return [a.strip().replace(".", "") for a in chosen.split(";") if a.strip()] if chosen else list(CUDA_ARCHITECTURES)


def gencode(architectures: list[str]) -> list[str]:
    """Machine code for each architecture, and PTX of the newest for those to come."""
    flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    newest = max(architectures, key=int)
    return [*flags, f"-gencode=arch=compute_{newest},code=compute_{newest}"]


class NinjaFile:
    """The build graph: objects from sources, one link."""

    def __init__(self) -> None:
        self.lines = ["ninja_required_version = 1.5"]

    def rule(self, name: str, command: str, depfile: bool) -> None:
        self.lines += [f"rule {name}", f"  command = {command}", f"  description = {name} $out"]
        if depfile:
            self.lines += ["  depfile = $out.d", "  deps = gcc"]

    def build(self, output: Path, rule: str, inputs: list[Path], flags: str = "") -> Path:
        names = " ".join(str(i).replace(" ", "$ ") for i in inputs)
        self.lines += [f"build {str(output).replace(' ', '$ ')}: {rule} {names}", f"  flags = {flags}"]
        return output


def compile_native(output: Path, host_output: Path, work: Path) -> dict:
    """Build both libraries; returns what was built, for `clk doctor`."""
    cxx = find_program("CXX", "g++", "c++", "clang++")
    if cxx is None:
        raise CannotBuildError("no C++ compiler found (looked for $CXX, g++, c++, clang++); install one and reinstall")
    try:
        import ninja
        import pybind11
    except ImportError as error:
        raise CannotBuildError(
            f"{error.name} is not installed where the build runs; pip install {error.name}"
        ) from error
    ninja_program = Path(ninja.BIN_DIR) / "ninja"
    torch_folder, torch_version = find_torch()

    nvcc, cuda_reason = find_program("NVCC", "nvcc"), ""
    if os.environ.get("CL_KERNELS_CUDA") == "0":
        nvcc, cuda_reason = None, "left out by CL_KERNELS_CUDA=0"
    elif nvcc is None:
        cuda_reason = "no nvcc found when it was built (looked for $NVCC and nvcc)"

    x86 = platform.machine() in ("x86_64", "AMD64")
    instruction_sets = INSTRUCTION_SETS if x86 else {"baseline": []}
    architectures = cuda_architectures() if nvcc else []
    includes = f"-I{CSRC} -isystem {torch_folder / 'include'}"
    defines = f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}" + (" -DCLK_MULTIVERSION" if x86 else "")
    defines += " -DCLK_WITH_CUDA -DUSE_CUDA" if nvcc else ""
    common = f"-O3 -std=c++17 {defines} {includes}"
    extra = os.environ.get("CL_KERNELS_CXXFLAGS", "")

    graph = NinjaFile()
    warnings = "-Wall -Wno-unused-function"
    compile_cxx = f"{cxx} -MMD -MF $out.d -fPIC -fvisibility=hidden {warnings} {common} {extra} $flags -c $in -o $out"
    graph.rule("cxx", compile_cxx, depfile=True)
    objects = []
    for source in sorted(CSRC.rglob("*.cpp")):
        relative = source.relative_to(CSRC)
        if source.name == "host.cpp":
            continue
        if source.name == "cpu_kernels.cpp":
            for isa, flags in instruction_sets.items():
                target = work / relative.with_suffix(f".{isa}.o")
                objects.append(graph.build(target, "cxx", [source], " ".join([f"-DCLK_ISA={isa}", *flags])))
        else:
            objects.append(graph.build(work / relative.with_suffix(".o"), "cxx", [source]))
    if nvcc:
        graph.rule(
            "nvcc",
            f"{nvcc} -MMD -MF $out.d --threads 2 -Xcompiler -fPIC,-fvisibility=hidden -Xptxas -v "
            f"--expt-relaxed-constexpr {common} {' '.join(gencode(architectures))} $flags -c $in -o $out > $out.log 2>&1 "
            "|| (cat $out.log && false)",
            depfile=True,
        )
        for source in sorted(CSRC.rglob("*.cu")):
            objects.append(graph.build(work / source.relative_to(CSRC).with_suffix(".cu.o"), "nvcc", [source]))
    libraries = f"-L{torch_folder / 'lib'} -ltorch -ltorch_cpu"
    if nvcc:
        graph.rule(
            "link", f"{nvcc} -shared -cudart static $in -Xlinker --no-as-needed {libraries} -o $out", depfile=False
        )
    else:
        graph.rule("link", f"{cxx} -shared {extra} $in -Wl,--no-as-needed {libraries} -o $out", depfile=False)
    graph.build(output, "link", objects)

    python_include = sysconfig.get_path("include")
    host_flags = (
        f"-I{pybind11.get_include()} -I{python_include} -DCLK_CUDA_ARCHITECTURES='\"{' '.join(architectures)}\"'"
    )
    host_object = graph.build(work / "host.o", "cxx", [CSRC / "host.cpp"], host_flags)
    graph.rule("link_host", f"{cxx} -shared {extra} $in -o $out", depfile=False)
    graph.build(host_output, "link_host", [host_object, work / "common" / "isa.o"])

    work.mkdir(parents=True, exist_ok=True)
    (work / "build.ninja").write_text("\n".join(graph.lines) + "\n")
    jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
    run = subprocess.run([str(ninja_program), "-C", str(work), "-j", jobs], capture_output=True, text=True, check=False)
    if run.returncode != 0:
        print(run.stdout, run.stderr, file=sys.stderr)
        errors = [line for line in run.stdout.splitlines() if "error" in line]
        raise CannotBuildError(f"the compiler failed: {errors[0] if errors else run.stdout[-400:]}")
    return {
        "torch": torch_version,
        "compiler": cxx if os.sep not in cxx else Path(cxx).name,
        "instruction_sets": list(instruction_sets),
        "cuda_architectures": architectures,
        "cuda_reason": cuda_reason,
    }


class BuildNative(build_ext):
    """Builds with ninja instead of distutils, and installs without the kernels rather than failing."""

    def run(self) -> None:
        package = ROOT / "cl_kernels" if self.inplace or self.editable_mode else Path(self.build_lib) / "cl_kernels"
        package.mkdir(parents=True, exist_ok=True)
        package = package.resolve()
        library, information = package / "_ops.so", {"native": False, "reason": ""}
        try:
            if os.environ.get("CL_KERNELS_NATIVE") == "0":
                raise CannotBuildError("left out by CL_KERNELS_NATIVE=0")
            host = package / f"_host{sysconfig.get_config_var('EXT_SUFFIX')}"
            information |= compile_native(library, host, Path(self.build_temp).resolve() / "cl_kernels")
            information["native"] = True
        except CannotBuildError as error:
            if os.environ.get("CL_KERNELS_NATIVE") == "1":
                raise SystemExit(f"cl-kernels: {error}") from error
            information["reason"] = str(error)
            for stale in [library, *package.glob("_host*.so")]:
                stale.unlink(missing_ok=True)
            self.warn(f"installing without the compiled kernels: {error}")
        (package / "_build.json").write_text(json.dumps(information, indent=2) + "\n")

    def get_outputs(self) -> list[str]:
        return [
            str(path) for path in (Path(self.build_lib) / "cl_kernels").glob("_*") if path.suffix in (".so", ".json")
        ]

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        return [str(path.relative_to(ROOT)) for path in CSRC.rglob("*") if path.is_file()]


class AnyPythonWheel(bdist_wheel):
    """The kernels hold no Python symbols and use the stable ABI: one wheel serves every supported Python and torch."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    packages=[
        *find_packages(include=["cl_kernels", "cl_kernels.*"]),
        *find_packages("python", include=["cl_methods", "cl_methods.*"]),
    ],
    package_data={
        "cl_kernels": ["py.typed"],
        "cl_methods": ["**/*.safetensors", "**/*.json", "**/*.csv", "**/*.yaml", "**/*.txt", "**/*.npz"],
    },
    ext_modules=[Extension("cl_kernels._ops", sources=[])],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": AnyPythonWheel},
)
