"""How efficient code for aarch64 is, as far as that can be said without such a machine.

    python -m benchmarks.arm cycles [FILE ...]
    python -m benchmarks.arm instructions [--models resnet18 ...] [--cpu cortex-a76]

`cycles` compiles the microkernels that cores have, or takes files of assembly, and says for their
inner loops how many cycles llvm-mca's model of a core takes for an iteration, and which
share of the model's peak for the loop's products that is. `instructions` runs networks in the
system that `.ci/aarch64` emulates and counts executed instructions, of logshift's families and of
onnxruntime. Neither says how long anything takes: memory, caches and branches are left out, and
instructions differ in time.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.counting import MARK, counts, plugin

ROOT = Path(__file__).parent.parent
# Cores that llvm-mca has a model of, and the instruction sets whose microkernels run there.
CORES = {
    "cortex-a72": "neon", "cortex-a76": "neondot", "neoverse-n1": "neondot",
    "neoverse-v1": "neoni8mm",
}  # fmt: skip
_TRIPLE = "aarch64-unknown-linux-gnu"
# What inner loops are for, of loops that have several the first: products of bytes, of words, of
# float32, and where nothing is multiplied additions of bytes.
_WORK = (r"[us]{1,2}(?:dot|mmla)", r"[su]ml[as]?l2?", r"fml[as]", r"add\b.*16b", r"[us]adalp")
_ITERATIONS = 100
_SUMS = 24  # at the same time, more than any core's latency asks for


# --- cycles of inner loops ------------------------------------------------------------------------


@dataclass(frozen=True)
class Loop:
    """An inner loop: a block that ends in a branch to its own begin.

    Attributes
    ----------
    lines : list of str
        Its instructions.
    """

    lines: list[str]

    @property
    def work(self) -> list[str]:
        """Those instructions that it is for."""
        for pattern in _WORK:
            if found := [line for line in self.lines if re.match(pattern, line)]:
                return found
        return []

    @property
    def stack_accesses(self) -> int:
        """How many instructions read or write the stack."""
        return sum(bool(re.search(r"\[sp\b", line)) for line in self.lines)


def loops(assembly: str) -> Iterator[Loop]:
    """Yield the inner loops of a function that do something.

    Parameters
    ----------
    assembly : str
        As LLVM prints it for ELF.
    """
    label, lines = "", []
    for raw in assembly.splitlines():
        line = re.sub(r"\s*//.*", "", raw).strip().replace("\t", " ")  # without comments
        if match := re.fullmatch(r"(\.?\w+):", line):
            label, lines = match[1], []
        elif line and not line.startswith("."):
            lines.append(line)
            if re.match(r"(b\.|b |cbn?z |tbn?z )", line):
                if line.split()[-1] == label and (loop := Loop(list(lines))).work:
                    yield loop


def cycles(lines: list[str], cpu: str) -> float:
    """Return how many cycles an iteration of instructions takes in llvm-mca's model of a core."""
    program = shutil.which("llvm-mca-22") or shutil.which("llvm-mca")
    if program is None:
        raise SystemExit("llvm-mca is missing: Debian's package llvm-22, or another LLVM's")
    text = "\n".join(re.sub(r"(b\.\w+|b|cbn?z \w+,|tbn?z .*,) \.?\w+$", r"\1 0", x) for x in lines)
    done = subprocess.run(
        [program, f"-mtriple={_TRIPLE}", f"-mcpu={cpu}", f"-iterations={_ITERATIONS}"],
        input=text + "\n", capture_output=True, text=True, check=False,
    )  # fmt: skip
    found = re.search(r"Total Cycles:\s+(\d+)", done.stdout)
    if done.returncode or not found:
        raise SystemExit(f"llvm-mca cannot read this: {done.stderr.strip() or text}")
    return int(found[1]) / _ITERATIONS


