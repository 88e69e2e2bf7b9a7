"""Where compiled code is kept: places, damage, processes that race, other machines, no place."""

from __future__ import annotations

import errno
import os
import platform
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from logshift.kernels.errors import CacheWarning, InputError
from logshift.kernels.machine import cache, jit, targets
from logshift.runtime import Session, warmup
from logshift.runtime.file import format
from logshift.runtime.warm import is_warm

x86 = pytest.mark.skipif(not targets._IS_X86, reason="names of x86-64 CPUs")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty place, the only one, and nothing known of what failed before."""
    monkeypatch.setattr(cache, "_failed", {})
    monkeypatch.setattr(cache, "_warned", False)
    monkeypatch.setenv("LOGSHIFT_CACHE_DIR", str(tmp_path / "place"))
    monkeypatch.setattr(cache, "_user_directory", lambda: None)
    monkeypatch.setattr(cache, "_BESIDE", tmp_path / "file" / "beside")
    (tmp_path / "file").write_text("below a file nothing can be made")
    return tmp_path / "place"


@pytest.fixture
def nowhere(place, monkeypatch):
    """No place that can be written."""
    monkeypatch.setenv("LOGSHIFT_CACHE_DIR", str(place.parent / "file" / "place"))


def _square(x):
    return x * x


def compiled():
    """A new dispatcher, as in a new process; whether it found its code; what it computes."""
    square = jit.njit(cache=True)(_square)
    result = square(7)
    return bool(square.stats.cache_hits), result


def entries(place):
    """All files of a place."""
    return sorted(path for path in place.rglob("*") if path.is_file())


def in_new_process(code, *arguments, env=None, prefix=()):
    """Run Python code; returns what it prints."""
    done = subprocess.run(
        [*prefix, sys.executable, "-c", code, *map(str, arguments)],
        env=env, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- places -------------------------------------------------------------------------------------


def test_order_of_places(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "_failed", {})
    own, numbas = tmp_path / "own", tmp_path / "numba"
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.delenv("LOGSHIFT_CACHE_DIR", raising=False)
    user = cache._user_directory()
    assert cache.places() == [user, cache._BESIDE]
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(numbas))
    assert cache.places() == [numbas]
    monkeypatch.setenv("LOGSHIFT_CACHE_DIR", str(own))
    assert cache.places() == [own]
    # What cannot be written is read first, all the same.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert cache.places() == [own, user, cache._BESIDE]


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="XDG directories")
def test_user_without_a_home(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache._user_directory() == tmp_path / "logshift"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", "/nonexistent")
    assert cache._user_directory() == Path("/nonexistent/.cache/logshift")
    # Without HOME and an entry in the list of users "~" stays what it is.
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert cache._user_directory() is None


def test_code_is_found_again(place):
    assert compiled() == (False, 49)
    before = entries(place)
    assert len(before) == 1
    assert compiled() == (True, 49)
    assert entries(place) == before


def test_read_only_place_is_read_and_the_next_one_written(place, monkeypatch, tmp_path):
    compiled()
    monkeypatch.setattr(cache, "_BESIDE", tmp_path / "beside")
    monkeypatch.setattr(cache, "_failed", {place: "Read-only file system"})
    before = entries(place)
    assert compiled() == (True, 49)
    assert not (tmp_path / "beside").exists()
    assert jit.njit(cache=True)(_square)(0.5) == 0.25
    assert entries(place) == before and len(entries(tmp_path / "beside")) == 1


def test_nowhere_to_write_warns_once_and_says_what_helps(nowhere):
    with pytest.warns(CacheWarning) as caught:
        assert compiled() == (False, 49)
        assert compiled() == (False, 49)
    (warning,) = caught
    for words in ("LOGSHIFT_CACHE_DIR", "logshift warmup --into DIR", "place: Not a directory"):
        assert words in str(warning.message) or os.name == "nt"


def test_full_disk(place, monkeypatch):
    def write_bytes(self, data):
        self.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    with pytest.warns(CacheWarning, match=os.strerror(errno.ENOSPC)):
        assert compiled() == (False, 49)
    assert entries(place) == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:10],
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: data[:2000] + bytes([data[2000] ^ 1]) + data[2001:],
        lambda data: b"\0" * len(data),
        lambda data: cache._digest(b"no pickle") + b"no pickle",
        lambda data: cache._digest(b"N.") + b"N.",  # a pickle of something else
    ],
)
def test_damaged_entry_is_made_anew(place, damage):
    compiled()
    (path,) = entries(place)
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert compiled() == (False, 49)
    assert entries(place) == [path]
    assert compiled() == (True, 49)


def test_entry_that_is_a_directory(place):
    compiled()
    (path,) = entries(place)
    path.unlink()
    path.mkdir()
    with pytest.warns(CacheWarning):
        assert compiled() == (False, 49)


def test_stamp_is_made_of_contents(tmp_path, monkeypatch):
    copy = shutil.copytree(
        cache.PACKAGE, tmp_path / "kernels", ignore=shutil.ignore_patterns("__py*")
    )
    monkeypatch.setattr(cache, "PACKAGE", copy)
    same = cache.stamp.__wrapped__()
    for path in copy.rglob("*.py"):
        os.utime(path, (1, 1))
    assert same == cache.stamp() == cache.stamp.__wrapped__()
    with (copy / "stlq" / "codec.py").open("a") as file:
        file.write("# another version\n")
    assert cache.stamp.__wrapped__() != same


def test_old_versions_are_forgotten(place):
    compiled()
    (stamp,) = place.iterdir()
    for index in range(20):
        old = place / f"cpython-310-{index:020x}"
        old.mkdir()
        os.utime(old, (index, index))
    (place / "of-somebody-else").mkdir()
    shutil.rmtree(stamp)
    compiled()
    left = {path.name for path in place.iterdir()}
    kept = {f"cpython-310-{index:020x}" for index in range(13, 20)}
    assert left == kept | {stamp.name, "of-somebody-else"}


def test_numbas_own_cache_is_left_alone(place):
    from numba import njit
    from numba.core import config

    plain = njit(_square)
    assert plain(3) == 9 and type(plain._cache).__name__ == "NullCache"
    assert entries(place) == []
    assert config.CACHE_DIR == os.environ.get("NUMBA_CACHE_DIR", "")


# --- processes ----------------------------------------------------------------------------------

FUNCTIONS = """
import numpy as np
from logshift.kernels.machine.jit import njit

