"""Runs of mixed sizes on one session from several threads, beside busy processes; prints JSON.

    cd tests; python -m support.soak --threads 8 --runs 10000 --busy 2

Every thread runs that often; resident memory is read when each has done `--early` runs, and at the
end. There are more sizes than a session keeps plans for.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
from support.packed_nets import small_network

from logshift.runtime import Session

SIZES = [(n, h, h + w) for n in (1, 2) for h in (16, 24, 33, 64) for w in (0, 7, 16)]
_BUSY = "import os\nparent = os.getppid()\nwhile os.getppid() == parent:\n    sum(range(100000))"


def resident() -> int:
    """Bytes of resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--early", type=int, default=1_000, help="runs of a thread, then memory")
    parser.add_argument("--busy", type=int, default=2)
    a = parser.parse_args()
    session, rng = Session(small_network(), threads=2), np.random.default_rng(0)
    inputs = [rng.standard_normal((n, 3, h, w), np.float32) for n, h, w in SIZES]
    alone = Session(small_network(), threads=1)
    expected = [alone.run(x) for x in inputs]
    busy = [subprocess.Popen([sys.executable, "-c", _BUSY]) for _ in range(a.busy)]
    wrong, memory = [], [0, 0]
    meeting = threading.Barrier(a.threads)

    def work(seed: int) -> None:
        choose = random.Random(seed)
        for runs, index in ((a.early, 0), (a.runs - a.early, 1)):
            for _ in range(runs):
                k = choose.randrange(len(inputs))
                if not np.array_equal(session.run(inputs[k]), expected[k]):
                    wrong.append(k)
            if meeting.wait() == 0:
                memory[index] = resident()
            meeting.wait()

    try:
        workers = [threading.Thread(target=work, args=(i,)) for i in range(a.threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        for process in busy:
            process.kill()
            process.wait()
    print(json.dumps({"wrong": len(wrong), "early": memory[0], "end": memory[1]}))


if __name__ == "__main__":
    main()