def peak(work: list[str], cpu: str) -> float:
    """Return how many cycles the same products take if they wait for nothing."""
    free = []
    for i, line in enumerate(work * _SUMS):
        # No sum is needed again before it is there; v15 is what all of them read.
        registers = iter([f"v{i % _SUMS + (i % _SUMS > 14)}"])
        free.append(re.sub(r"\bv\d+", lambda _, r=registers: next(r, "v15"), line))
    return cycles(free, cpu) / _SUMS


def microkernels(isa: str) -> Iterator[tuple[str, Callable[[Any, Any], None]]]:
    """Yield names of the microkernels of an instruction set of aarch64, and what emits each.

    Parameters
    ----------
    isa : str
        One of the values of `CORES`; what all machines have belongs to each.
    """
    from logshift.kernels.dot import microkernels as dot
    from logshift.kernels.dot.tiles import MICROKERNELS
    from logshift.kernels.fma import microkernels as fma
    from logshift.kernels.fma.tiles import FLOAT_TILES
    from logshift.kernels.machine.isa.neon import NEON
    from logshift.kernels.shift import adders

    for family, module, table in (("dot", dot, MICROKERNELS), ("fma", fma, FLOAT_TILES)):
        for name, tile in table.items():
            if tile.isa is NEON or tile.isa.name == isa:
                yield f"{family} {name}", lambda b, a, m=module, n=name: m.emit(n, b, a)
    for name, adder in adders.ADDERS.items():
        if adder.isa is NEON:
            sizes = (adder.vector, adder.vectors, adder.vector, adder.lanes, adder.group)
            yield f"shift {name}", lambda b, a, s=sizes: adders.Addition(b, *s).emit(a, a, a)


def assembly_of(emit: Callable[[Any, Any], None], cpu: str) -> str:
    """Return what a microkernel is compiled to for a CPU, on any machine."""
    import llvmlite.binding as llvm
    from llvmlite import ir

    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    module = ir.Module()
    module.triple = _TRIPLE
    kind = ir.FunctionType(ir.VoidType(), [ir.IntType(64)])
    function = ir.Function(module, kind, "microkernel")
    builder = ir.IRBuilder(function.append_basic_block())
    emit(builder, function.args[0])
    if not builder.block.is_terminated:
        builder.ret_void()
    machine = llvm.Target.from_triple(_TRIPLE).create_target_machine(cpu=cpu, opt=3)
    parsed = llvm.parse_assembly(str(module))
    options = llvm.create_pipeline_tuning_options(speed_level=3)
    passes = llvm.create_pass_builder(machine, options)
    passes.getModulePassManager().run(parsed, passes)
    return machine.emit_assembly(parsed)


def _row(name: str, loop: Loop, cpu: str) -> str:
    taken, least = cycles(loop.lines, cpu), peak(loop.work, cpu)
    kind = loop.work[0].split()[0]
    return (
        f"{name:40} {cpu:12} {len(loop.lines):4} instructions, {len(loop.work):3} {kind:7}"
        f"{taken:8.1f} cycles, {100 * least / taken:3.0f} % of the peak, "
        f"{loop.stack_accesses} on the stack"
    )


def report_cycles(files: list[Path]) -> None:
    """Print a line for every core and microkernel's main loop, or every inner loop of files."""
    for cpu, isa in CORES.items():
        if files:
            texts = [(path.name, path.read_text(encoding="utf-8")) for path in files]
        else:
            texts = [(name, assembly_of(emit, cpu)) for name, emit in microkernels(isa)]
        for name, text in texts:
            found = list(loops(text))
            if not files and found:  # others do what is left of a run of steps
                found = [max(found, key=lambda loop: len(loop.work))]
            for loop in found:
                print(_row(name, loop, cpu), flush=True)


# --- executed instructions ------------------------------------------------------------------------

_MODELS = ("resnet18", "mobilenet_v2", "efficientnet_lite0", "yolov8n")