@njit(cache=True)
def polynomial(x):
    total = 0.0
    for i in range(x.size):
        total += x[i] ** 3 - 2 * x[i]
    return total

@njit(cache=True)
def sums(x):
    return x.sum(), polynomial(x)

print(*sums(np.arange(9.0)), len(sums.stats.cache_hits))
"""


def together(count, command, env):
    """Output of so many processes that start at the same time; all must succeed."""
    started = [
        subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(count)
    ]
    results = [process.communicate(timeout=600) for process in started]
    assert [process.returncode for process in started] == [0] * count, results
    return [out for out, _ in results]


def test_eight_processes_start_cold_together(tmp_path):
    env = os.environ | {"LOGSHIFT_CACHE_DIR": str(tmp_path / "place")}
    script = tmp_path / "functions.py"
    script.write_text(FUNCTIONS)
    for line in together(8, [sys.executable, str(script)], env):
        assert line.split()[:2] == ["36.0", "1224.0"]
    found = entries(tmp_path / "place")
    assert len(found) == 2, "a file for each function, and nothing that is half done"
    # The ninth compiles nothing, though the sources have been copied to somewhere else since.
    (tmp_path / "copied").mkdir()
    copy = shutil.copy(script, tmp_path / "copied")
    os.utime(copy, (1, 1))
    assert together(1, [sys.executable, copy], env) == ["36.0 1224.0 1\n"]


COMPILED = """
import sys
from logshift.kernels.machine import jit
save = jit._KernelCache.save_overload
def counting(self, sig, data):
    print("compiled", self._file(sig))
    save(self, sig, data)
jit._KernelCache.save_overload = counting
"""
RUN = """
import warnings
warnings.simplefilter("error")
from logshift import runtime
import numpy as np
for path, kernels in zip(sys.argv[1::2], sys.argv[2::2]):
    session = runtime.load(path, threads=2, kernels=kernels)
    x = np.linspace(-1, 1, 3 * 32 * 32 * 2, dtype=np.float32).reshape(2, 3, 32, 32)
    print(session.run(x).tobytes().hex())
