"""What aarch64 machines are found to be able to do, on systems and CPUs that need not be here."""

from __future__ import annotations

import platform
import re
import subprocess
import sys

import llvmlite.binding as llvm
import pytest
from numba import njit, types
from support.aarch64 import INSTRUCTIONS, assembly

from logshift.kernels.machine import arm, cache, targets
from logshift.kernels.machine.native import (
    atomic_add,
    atomic_exchange,
    atomic_load,
    atomic_replace,
    atomic_store,
)

# AT_HWCAP and AT_HWCAP2 of these machines, as Linux gives them.
WORDS = {
    "cortex-a53": (0x8FF, 0),
    "cortex-a72": (0x887, 0),  # of a Raspberry Pi 4, without cryptography
    "cortex-a76": (0x119FFF, 0),
    "neoverse-v1": (0xEFFFFFFF & ~(1 << 29), 0x1A7F81 & ~0x7E),  # no SVE2
}  # fmt: skip
A76 = {"crc", "lse", "fullfp16", "rdm", "rcpc", "dotprod"}
CRYPTOGRAPHY = {"aes", "sha2", "sha3"}


def found(features):
    """Names of what is there, but for what every machine has."""
    return {name for name, there in features.items() if there} - {"fp-armv8", "neon"}


@pytest.fixture
def machine(monkeypatch):
    """Make this process believe that it is on an aarch64 Linux of such words and name."""

    def become(cpu, words):
        monkeypatch.setattr(arm, "_auxiliary", {16: words[0], 26: words[1]}.get)
        monkeypatch.setattr(targets, "IS_ARM", True)
        monkeypatch.setattr(targets, "_CPUS", targets._ARM)
        monkeypatch.setattr(targets, "_llvm_features", lambda: "+neon,+fp-armv8,-sve,+rand")
        detected = arm.detected
        monkeypatch.setattr(arm, "detected", lambda: detected("linux"))
        own = targets.Target(cpu, targets._all_features())
        monkeypatch.setattr(targets, "host", lambda: own)
        monkeypatch.setattr(targets, "_given", lambda: (None, None))
        monkeypatch.setattr(targets, "chosen", targets.chosen.__wrapped__)
        monkeypatch.setattr(targets, "target_features", targets.target_features.__wrapped__)
        return own

    monkeypatch.setattr(cache, "marked", lambda: {})
    return become


def test_linux(monkeypatch):
    def of(cpu):
        monkeypatch.setattr(arm, "_auxiliary", dict(zip((16, 26), WORDS[cpu], strict=True)).get)
        return found(arm.detected("linux"))

    assert of("cortex-a53") == {"crc", "aes", "sha2"}
    assert of("cortex-a72") == {"crc"}
    assert of("cortex-a76") - CRYPTOGRAPHY == A76
    assert of("neoverse-v1") - CRYPTOGRAPHY == targets._ARM["neoverse-v1"] - {"neon", "fp-armv8"}


def test_half_of_a_pair_is_nothing(monkeypatch):
    """LLVM has one name for what Linux tells apart: scalars and vectors of float16, for one."""
    monkeypatch.setattr(arm, "_auxiliary", {16: 1 << 9 | 1 << 3, 26: 0}.get)
    assert found(arm.detected("linux")) == set()


def test_macos(monkeypatch):
    m1 = {f"hw.optional.arm.FEAT_{name}" for name in (
        "AES", "PMULL", "SHA1", "SHA256", "SHA3", "SHA512", "CRC32", "LSE", "FP16", "RDM", "FCMA",
        "LRCPC", "DotProd", "FHM", "LRCPC2",
    )}  # fmt: skip
    monkeypatch.setattr(arm, "_sysctl", m1.__contains__)
    assert found(arm.detected("darwin")) - CRYPTOGRAPHY == targets._ARM["apple-m1"] - {
        "neon", "fp-armv8"
    }  # fmt: skip
    m2 = m1 | {"hw.optional.arm.FEAT_I8MM", "hw.optional.arm.FEAT_BF16"}
    monkeypatch.setattr(arm, "_sysctl", m2.__contains__)
    features = arm.detected("darwin")
    assert features["i8mm"] and features["bf16"] and not features["sve"]


def test_windows(monkeypatch):
    snapdragon_8cx = {19, 30, 31, 34, 43, 45}
    monkeypatch.setattr(arm, "_is_present", snapdragon_8cx.__contains__)
    features = arm.detected("win32")
    assert found(features) == {"crc", "lse", "dotprod", "rcpc"}
    assert features["i8mm"] is False and "rdm" not in features, "of that Windows says nothing"


def test_unknown_system():
    assert arm.detected("freebsd14") == {"neon": True, "fp-armv8": True}


@pytest.mark.skipif(sys.platform != "linux", reason="a call of Linux")
def test_the_call_itself():
    page_size = 6
    assert arm._auxiliary(page_size) in (4096, 16384, 65536)
    assert arm._auxiliary(12345) == 0


@pytest.mark.parametrize("cpu", WORDS)
def test_what_is_there_is_handed_over(machine, cpu):
    own = machine(cpu, WORDS[cpu])
    for name in ("dotprod", "i8mm"):
        there = name in targets._ARM[cpu]
        assert targets.has_features((name,)) is there
        assert (f"{'+' if there else '-'}{name}") in own.features.split(",")
    assert "+rand" in own.features.split(","), "what LLVM knows by itself stays"


