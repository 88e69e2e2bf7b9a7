"""Microcontrollers that exported C is compiled for, and their emulation.

QEMU emulates a process of them: `bare.c` reads and writes by Linux's system calls. The C library is
picolibc for RISC-V, newlib for ARM.
"""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from benchmarks.counting import MARK, Counts, counts

HERE = Path(__file__).parent
_PROGRAM = ("-nostartfiles", "-Wl,--gc-sections,--no-warn-rwx-segments")
_WARNINGS = ("-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic")
_PICOLIBC = Path("/usr/lib/picolibc/riscv64-unknown-elf/include")
# Its linker script has memories, of 256 KiB if nothing is said.
_PICOLIBC_LINKED = (
    "--specs=picolibc.specs", "-lm", "-Wl,--defsym=__flash_size=64M,--defsym=__ram_size=16M",
)  # fmt: skip


@dataclass(frozen=True)
class Target:
    """A core: prefix of its tools, flags of its compiler, its emulator, its C library."""

    prefix: str
    flags: tuple[str, ...]
    emulator: str
    library: tuple[str, ...]

    @property
    def missing(self) -> str:
        """What is not installed here; empty if nothing."""
        tools = [f"{self.prefix}-gcc", self.emulator]
        absent = [tool for tool in tools if shutil.which(tool) is None]
        if self.prefix.startswith("riscv") and not _PICOLIBC.is_dir():
            absent.append("picolibc")
        return ", ".join(absent)


def _riscv(march: str, mabi: str) -> Target:
    flags = (f"-march={march}", f"-mabi={mabi}", "-isystem", str(_PICOLIBC))
    return Target("riscv64-unknown-elf", flags, "qemu-riscv32", _PICOLIBC_LINKED)


def _arm(cpu: str) -> Target:
    return Target(
        "arm-none-eabi", (f"-mcpu={cpu}", "-mthumb"), "qemu-arm", ("--specs=nosys.specs", "-lm")
    )


TARGETS = {
    "rv32e": _riscv("rv32e", "ilp32e"),
    "rv32i": _riscv("rv32i", "ilp32"),
    "rv32im": _riscv("rv32im", "ilp32"),
    "cortex-m0": _arm("cortex-m0"),
    "cortex-m4": _arm("cortex-m4"),
}


@dataclass(frozen=True)
class Built:
    """A program for a target.

    Attributes
    ----------
    program : Path
    flash, ram : int
        Bytes of the network's own code and tables, and of its variables.
    undefined : frozenset of str
        Functions that it calls of others.
    """

    target: Target
    program: Path
    flash: int
    ram: int
    undefined: frozenset[str]


def build(target: Target, directory: Path, types: tuple[str, str], level: str = "-O2") -> Built:
    """Compile `net.c` of a directory, with one input and one output of these types."""
    code = compiled(target, directory / "net.c", (level, *_WARNINGS))
    return linked(target, directory, types, [code])


def compiled(target: Target, source: Path, flags: tuple[str, ...]) -> Path:
    """Compile one file of C, and return its object file."""
    code = source.with_suffix(".o")
    subprocess.run(
        [f"{target.prefix}-gcc", *target.flags, *flags, "-c", source, "-o", code], check=True
    )
    return code


def linked(
    target: Target,
    directory: Path,
    types: tuple[str, str],
    objects: list[Path],
    is_whole: bool = False,
) -> Built:
    """Make a program of object files; sizes are those of the first one, or of the whole."""
    program = directory / "net.elf"
    own = str(program if is_whole else objects[0])
    defined = [f"-DX_TYPE={types[0]}", f"-DY_TYPE={types[1]}", f"-DMARK={MARK}", f"-I{directory}"]
    begin = [f"{target.prefix}-gcc", *target.flags, "-O2", *defined, HERE / "bare.c"]
    subprocess.run([*begin, *objects, *_PROGRAM, *target.library, "-o", program], check=True)
    sizes = _output([f"{target.prefix}-size", own]).splitlines()[1].split()
    names = _output([f"{target.prefix}-nm", "--undefined-only", own]).split()
    text, data, bss = map(int, sizes[:3])
    return Built(target, program, text + data, data + bss, frozenset(names) - {"U"})


def run(built: Built, given: bytes) -> bytes:
    """Return what a program makes of its input."""
    command = [built.target.emulator, str(built.program)]
    return subprocess.run(command, input=given, capture_output=True, check=True).stdout


def count(built: Built, given: bytes, counter: Path) -> tuple[bytes, Counts]:
    """Return what a program makes of its input, and the instructions it takes."""
    command = [built.target.emulator, "-plugin", str(counter), str(built.program)]
    done = subprocess.run(command, input=given, capture_output=True, check=True)
    found = counts(done.stderr.decode())
    assert found is not None, done.stderr
    return done.stdout, found


def _output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
