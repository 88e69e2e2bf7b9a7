"""The same bits on aarch64: `.ci/aarch64` emulates machines with several CPUs.

`.ci/run` takes those tests whose names do not end on `everywhere`. Of these the bits of everything
take ten minutes for each CPU, the files of the suite an hour the first time. Most kernels are
compiled on this machine beforehand (`support.cross_warm`), and kept beside the emulated system for
as long as their sources stay as they are.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from support import digests, operator_nets
from support.onnx_nets import Net, samples

from benchmarks import arm, counting
from logshift import converter

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="the emulator runs on Linux"),
]
TESTS = Path(__file__).parent
SCRIPT = TESTS.parent / ".ci" / "aarch64"
CPUS = ("cortex-a53", "cortex-a76", "neoverse-v1")
# Whether there are `dotprod` and `i8mm`.
FEATURES = {"cortex-a53": (False, False), "cortex-a76": (True, False), "neoverse-v1": (True, True)}
# Files of tests that need no more than is in there, and start no processes of another machine.
SUITE = (
    "kernels/test_arm.py", "kernels/test_bitpack.py", "kernels/test_float_kernels.py",
    "kernels/test_lookup.py", "kernels/test_moves.py", "kernels/test_registry.py",
    "kernels/test_shift.py", "runtime/test_cores.py", "runtime/test_executor.py",
    "runtime/test_files.py", "runtime/test_format.py", "runtime/test_session.py",
    "converter/test_qdq.py",
)  # fmt: skip


def _environment():
    own = {k: v for k, v in os.environ.items() if not k.startswith("NUMBA_") and k != "PYTHONPATH"}
    directory = own.setdefault(
        "LOGSHIFT_EMULATION",
        os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"),
                     "logshift-aarch64"),
    )  # fmt: skip
    return own | {
        "LOGSHIFT_CACHE_DIR": os.path.join(directory, "kernels"),
        "PYTHON": sys.executable,
    }


@pytest.fixture(scope="module")
def emulated():
    """A function that runs Python with arguments on a CPU, in `tests`, and returns what it says."""
    done = subprocess.run(
        ["bash", str(SCRIPT), "setup"], env=_environment(), capture_output=True, text=True,
        timeout=1800,
    )  # fmt: skip
    if done.returncode == 75:
        pytest.skip(done.stderr.splitlines()[-1])
    assert done.returncode == 0, done.stderr

    def run(cpu, *arguments, timeout=6 * 3600, **environment):
        done = subprocess.run(
            ["bash", str(SCRIPT), "python", cpu, *map(str, arguments)], cwd=TESTS,
            env=_environment() | environment, capture_output=True, text=True, timeout=timeout,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    return run


def _expected(*directories):
    done = subprocess.run(
        [sys.executable, "-m", "support.digests", "reference", *map(str, directories)], cwd=TESTS,
        capture_output=True, text=True, timeout=3600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return {case: set(ways.values()) for case, ways in digests.read(done.stdout).items()}


@pytest.fixture(scope="module")
def expected():
    """Digest of every case on this machine, as its definition in plain loops computes it."""
    found = _expected()
    assert all(len(ways) == 1 for ways in found.values())
    return found


# What NumPy or `onnx.reference` computes is the same in all ways of a machine, but its last bits
# are those of NumPy's own loops there.
OF_NUMPY = {
    "computed-weight-8", "computed-weight-32", "mish-32", "selu-32", "softplus-32",
}  # fmt: skip


def _compare(expected, text):
    found = digests.read(text)
    for case, ways in found.items():
        right = {ways[next(iter(ways))]} if case in OF_NUMPY else expected[case]
        for way, digest in ways.items():
            assert {digest} == right, (case, way)
    return found


_DETECTED = """
import json
from logshift.kernels.machine import cache, targets
host, has = targets.host(), targets.has_features
print(json.dumps([host.cpu, host.features, has(("dotprod",)), has(("i8mm",)), cache.stamp()]))
"""


@pytest.fixture(scope="module")
def hosts(emulated):
    """What each CPU is found to be: name and features for LLVM, dotprod, i8mm; versions of code."""
    return {cpu: json.loads(emulated(cpu, "-c", _DETECTED)) for cpu in CPUS}


@pytest.mark.parametrize("cpu", CPUS)
def test_machine_is_found_out(hosts, cpu):
    name, _, *features, _ = hosts[cpu]
    assert name == cpu and tuple(features) == FEATURES[cpu]


def _compile(hosts, cpu, what):
    """Compile on this machine what digests need on a CPU."""
    name, features, *_, stamp = hosts[cpu]
    done = subprocess.run(
        [sys.executable, "-m", "support.cross_warm", what, stamp], cwd=TESTS,
        env=os.environ | _environment() | {"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": features},
        capture_output=True, text=True, timeout=3600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    print(done.stdout)


# A product of bytes in a function of Numba, on a CPU that LLVM has no name for.
_SDOT = """
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from logshift.kernels.machine import targets
from logshift.kernels.machine.jit import njit

