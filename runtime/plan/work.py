"""How long kernels take, and how many threads that is worth.

Work is counted in multiplications of a convolution.
"""

from __future__ import annotations

# Of one element of what other kernels compute; of one that is a function, or of a softmax.
ELEMENT, FUNCTION, SOFTMAX = 16, 64, 128
DEPTHWISE = 4  # of one multiplication of a depthwise convolution
PRODUCT = 4  # of one multiplication of float32

# A thread more is worth it for this much work: some microseconds, several times what a meeting at
# the barrier takes.
SHARE = 2**18
_PARTS = 16  # of a thread's share that others may take over


def divided(total: int, threads: int) -> tuple[int, int]:
    """Return how many of the threads some work is worth, and parts of each one's share."""
    homes = max(1, min(total // SHARE, threads))
    return homes, max(1, min(total // homes // (2 * SHARE), _PARTS))  # each claim takes its time
