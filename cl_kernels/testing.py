"""Checks of Triton kernels that need no GPU: ahead-of-time compilation, and what the machine code shows."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
"""The GPUs that every kernel must compile for."""

SHARED_MEMORY = {
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
    "gfx942": 64 * 1024,
}
"""Shared memory (LDS on AMD) that one program may use, bytes. CUDA Programming Guide, table of compute capabilities; CDNA 3 ISA."""


@dataclass(frozen=True)
class CompiledInfo:
    """What one compiled kernel uses. ``spills`` counts bytes of stack on NVIDIA, registers on AMD; ``shared`` is in bytes."""

    target: str
    registers: int
    spills: int
    shared: int
    code: bytes = field(repr=False)
    """The cubin on NVIDIA, the assembly on AMD."""

    @cached_property
    def opcodes(self) -> Counter[str]:
        """How often each instruction occurs. Disassembled when first asked for: that takes as long as ptxas itself."""
        return Counter(_amd_opcodes(self.code) if self.target.startswith("gfx") else _nvidia_opcodes(self.code))

    def count(self, prefix: str) -> int:
        """Number of instructions whose opcode starts with ``prefix``: ``"LDG.E.128"``, ``"HGMMA"``, ``"v_mfma"``."""
        return sum(n for opcode, n in self.opcodes.items() if opcode.startswith(prefix))


def compile_for(
    kernel: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any] | None = None,
    target: str = "sm_90",
    num_warps: int = 4,
    num_stages: int = 3,
    aligned: bool = True,
) -> CompiledInfo:
    """Compile a ``@triton.jit`` kernel for ``target`` without a GPU or a driver, and read the machine code.

    Args:
        kernel: the jitted function.
        signature: type of every argument by name, in order: ``"*bf16"``, ``"i32"``, ``"fp32"``, …; those in ``constexprs`` may be
            left out.
        constexprs: values of the compile-time arguments (and of arguments that are None).
        target: one of :data:`TARGETS`.
        num_warps: warps per program, as the launcher sets it.
        num_stages: software pipeline stages, as the launcher sets it.
        aligned: pointers are multiples of 16 bytes and integers named in the signature as ``"i32:16"`` multiples of 16, as the
            launcher finds them at run time for torch's allocations.

    Raises:
        ValueError: unknown target, or arguments missing in the signature.
        RuntimeError: kernels are interpreted in this process (TRITON_INTERPRET=1).
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if target not in TARGETS:
        raise ValueError(f"target: got {target!r}, expected one of {', '.join(TARGETS)}")
    if not isinstance(kernel, triton.JITFunction):
        raise RuntimeError(
            f"{kernel!r} is not a compiled kernel: import it in a process without TRITON_INTERPRET=1 to compile it"
        )
    constexprs = dict(constexprs or {})
    missing = [name for name in kernel.arg_names if name not in signature and name not in constexprs]
    unknown = [name for name in (*signature, *constexprs) if name not in kernel.arg_names]
    if missing or unknown:
        raise ValueError(f"signature of {kernel.__name__}: missing {missing}, unknown {unknown}")
    types, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        given, _, divisor = ("constexpr", "", "") if name in constexprs else signature[name].partition(":")
        types[name] = given
        if aligned and (given.startswith("*") or divisor):
            attributes[(i,)] = [["tt.divisibility", int(divisor or 16)]]
    device = GPUTarget("hip", target, 64) if target.startswith("gfx") else GPUTarget("cuda", int(target[3:]), 32)
    compiled = triton.compile(
        ASTSource(kernel, types, constexprs, attributes),
        target=device,
        options={"num_warps": num_warps, "num_stages": num_stages},
    )
    return _read_amd(target, compiled) if target.startswith("gfx") else _read_nvidia(target, compiled)


def _cuobjdump(option: str, cubin: bytes) -> str:
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, option, str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _read_nvidia(target: str, compiled: Any) -> CompiledInfo:
    cubin = compiled.asm["cubin"]
    usage = _cuobjdump("-res-usage", cubin)
    found = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage))
    if not {"REG", "STACK", "LOCAL"} <= found.keys():
        raise RuntimeError(f"cuobjdump shows no resource usage for {target}:\n{usage}")
    return CompiledInfo(
        target, int(found["REG"]), int(found["STACK"]) + int(found["LOCAL"]), compiled.metadata.shared, cubin
    )


def _nvidia_opcodes(cubin: bytes) -> list[str]:
    sass = _cuobjdump("-sass", cubin)
    opcodes = re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]+)", sass, re.MULTILINE)
    if not opcodes:
        raise RuntimeError(f"cuobjdump shows no machine code:\n{sass[:1000]}")
    return opcodes


def _read_amd(target: str, compiled: Any) -> CompiledInfo:
    text = compiled.asm["amdgcn"]

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        if found is None:
            raise RuntimeError(f"the assembly for {target} has no field .{name}")
        return int(found[1])

    spills = number("vgpr_spill_count") + number("sgpr_spill_count")
    return CompiledInfo(target, number("vgpr_count"), spills, compiled.metadata.shared, text.encode())


def _amd_opcodes(assembly: bytes) -> list[str]:
    return re.findall(r"^\s+([svdgb][a-z]*_\w+)", assembly.decode(), re.MULTILINE)


def assert_fits(info: CompiledInfo) -> None:
    """Fail unless the kernel spills nothing and its shared memory fits the target.

    Raises:
        AssertionError: with what it uses and what the target has.
    """
    limit = SHARED_MEMORY[info.target]
    if info.spills or info.shared > limit:
        raise AssertionError(
            f"{info.target}: {info.spills} spilled with {info.registers} registers, {info.shared} of {limit} bytes of shared memory"
        )
