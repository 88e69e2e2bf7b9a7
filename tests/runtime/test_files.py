"""Files are the old ones or the new ones, whatever stops the writer."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from logshift.runtime.file import files

NEW = b"new" * 1000


@pytest.fixture(params=["nameless", "named"])
def way(request, monkeypatch):
    """Both ways to write: files without a name, and where the system has none."""
    if request.param == "named":
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    elif not hasattr(os, "O_TMPFILE"):
        pytest.skip("this system has no files without names")


@pytest.fixture
def path(tmp_path):
    (tmp_path / "net.stlq").write_bytes(b"old")
    return tmp_path / "net.stlq"


def names(path):
    return sorted(p.name for p in path.parent.iterdir())


def test_files_are_replaced_and_made(way, path):
    files.replace(path, NEW)
    files.replace(path.with_name("other"), b"")
    assert path.read_bytes() == NEW and path.with_name("other").read_bytes() == b""
    assert names(path) == ["net.stlq", "other"]


@pytest.mark.skipif(not hasattr(os, "O_TMPFILE"), reason="this system has no files without names")
def test_nothing_has_a_name_before_it_is_complete(path, monkeypatch):
    seen = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (seen.append(names(path)), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda *a: (seen.append(names(path)), replace(*a)))
    files.replace(path, NEW)
    if len(seen[0]) > 1:
        pytest.skip("this file system has no files without names")
    assert seen[0] == seen[2] == ["net.stlq"] and len(seen[1]) == 2


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"),
                                   KeyboardInterrupt(), MemoryError()])  # fmt: skip
def test_failures_leave_the_old_file_alone(way, path, monkeypatch, function, error):
    def fail(*args):
        raise error

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(type(error)) as caught:
        files.replace(path, NEW)
    if isinstance(error, OSError):
        assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))
    assert path.read_bytes() == b"old" and names(path) == ["net.stlq"]


def test_a_link_that_fails_is_done_without(path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(errno.EOPNOTSUPP, "no links here")

    monkeypatch.setattr(os, "link", fail)
    files.replace(path, NEW)
    assert path.read_bytes() == NEW and names(path) == ["net.stlq"]


@pytest.mark.skipif(os.name != "posix", reason="limits of file sizes are POSIX's")
def test_a_file_that_does_not_fit(path):
    program = (
        "import resource, sys\n"
        "from logshift.runtime.file import files\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "try:\n    files.replace(sys.argv[1], bytes(100_000))\n"
        "except OSError as error:\n    print(error.errno, error.filename)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, path], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == f"{errno.EFBIG} {path}", done.stderr
    assert path.read_bytes() == b"old" and names(path) == ["net.stlq"]


def test_directories_that_cannot_be_written(path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        files.replace(path.parent / "nowhere" / "net.stlq", NEW)
    if os.name == "posix" and os.geteuid() != 0:
        path.parent.chmod(0o500)
        with pytest.raises(PermissionError, match=r"net\.stlq"):
            files.replace(path, NEW)
        path.parent.chmod(0o700)
    assert path.read_bytes() == b"old"


def test_what_is_no_file_stays(path):
    with pytest.raises(OSError, match="Not a regular file"):
        files.replace(path.parent, NEW)
    if hasattr(os, "mkfifo"):
        os.mkfifo(path.with_name("pipe"))
        with pytest.raises(OSError, match="Not a regular file.*pipe"):
            files.replace(path.with_name("pipe"), NEW)
        assert path.with_name("pipe").is_fifo()


@pytest.mark.skipif(os.name != "posix", reason="not every user may make links elsewhere")
@pytest.mark.parametrize("exists", [True, False])
def test_links_stay_and_what_they_point_to_is_replaced(way, path, exists):
    link = path.parent / "links" / "latest"
    link.parent.mkdir()
    link.symlink_to(Path("..") / path.name)
    if not exists:
        path.unlink()
    files.replace(link, NEW)
    assert link.is_symlink() and path.read_bytes() == NEW
    assert names(path) == ["links", "net.stlq"] and names(link) == ["latest"]


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")
def test_permissions_are_those_of_any_new_file(way, path):
    before = os.umask(0o027)
    try:
        files.replace(path, NEW)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640


def test_leftovers_of_killed_processes_are_removed(way, path):
    leftover = ".net.stlq.{}.tmp".format
    old, new, other = map(path.with_name, (leftover("0" * 16), leftover("1" * 16), ".net.stlq.own"))
    for file in (old, new, other):
        file.write_bytes(b"")
    hours_ago = time.time() - 2 * 3600
    for file in (old, other):
        os.utime(file, (hours_ago, hours_ago))
    files.replace(path, NEW)
    assert names(path) == sorted([new.name, other.name, path.name])


def test_long_names(way, path):
    name = "ä" * 120 + ".stlq"
    files.replace(path.with_name(name), NEW)
    assert path.with_name(name).read_bytes() == NEW


# Converts in forked children, one after the other, each of which is killed one step later than the
# one before: at reports of progress, and before and after all that is done to files.
KILLER = """
import itertools, json, os, random, signal, sys, time
from pathlib import Path
import onnxruntime, onnxslim  # once, not in every child
from support.onnx_nets import network, noise
from logshift.converter import auto, convert, onnx_model, pipeline, quantize, samples, verify

