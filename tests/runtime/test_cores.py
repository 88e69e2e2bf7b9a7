"""How many threads a session uses by default, in made-up and real cgroups."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from logshift.runtime import cores

V1 = "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755"


def mount(at, options="rw,cpu,cpuacct", top="/", kind="cgroup", optional=" shared:9"):
    return f"32 31 0:29 {top} {at} rw,nosuid{optional} - {kind} {kind} {options}"


def mount2(at="/sys/fs/cgroup", top="/"):
    return mount(at, "rw,nsdelegate", top, "cgroup2")


@pytest.fixture
def tree(tmp_path):
    """Make a root directory of the lines of both files in /proc/self and limits of groups."""

    def make(cgroup, mounts, limits):
        proc = tmp_path / "proc/self"
        proc.mkdir(parents=True)
        (proc / "cgroup").write_text("".join(f"{line}\n" for line in cgroup))
        (proc / "mountinfo").write_text("".join(f"{line}\n" for line in mounts))
        for directory, limit in limits.items():
            group = tmp_path / directory.lstrip("/")
            group.mkdir(parents=True, exist_ok=True)
            if isinstance(limit, str):
                (group / "cpu.max").write_text(limit + "\n")
            else:
                (group / "cpu.cfs_quota_us").write_text(f"{limit[0]}\n")
                (group / "cpu.cfs_period_us").write_text(f"{limit[1]}\n")
        return tmp_path

    return make


@pytest.mark.parametrize(
    ("time", "period", "expected"),
    [
        (150_000, 100_000, 2), (50_000, 100_000, 1), (1_000, 100_000, 1), (100_000, 100_000, 1),
        (200_000, 100_000, 2), (200_001, 100_000, 3), (6_400_000, 100_000, 64), (75_000, 50_000, 2),
        (0, 100_000, None), (150_000, 0, None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("version", [1, 2])
def test_quotas_are_rounded_up(tree, version, time, period, expected):
    if version == 1:
        at = "/sys/fs/cgroup/cpu,cpuacct"
        root = tree(["4:cpu,cpuacct:/", "1:name=systemd:/"], [V1, mount(at)], {at: (time, period)})
    else:
        root = tree(["0::/"], [mount2()], {"/sys/fs/cgroup": f"{time} {period}"})
    assert cores.quota(root) == expected


@pytest.mark.parametrize("limit", ["max 100000", "max", (-1, 100000)])
def test_no_quota(tree, limit):
    root = tree(["0::/a", "3:cpu:/a"], [mount2("/two"), mount("/one")],
                {"/two/a": limit, "/one/a": limit})  # fmt: skip
    assert cores.quota(root) is None


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        (("max 100000", "300000 100000", "max 100000"), 3),
        (("400000 100000", "300000 100000", "150000 100000"), 2),
        (("50000 100000", "300000 100000", "200000 100000"), 1),
        ((None, "100000 100000", None), 1),
        ((None, None, None), None),
    ],
)
@pytest.mark.parametrize("version", [1, 2])
def test_nested_groups_give_the_least(tree, version, limits, expected):
    def v1(limit):
        time, period = limit.split()
        return (-1 if time == "max" else int(time), int(period))

    at = "/sys/fs/cgroup/cpu" if version == 1 else "/sys/fs/cgroup"
    groups = (f"{at}/kubepods", f"{at}/kubepods/pod1", f"{at}/kubepods/pod1/container")
    found = {
        group: v1(limit) if version == 1 else limit
        for group, limit in zip(groups, limits, strict=True)
        if limit
    }
    found[f"{at}/kubepods/pod2"] = v1("10000 100000") if version == 1 else "10000 100000"
    path = "/kubepods/pod1/container"
    lines = [f"3:cpu:{path}", "2:cpuset:/other"] if version == 1 else [f"0::{path}"]
    mounts = [V1, mount(at, "rw,cpu")] if version == 1 else [mount2(at)]
    assert cores.quota(tree(lines, mounts, found)) == expected


def test_hybrid_hierarchies(tree):
    at = "/sys/fs/cgroup"
    root = tree(
        ["12:memory:/a", "5:cpu,cpuacct:/a", "0::/a"],
        [V1, mount(f"{at}/memory", "rw,memory"), mount(f"{at}/cpu"), mount2(f"{at}/unified")],
        {f"{at}/cpu/a": (250_000, 100_000), f"{at}/memory/a": (100_000, 100_000)},
    )
    assert cores.quota(root) == 3


def test_a_container_mounts_its_own_group(tree):
    """Docker on cgroup v1 without a namespace: paths are the host's, the mount is the container."""
    top, at = "/docker/0123abcd", "/sys/fs/cgroup/cpu"
    root = tree(
        [f"4:cpu,cpuacct:{top}/sub"], [mount(at, top=top)],
        {at: (150_000, 100_000), f"{at}/sub": (-1, 100_000), at + top: (10_000, 100_000)},
    )  # fmt: skip
    assert cores.quota(root) == 2