def test_cpu_that_llvm_has_no_name_for(machine):
    machine("generic", WORDS["neoverse-v1"])
    assert targets.has_features(("dotprod", "i8mm"))


@pytest.mark.parametrize("cpu", ["cortex-a76", "neoverse-v1"])
def test_what_the_name_promises_is_not_believed(machine, cpu):
    """Of cores that differ LLVM takes the name of one; a hypervisor hides what it likes."""
    own = machine(cpu, WORDS["cortex-a72"])
    assert not targets.has_features(("dotprod",)) and not targets.has_features(("i8mm",))
    text = assembly(INSTRUCTIONS["lse"], own.cpu, own.features)
    assert "ldadd" not in text and "ldaxr" in text
    text = assembly(INSTRUCTIONS["lse"], cpu, "")
    assert "ldadd" in text, "LLVM would have believed it"


def test_best_code_for_a_machine(machine, monkeypatch):
    own = machine("cortex-a76", WORDS["cortex-a76"])

    def best(*cpus):
        made = {targets.baked(cpu).name: targets.baked(cpu) for cpu in cpus}
        marks = {name: {"cpu": t.cpu, "features": t.features} for name, t in made.items()}
        monkeypatch.setattr(cache, "marked", lambda: marks)
        return targets.chosen().cpu if targets.chosen() != own else None

    assert best("cortex-a76", "cortex-a53") == "cortex-a76"
    assert best("neoverse-v1", "neoverse-n1", "generic") == "neoverse-n1"
    assert best("neoverse-v1", "cortex-a72", "generic") == "cortex-a72"
    assert best("neoverse-v1", "apple-m1") is None


# --- LLVM agrees with the table -------------------------------------------------------------------

_COMPILE = """
import sys
from support.aarch64 import INSTRUCTIONS, assembly
print(assembly(INSTRUCTIONS[sys.argv[1]], *sys.argv[2:]))
"""


def _compiles(repository, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", _COMPILE, *arguments], cwd=repository / "tests",
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0 or "Cannot select" in done.stderr, done.stderr
    return done.returncode == 0


@pytest.mark.parametrize("cpu", targets._ARM)
def test_baked_targets_have_what_they_say(machine, repository, cpu):
    machine("generic", (0, 0))
    target = targets.baked(cpu)
    assert target.needs == targets._ARM[cpu]
    for feature, instruction in (("dotprod", "sdot"), ("i8mm", "usdot")):
        if feature in target.needs:
            assert instruction in assembly(INSTRUCTIONS[feature], cpu, target.features)
        else:
            assert not _compiles(repository, feature, cpu, target.features), "LLVM would end here"
    atomics = assembly(INSTRUCTIONS["lse"], cpu, target.features)
    assert ("ldadd" in atomics) is ("lse" in target.needs)


def test_llvm_knows_all_names(capfd):
    assembly(INSTRUCTIONS["lse"], "generic", ",".join(f"-{name}" for name in arm.FEATURES[2:]))
    for cpu in targets._ARM:
        assembly(INSTRUCTIONS["lse"], cpu, "")
    assert capfd.readouterr().err == "", "it warns of what it does not know"
    assert llvm.llvm_version_info >= (15, 0, 0)


# --- atomics ------------------------------------------------------------------------------------


@njit(types.int64(types.uintp))
def _atomics(address):
    atomic_exchange(address, 1)
    atomic_add(address, 2)
    atomic_replace(address, 3, 4)
    atomic_store(address, 5)
    return atomic_load(address)


@pytest.mark.parametrize(
    ("cpu", "instructions"),
    [
        ("cortex-a53", ["ldaxr", "stlxr", "stlr", "ldar"]),
        ("neoverse-v1", ["swpal", "ldaddal", "casal", "stlr", "ldar"]),
    ],
)
def test_atomics_are_ordered_as_the_scheduler_needs(cpu, instructions):
    """See `docs/kernels.md`; loads stay behind releases, which `ldapr` does not promise."""
    if platform.machine() == "aarch64" and not targets.has_features(("lse",)):
        pytest.skip("this machine's code has loops in place of atomic instructions")
    (text,) = _atomics.inspect_llvm().values()
    body = re.search(r"^define [a-z ]*i32 @.*?^}", text, re.DOTALL | re.MULTILINE)[0]
    body = re.sub(r" #\d+|, !\S+ !\d+|local_unnamed_addr", "", body)
    found = re.findall(
        r"^\s+((?:ld|st|swp|cas)[a-z]*)\s+(.*)",
        assembly(body, cpu, ""), re.MULTILINE,
    )  # fmt: skip
    atomic = [each for each in found if not re.fullmatch("(ld|st)[ru]?p?r?", each[0])]
    assert list(dict.fromkeys(name for name, _ in atomic)) == instructions
    # With the register of zeros for what nobody reads, these would not acquire.
    assert not any(o.split(", ")[1] == "xzr" for n, o in atomic if n in ("swpal", "ldaddal"))
