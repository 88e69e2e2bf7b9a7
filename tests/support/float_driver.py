"""Calls float32 kernels directly, through argument records."""

from __future__ import annotations

import numpy as np

from logshift.kernels import records
from logshift.kernels.layer import FloatLayer
from logshift.kernels.machine.memory import aligned
from logshift.runtime import executor

NOTHING = (0, 0, 0, 0)


class Picture:
    """A float32 tensor (N, H, W, C) inside a border (top, left, bottom, right)."""

    def __init__(self, array, border=NOTHING, around=0.0):
        n, h, w, c = array.shape
        top, left, bottom, right = border
        self.buffer = aligned((n, top + h + bottom, left + w + right, c), array.dtype)
        self.buffer[:] = around
        self.top, self.left, self.size = top, left, (h, w)
        self.inside[:] = array

    @property
    def inside(self):
        """The picture without its border."""
        h, w = self.size
        return self.buffer[:, self.top : self.top + h, self.left : self.left + w]

    def record(self):
        """TENSOR record."""
        record = np.zeros((), records.TENSOR)
        record["data"] = self.buffer.ctypes.data
        record["n"], record["h"], record["w"], record["c"] = self.buffer.shape
        record["top"], record["left"] = self.top, self.left
        return record


def program(kernel, arguments, threads):
    """Program of one call, and what it needs to stay alive."""
    scratch = aligned((0,), np.uint8)
    if kernel.scratch is not None:
        size = -(-int(kernel.scratch(arguments[0])) // 64) * 64
        scratch = aligned((size * threads,), np.uint8)
        arguments["scratch"], arguments["scratch_size"] = scratch.ctypes.data, size
    row = [[kernel.address, arguments.ctypes.data, threads, 3]]
    return np.array(row, np.int64), scratch


def call(kernel, threads, tensors, **fields):
    """Call a kernel; `tensors` maps record fields to pictures."""
    arguments = np.zeros(1, kernel.record)
    for key, value in fields.items():
        arguments[key] = value.ctypes.data if isinstance(value, np.ndarray) else value
    for key, picture in tensors.items():
        arguments[key] = picture.record()
    steps, scratch = program(kernel, arguments, threads)
    executor.team(threads).run(steps)
    del scratch


def sizes(picture):
    """Fields n, height, width, channels of an output."""
    n, h, w, c = picture.inside.shape
    return {"n": n, "height": h, "width": w, "channels": c}


def convolution(kernel, layer: FloatLayer, x, y, r=None, *, at=(0, 0), lo=-np.inf, hi=np.inf):
    """Argument record of a convolution, and what it needs to stay alive.

    `at` is where the first window begins, from the first pixel of x on.
    """
    arguments = np.zeros(1, kernel.record)
    a = arguments[0]
    for key, value in sizes(y).items():
        a[key] = value
    a["x"], a["y"] = x.record(), y.record()
    if r is not None:
        a["r"], a["has_residual"] = r.record(), 1
    a["kernel_h"], a["kernel_w"] = layer.weights.shape[1:3]
    a["stride_h"], a["stride_w"] = layer.strides
    a["dilation_h"], a["dilation_w"] = layer.dilations
    a["row0"], a["column0"] = x.top + at[0], x.left + at[1]
    a["step_h"] = a["step_w"] = 1
    a["group"], a["lo"], a["hi"] = layer.group, lo, hi
    return arguments, kernel.pack(layer).place(arguments)