out, seed = Path(sys.argv[1]), int(sys.argv[2])
model, data = network(), noise(16)

def child(bits, hook=None):
    pid = os.fork()
    if pid == 0:
        if hook:
            for name in ("open", "fsync", "link", "replace"):
                def wrapped(*args, call=getattr(os, name), name=name, **kwargs):
                    hook("before " + name)
                    result = call(*args, **kwargs)
                    hook("after " + name)
                    return result
                setattr(os, name, wrapped)
        convert(model, out, calibration=data, weight_bits=bits,
                progress=(lambda *_: hook("progress")) if hook else False)
        os._exit(0)
    return pid

def result(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def content(path):
    return {old: "old", new: "new"}.get(path.read_bytes(), "broken")

def report(what, status):
    rest = [content(p) for p in out.parent.iterdir() if p != out]
    print(json.dumps([what, status, content(out), rest]), flush=True)
    for p in out.parent.iterdir():
        p.unlink()

start = time.monotonic()
assert result(child(3)) == 0
old = out.read_bytes()
assert result(child(4)) == 0
new, duration = out.read_bytes(), (time.monotonic() - start) / 2
assert old != new
for point in itertools.count():
    out.write_bytes(old)
    passed = itertools.count()
    reader, writer = os.pipe()
    def hook(what):
        if next(passed) == point:
            os.write(writer, what.encode())
            os.kill(os.getpid(), signal.SIGKILL)
    status = result(child(4, hook))
    os.close(writer)
    report(os.read(reader, 100).decode(), status)
    os.close(reader)
    if status == 0:
        break
random.seed(seed)
for _ in range(10):
    out.write_bytes(old)
    pid = child(4)
    time.sleep(random.uniform(0, 1.1 * duration))
    os.kill(pid, signal.SIGKILL)
    report("some time", result(pid))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_conversions_killed_at_every_step_leave_the_old_file_or_the_new_one(tmp_path):
    pytest.importorskip("onnxruntime", reason="converts a model")
    seed = int.from_bytes(os.urandom(4), "little")
    done = subprocess.run(
        [sys.executable, "-c", KILLER, tmp_path / "net.stlq", str(seed)],
        cwd=Path(__file__).parents[1],
        capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    steps = [json.loads(line) for line in done.stdout.splitlines()]
    killed = [what for what, status, *_ in steps if status == -signal.SIGKILL]
    assert {"progress", "before fsync", "after fsync", "before replace", "after replace"} <= {
        *killed
    }
    replaced = False
    for what, status, found, rest in steps:
        assert status in (0, -signal.SIGKILL)
        replaced |= what == "after replace" or status == 0
        if what != "some time":
            assert found == ("new" if replaced else "old"), what
        assert found in ("old", "new"), f"killed at {what}, seed {seed}"
        # What has a name is complete, but for file systems without nameless files.
        assert len(rest) <= 1 and (rest != ["broken"] or "after link" not in killed)


@pytest.mark.parametrize("moment", ["progress", "fsync", "replace"])
def test_conversions_that_are_interrupted(path, monkeypatch, moment):
    pytest.importorskip("onnxruntime", reason="converts a model")
    from support.onnx_nets import network, noise

    from logshift.converter import convert

    def interrupt(*args):
        signal.raise_signal(signal.SIGINT)

    if moment != "progress":
        monkeypatch.setattr(os, moment, interrupt)
    progress = interrupt if moment == "progress" else False
    with pytest.raises(KeyboardInterrupt):
        convert(network(), path, calibration=noise(16), progress=progress)
    assert path.read_bytes() == b"old" and names(path) == ["net.stlq"]


def test_conversions_to_where_no_file_can_be_are_refused_at_once(path, monkeypatch):
    pytest.importorskip("onnxruntime", reason="converts a model")
    from logshift.converter import InputError, convert

    if hasattr(os, "mkfifo"):
        os.mkfifo(path.with_name("pipe"))
        with pytest.raises(InputError, match="pipe.*not a regular file"):
            convert("missing.onnx", path.with_name("pipe"), calibration="nothing")
    monkeypatch.setattr(os, "access", lambda *args: False)  # not even root writes everywhere
    with pytest.raises(InputError, match="cannot be written to"):
        convert("missing.onnx", path, calibration="nothing")