@pytest.mark.parametrize(
    ("path", "top"), [("/", "/docker/0123abcd"), ("/", "/.."), ("/../b", "/docker/0123abcd")]
)
@pytest.mark.parametrize("version", [1, 2])
def test_namespaces_hide_the_path(tree, version, path, top):
    at = "/sys/fs/cgroup"
    if version == 1:
        root = tree([f"4:cpu:{path}"], [mount(at, top=top)], {at: (150_000, 100_000)})
    else:
        root = tree([f"0::{path}"], [mount2(at, top)], {at: "150000 100000"})
    assert cores.quota(root) == 2


def test_mounts_of_other_groups_do_not_count(tree):
    root = tree(
        ["4:cpu:/a"], [mount("/other", top="/b"), mount("/own")],
        {"/other": (10_000, 100_000), "/own/a": (300_000, 100_000)},
    )  # fmt: skip
    assert cores.quota(root) == 3


def test_blanks_in_paths_are_escaped(tree):
    root = tree(
        ["0::/my pod"], [mount(r"/cgroup\040two", "rw", kind="cgroup2", optional="")],
        {"/cgroup two/my pod": "100000 100000"},
    )  # fmt: skip
    assert cores.quota(root) == 1


@pytest.mark.parametrize(
    "limit",
    ["", "abc", "100000", "1e5 100000", "-5 100000", "100000 abc", "9" * 5000 + " 1", "\x00 1",
     ("abc", 100_000), (100_000, ""), ("1.5", "1.0")],
)  # fmt: skip
def test_garbage_is_no_quota(tree, limit):
    root = tree(
        ["0::/a", "4:cpu:/a"], [mount2("/two"), mount("/one")], {"/two/a": limit, "/one/a": limit}
    )
    assert cores.quota(root) is None


def test_files_that_make_no_sense_or_cannot_be_read(tree, tmp_path):
    assert cores.quota(tmp_path / "nothing") is None
    root = tree(
        ["", ":", "::", "0::", "0::relative", "x:cpu", "4:cpu:/a"],
        ["", "-", " - ", "1 2 3", "1 2 3 / relative rw - cgroup2 none rw", "1 2 3 / / - cgroup"],
        {},
    )
    assert cores.quota(root) is None
    (root / "proc/self/mountinfo").write_bytes(b"\xff\xfe\x00" * 100)
    assert cores.quota(root) is None
    (root / "proc/self/cgroup").unlink()
    (root / "proc/self/cgroup").mkdir()
    assert cores.quota(root) is None


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("3", 3), (" 3 ", 3), ("4,2", 4), (" 4 , 2 ", 4), ("+2", 2), ("007", 7),
        ("", None), ("0", None), ("-1", None), ("2.5", None), ("two", None), ("4,", None),
        ("4,x", None), ("4,0", None), (",4", None), ("1_0", None), ("9" * 5000, None),
    ],
)  # fmt: skip
def test_openmp_threads(value, expected):
    assert cores.openmp_threads(value) == expected


@pytest.mark.parametrize(
    ("affinity", "quota", "openmp", "expected"),
    [
        (64, None, None, 64), (64, "150000 100000", None, 2), (1, "150000 100000", None, 1),
        (64, "150000 100000", "8", 8), (64, "150000 100000", "1", 1), (4, None, "8,2", 4),
        (64, "150000 100000", "none", 2), (64, None, "0", 64),
    ],
)  # fmt: skip
def test_openmp_before_quota_within_affinity(tree, monkeypatch, affinity, quota, openmp, expected):
    monkeypatch.setattr(cores, "affinity", lambda: affinity)
    root = tree(["0::/"], [mount2()], {"/sys/fs/cgroup": quota or "max 100000"})
    environment = {} if openmp is None else {"OMP_NUM_THREADS": openmp}
    assert cores.default_threads(root, environment) == expected


def test_this_process_has_at_least_one_thread():
    assert 1 <= cores.default_threads() <= cores.affinity()


@pytest.fixture
def real_group():
    """Make a cgroup, v1 or v2, that this process may limit and put processes in."""
    mounts = cores._mounts(cores._read(Path("/proc/self/mountinfo")))
    for version, at, _ in mounts:
        group = Path(at) / f"logshift-test-{os.getpid()}"
        limit, value = [("cpu.cfs_quota_us", "50000"), ("cpu.max", "50000 100000")][version - 1]
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            if (group / limit).exists():
                (group / limit).write_text(value)
                yield group
                return
        except OSError:
            continue
        finally:
            group.rmdir()
    pytest.skip("no cgroup file system whose CPU quota this user may set")


def test_a_real_quota(real_group):
    program = (
        f"open({str(real_group / 'cgroup.procs')!r}, 'w').write('0')\n"
        "from logshift.runtime import cores\n"
        "print(cores.quota(), cores.default_threads())"
    )
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60
    )
    assert result.stdout.split() == ["1", "1"], result.stderr