"""
IMPORT = "import sys\nfrom logshift import runtime\n"


@pytest.fixture(scope="module")
def demo():
    from logshift import converter

    return Path(converter.__file__).parent / "demo" / "resnet20-cifar10-w4.stlq"


@pytest.mark.slow
def test_eight_processes_run_a_network_cold(tmp_path, demo):
    env = os.environ | {"LOGSHIFT_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", COMPILED + RUN, str(demo), "auto"]
    results = {output.split()[-1] for output in together(8, command, env)}
    assert len(results) == 1
    (ninth,) = together(1, command, env)
    assert ninth.split() == list(results)


# --- no directory that can be written -----------------------------------------------------------

# Runs what follows where every file system is read-only, and nobody has a home.
READ_ONLY = """
set -e
mount --make-rprivate /
for target in $(cut -d' ' -f2 /proc/self/mounts | tac); do
    mount -o remount,bind,ro "$target" 2>/dev/null || true
done
! touch "$1/probe" 2>/dev/null
! touch /tmp/probe 2>/dev/null
shift
exec "$@"
"""


@pytest.fixture
def read_only(tmp_path):
    """What to put in front of a command to run it so."""
    prefix = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]
    prefix += ["sh", "-c", READ_ONLY, "sh", str(tmp_path)] if sys.platform == "linux" else []
    try:
        subprocess.run([*prefix, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs mount namespaces ({error})")
    return prefix


def test_warm_and_read_only(read_only, demo):
    warm = in_new_process(COMPILED + RUN, demo, "auto").split()[-1]
    found = in_new_process(COMPILED + RUN, demo, "auto", prefix=read_only)
    assert found.split() == [warm], "compiled nothing, same bits"


@pytest.mark.slow
def test_cold_and_read_only(read_only, demo, tmp_path):
    env = {k: v for k, v in os.environ.items() if k not in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME")}
    env |= {"LOGSHIFT_CACHE_DIR": str(tmp_path / "nothing"), "HOME": "/nonexistent"}
    code = COMPILED + RUN.replace('"error"', '"always"')
    done = subprocess.run(
        [*read_only, sys.executable, "-c", code, str(demo), "auto"],
        env=env, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("CacheWarning") == 1, done.stderr
    x = np.linspace(-1, 1, 3 * 32 * 32 * 2, dtype=np.float32).reshape(2, 3, 32, 32)
    expected = Session(format.read(demo), kernels="portable").run(x)
    assert done.stdout.split()[-1] == expected.tobytes().hex()


# --- other machines -----------------------------------------------------------------------------


def of(cpu, *features):
    """A host."""
    return targets.Target(cpu, ",".join(f"+{f}" for f in sorted(features)))


@x86
def test_code_for_other_machines_needs_what_they_have(place):
    znver4, haswell = targets.baked("znver4"), targets.baked("haswell")
    assert {"avx512vnni", "avx2", "fma"} <= znver4.needs and "-avxvnni" in znver4.features
    assert "avx2" in haswell.needs and "-avx512f" in haswell.features
    assert znver4.fits(of("znver4", *znver4.needs, "sse4a", "clzero"))
    assert znver4.fits(of("znver5", *znver4.needs, "avxvnni"))
    assert haswell.fits(of("icelake-server", *znver4.needs))
    hidden = of("znver4", *(znver4.needs - {"avx512vbmi"}))  # by a hypervisor
    assert not znver4.fits(hidden) and haswell.fits(hidden)
    # What no compiled code uses makes no difference.
    assert of("a", "avx2", "pku").name == of("a", "avx2").name != of("a", "avx").name


@x86
@pytest.mark.parametrize(
    ("host", "warmed", "expected"),
    [
        ("znver4", ["haswell", "icelake-server", "znver4"], "znver4"),
        ("znver5", ["haswell", "icelake-server", "znver4"], "znver4"),
        ("sapphirerapids", ["haswell", "icelake-server"], "icelake-server"),
        ("cascadelake", ["haswell", "icelake-server", "znver4"], "haswell"),
        ("broadwell", ["skylake-avx512"], None),
        ("haswell", [], None),
    ],
)
def test_best_code_for_a_machine(place, monkeypatch, host, warmed, expected):
    machine = of(host, *targets.baked(host).needs, "sse4a", "pku")
    monkeypatch.setattr(targets, "host", lambda: machine)
    monkeypatch.setattr(targets, "_given", lambda: (None, None))
    for cpu in warmed:
        target = targets.baked(cpu)
        cache.mark(target.name, {"cpu": cpu, "features": target.features, "families": ["dot"]})
    chosen = targets.chosen.__wrapped__()
    assert chosen == (machine if expected is None else targets.baked(expected))
    # The machine's own code goes before.
    cache.mark(machine.name, {"cpu": host, "features": machine.features, "families": ["dot"]})
    assert targets.chosen.__wrapped__() == machine


def test_unknown_cpu(tmp_path):
    with pytest.raises(InputError, match=f"'zen9'.*{'haswell' if targets._IS_X86 else ''}"):
        warmup(into=tmp_path, cpus=["zen9"])
    assert list(tmp_path.iterdir()) == []


def test_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file.place cannot be written"):
        warmup(into=tmp_path / "file" / "place")


OTHERS = {
    "x86_64": ["haswell", "znver4"], "AMD64": ["haswell", "znver4"],
    "aarch64": ["generic", "neoverse-v1"], "arm64": ["generic", "apple-m1"],
}  # fmt: skip


@pytest.mark.slow
def test_image_for_other_machines(tmp_path, demo, read_only):
    cpus = OTHERS.get(platform.machine(), [])
    steps = []
    made = warmup(lambda *step: steps.append(step), into=tmp_path, cpus=cpus)
    assert [warmed.cpu for warmed in made] == cpus
    assert all(w.directory == str(tmp_path) and w.size > 100_000 for w in made)
    done, totals, _ = zip(*steps, strict=True)
    assert list(done) == sorted(done) and done[-1] == totals[-1]
    env = os.environ | {"LOGSHIFT_CACHE_DIR": str(tmp_path)}
    env.pop("NUMBA_CACHE_DIR", None)
    code = COMPILED + RUN
    code += "from logshift.kernels.machine import targets; print(targets.chosen().cpu)"
    *results, cpu = in_new_process(code, demo, "auto", env=env, prefix=read_only).split()
    x = np.linspace(-1, 1, 3 * 32 * 32 * 2, dtype=np.float32).reshape(2, 3, 32, 32)
    assert results == [Session(format.read(demo), kernels="portable").run(x).tobytes().hex()]
    assert cpu in cpus


@pytest.mark.slow
@pytest.mark.parametrize("family", ["dot", "shift", "portable"])
def test_nothing_is_compiled_after_warmup(tmp_path, family):
    """Every kernel and all beside them: on networks of every operator, on codes and on float32."""
    env = os.environ | {"LOGSHIFT_CACHE_DIR": str(tmp_path)}
    (made,) = warmup(kernels=family, into=tmp_path)
    assert made.directory == str(tmp_path)
    tests = Path(__file__).parents[1]
    code = COMPILED + (
        "sys.path.insert(0, sys.argv[1])\n"
        "from support import float_digest, instruction_set_digest\n"
        "print(instruction_set_digest.digest(sys.argv[2]), float_digest.digest(sys.argv[2]))\n"
    )
    *compiled, digests = in_new_process(code, tests, family, env=env).splitlines()
    # The networks' random weights are encoded, which only the converter does otherwise.
    assert [line for line in compiled if not line.startswith("compiled encode.")] == []
    assert len(digests.split()) == 2


def test_is_warm_tells_families_apart(place):
    assert not is_warm("portable")
    name = targets.directories()[0]
    cache.mark(name, {"cpu": "", "features": "", "families": ["portable"]})
    assert is_warm("portable") and not is_warm("reference")


def test_warmup_without_a_place(nowhere, monkeypatch):
    from logshift.runtime import warm

    monkeypatch.setattr(warm.registry, "to_compile", lambda kernels: [("one", compiled)])
    with pytest.warns(CacheWarning):
        (made,) = warmup(kernels="portable")
    assert (made.directory, made.size) == (None, 0)


def test_no_warning_where_nothing_is_compiled(place, monkeypatch):
    compiled()
    monkeypatch.setattr(cache, "_failed", {place: "Read-only file system"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compiled() == (True, 49)