def run_inside(engine: str, path: str, kernels: str, shape: list[int]) -> None:
    """Run a network once, and once more between two marks; for the emulated system."""
    import numpy as np

    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    run: Callable[[], Any]
    if engine == "logshift":
        from logshift.runtime import load

        session = load(path, threads=1, kernels=kernels)
        run = lambda: session.run(x)  # noqa: E731
    else:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        other = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        run = lambda: other.run(None, {other.get_inputs()[0].name: x})  # noqa: E731
    run()
    mark = ctypes.CDLL(None).syscall
    mark(MARK, 0)
    run()
    mark(MARK, 1)


def counted(
    cpu: str, library: Path, engine: str, path: Path, kernels: str, shape: tuple[int, ...]
) -> tuple[int, int]:
    """Return how many instructions one run takes in the emulated system, and those on vectors."""
    arguments = [engine, str(path.absolute()), kernels, json.dumps(shape)]
    done = subprocess.run(
        ["bash", ".ci/aarch64", "python", cpu, "-m", "benchmarks.arm", "inside", *arguments],
        cwd=ROOT, env=os.environ | {"LOGSHIFT_PLUGIN": str(library.absolute())},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    found = counts(done.stderr)
    if done.returncode or found is None:
        raise SystemExit(f"{engine} does not run on {cpu}: {done.stderr.strip()[-2000:]}")
    return found.instructions, found.vector


def report_instructions(
    models: list[str], cpu: str, bits: list[tuple[int, int]], families: list[str], cache: Path
) -> None:
    """Print a line for every network and engine."""
    from benchmarks import compare

    subprocess.run(["bash", ".ci/aarch64", "setup"], cwd=ROOT, check=True)
    cache.mkdir(parents=True, exist_ok=True)
    library = plugin(cache)
    for name in models:
        shape = (1, *compare.NETWORKS[name].shape)
        others = {}
        files = compare.prepare(name, cache, *bits[0])
        for engine, path in (("onnxruntime int8", files.qdq), ("onnxruntime fp32", files.float)):
            others[engine], vector = counted(cpu, library, "onnxruntime", path, "", shape)
            print(
                f"{name:20} {engine:24} {others[engine] / 1e6:9.1f} M, {vector / 1e6:9.1f} M vector"
            )
        for weights, activations in bits:
            packed = compare.prepare(name, cache, weights, activations).packed
            for family in families:
                count, vector = counted(cpu, library, "logshift", packed, family, shape)
                ratios = ", ".join(f"{count / n:.2f} of {engine}" for engine, n in others.items())
                print(
                    f"{name:20} {f'{family} W{weights}A{activations}':24} {count / 1e6:9.1f} M, "
                    f"{vector / 1e6:9.1f} M vector: {ratios}",
                    flush=True,
                )  # fmt: skip


def _bits(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"[wW]([2-5])[aA]([2-8])", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not like w4a8")
    return int(match[1]), int(match[2])


def main() -> None:
    """Run one of the two."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("cycles").add_argument("files", nargs="*", type=Path)
    instructions = commands.add_parser("instructions")
    instructions.add_argument("--models", nargs="+", default=list(_MODELS))
    instructions.add_argument("--cpu", default="cortex-a76")
    instructions.add_argument("--bits", nargs="+", type=_bits, default=[(4, 8)])
    instructions.add_argument("--families", nargs="+", default=["auto", "shift", "portable"])
    instructions.add_argument("--cache", type=Path, default=Path("build/benchmarks"))
    inside = commands.add_parser("inside")  # what `instructions` starts in the emulated system
    for name in ("engine", "path", "kernels", "shape"):
        inside.add_argument(name)
    given = parser.parse_args()
    if given.command == "cycles":
        report_cycles(given.files)
    elif given.command == "instructions":
        report_instructions(given.models, given.cpu, given.bits, given.families, given.cache)
    else:
        run_inside(given.engine, given.path, given.kernels, json.loads(given.shape))


if __name__ == "__main__":
    sys.exit(main())