@intrinsic
def dot(typingctx, a, b):
    def codegen(context, builder, signature, args):
        i32x4, i8x16 = ir.VectorType(ir.IntType(32), 4), ir.VectorType(ir.IntType(8), 16)
        kind = ir.FunctionType(i32x4, [i32x4, i8x16, i8x16])
        name = "llvm.aarch64.neon.sdot.v4i32.v16i8"
        function = builder.module.declare_intrinsic(name, fnty=kind)
        x, w = (
            builder.insert_element(ir.Constant(i8x16, None), builder.trunc(v, ir.IntType(8)),
                                   ir.IntType(32)(0)) for v in args
        )
        sums = builder.call(function, [ir.Constant(i32x4, None), x, w])
        return builder.sext(builder.extract_element(sums, ir.IntType(32)(0)), ir.IntType(64))
    return types.int64(types.int64, types.int64), codegen

print(targets.host().cpu, targets.has_features(("dotprod",)))
if targets.has_features(("dotprod",)):
    print(njit(lambda a, b: dot(a, b))(-7, 9))
"""


def test_features_are_handed_to_the_compiler(emulated):
    assert emulated("unnamed", "-c", _SDOT).split() == ["generic", "True", "-63"]
    assert emulated("cortex-a53", "-c", _SDOT).split() == ["cortex-a53", "False"]


# Additions and float32 are the same instructions on all of them: one CPU is enough.
SHORT = {"cortex-a53": "machine", "cortex-a76": "products", "neoverse-v1": "products"}


@pytest.fixture(scope="module")
def short(emulated, hosts):
    """What `support.digests` prints on each CPU, at the same time as far as cores go."""

    def digests_of(cpu):
        _compile(hosts, cpu, SHORT[cpu])
        return emulated(cpu, "-m", "support.digests", SHORT[cpu])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {cpu: pool.submit(digests_of, cpu) for cpu in CPUS}


@pytest.mark.parametrize("cpu", CPUS)
def test_bits_of_convolutions(short, expected, cpu):
    """Every kernel for these, the demo with one thread and two, files that are damaged."""
    cases = expected.keys() - {"operators", "floats", "ONNX operators"}
    if SHORT[cpu] == "products":
        cases = {case for case in cases if not case.startswith("float ")}
    assert _compare(expected, short[cpu].result()).keys() == cases


# --- what takes hours the first time --------------------------------------------------------------


# Networks whose constants are of two pictures, while the converter shows them one at a time.
OF_TWO = {"one dimension", "sequence of features", "matrix of rank 3"}


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """Directory of networks for each operator, on codes and on float32, and their inputs."""
    directory = tmp_path_factory.mktemp("networks")
    for name, (make, _) in (operator_nets.OPERATORS | operator_nets.KEPT).items():
        if name in OF_TWO:
            continue
        net = Net()
        outputs = make(net)
        model = net.model(*(outputs if isinstance(outputs, tuple) else [outputs]))
        data = samples(model)
        path = directory / f"{name.replace(' ', '-').replace(',', '')}.stlq"
        for bits in (8, 32):
            own = path.with_stem(f"{path.stem}-{bits}")
            converter.convert(
                model, own, calibration=[data], weight_bits=5, residual_ratio=1.0,
                activation_bits=bits,
            )  # fmt: skip
            np.save(own.with_suffix(".npy"), data["x"][:2])
    return directory


@pytest.mark.parametrize("cpu", CPUS)
def test_bits_everywhere(emulated, hosts, networks, cpu):
    _compile(hosts, cpu, "all")
    text = emulated(cpu, "-m", "support.digests", "all", networks)
    expected = _expected(networks)
    assert _compare(expected, text).keys() == expected.keys()


@pytest.mark.parametrize("file", SUITE)
@pytest.mark.parametrize("cpu", CPUS)
def test_suite_everywhere(emulated, cpu, file):
    options = ("-q", "-p", "no:cacheprovider", "-c", TESTS.parent / "pyproject.toml")
    emulated(cpu, "-m", "pytest", *options, file)


def test_command_line_everywhere(emulated):
    code = "from logshift.converter.cli import main; main()"
    assert json.loads(emulated("cortex-a76", "-c", code, "demo", "--json"))


def test_instructions_are_counted_everywhere(emulated, tmp_path, monkeypatch):
    """Those of a run, and the same number each time but for what the system does meanwhile."""
    for name, value in _environment().items():
        monkeypatch.setenv(name, value)
    library, path = counting.plugin(tmp_path), digests.DEMO / "resnet20-cifar10-w4.stlq"
    counts = [
        arm.counted("cortex-a76", library, "logshift", path, "shift", (1, 3, 32, 32))
        for _ in range(2)
    ]  # fmt: skip
    (first, vector), (second, _) = counts
    assert abs(first - second) < 0.01 * first and 1e7 < vector < first < 1e8
