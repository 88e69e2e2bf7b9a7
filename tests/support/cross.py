"""Assembly of microkernels for aarch64, on whatever machine this is."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import llvmlite.binding as llvm
from llvmlite import ir

TRIPLE = "aarch64-unknown-linux-gnu"
# CPUs, and what LLVM is told of their features.
NEON = ("cortex-a53", "+neon")
NEON_DOT = ("cortex-a76", "+neon,+dotprod")
NEON_I8MM = ("neoverse-v1", "+neon,+dotprod,+i8mm")
_HEADER = "// microkernel "


def assembly(cpu: str, features: str, module: str, name: str) -> str:
    """Compile the microkernel of a name that a module emits, in this process."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    unit = ir.Module(name)
    unit.triple = TRIPLE
    function = ir.Function(unit, ir.FunctionType(ir.VoidType(), [ir.IntType(64)]), "microkernel")
    builder = ir.IRBuilder(function.append_basic_block())
    importlib.import_module(module).emit(name, builder, function.args[0])
    builder.ret_void()
    target = llvm.Target.from_triple(TRIPLE)
    machine = target.create_target_machine(cpu=cpu, features=features, opt=3)
    parsed = llvm.parse_assembly(str(unit))
    parsed.verify()
    options = llvm.create_pipeline_tuning_options(speed_level=3)
    passes = llvm.create_pass_builder(machine, options)
    passes.getModulePassManager().run(parsed, passes)
    return machine.emit_assembly(parsed)


@cache
def printed(cpu: str, features: str, module: str, names: tuple[str, ...]) -> dict[str, str]:
    """Return the assembly of microkernels by name; LLVM ends the process if it has none."""
    done = subprocess.run(
        [sys.executable, "-m", "support.cross", cpu, features, module, *names],
        cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    parts = [part.partition("\n") for part in done.stdout.split(_HEADER)[1:]]
    return {name: text for name, _, text in parts}


def inner_loops(text: str) -> list[list[str]]:
    """Return the instructions of all loops that consist of one basic block."""
    loops, label, block = [], "", []
    for line in text.splitlines():
        if found := re.match(r"(\.L\w+):", line):
            label, block = found[1], []
        elif instruction := re.match(r"\s+([a-z].*)", line):
            block.append(instruction[1])
            if re.search(rf"\s{label}$", line) and label:
                loops.append(block)
                label, block = "", []
            elif re.match(r"(b|ret)\b(?!\.)", instruction[1]):
                label = ""
    return loops


if __name__ == "__main__":
    for microkernel in sys.argv[4:]:
        print(_HEADER + microkernel, assembly(*sys.argv[1:4], microkernel), sep="\n")
