"""Print digests of what small networks compute: equal lines are equal bits, on any machine.

Each line is `case way digest`: a case is a network and its inputs, or a damaged file; a way is how
it was computed, `reference` or a family of kernels, a kernel that was forced, a number of threads.
Run where logshift is installed, by the side of this directory:

    python -m support.digests reference      what all ways of a case must give
    python -m support.digests products       convolutions of codes, the demo, files that are damaged
    python -m support.digests machine        convolutions of float32 too, and additions and shifts
    python -m support.digests all            every kernel and operator

But for the first a directory may follow, of `.stlq` files and inputs (`.npy`) to run.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from support.float_digest import FLOAT_CONVOLUTIONS, float_convolution, onnx_results, results
from support.graphs import build, random_inputs, random_weights
from support.instruction_set_digest import FUNCTIONS, network

from logshift import converter
from logshift.kernels import registry
from logshift.kernels.errors import FormatError
from logshift.runtime import Session, load
from logshift.runtime.graph import Node, Quantization
from logshift.runtime.plan import planner, prepare, work

FAMILIES = ("auto", "dot", "shift", "portable")
# Whose kernels are others on other instruction sets.
OF_MACHINES = ("dot", "fma", "shift")
DEMO = Path(converter.__file__).parent / "demo"
HOSTILE = Path(__file__).parents[1] / "hostile"

# Output channels, kernel, input channels of a group, groups, stride, dilation, bits of weights and
# of codes, side of the picture
CONVOLUTIONS = {
    "dense": (37, 3, 5, 1, 1, 1, 4, 8, 9),
    "strided": (24, 3, 8, 1, 2, 1, 4, 8, 9),
    "pointwise": (64, 1, 33, 1, 1, 1, 4, 8, 9),
    "classifier": (70, 1, 130, 1, 1, 1, 4, 8, 1),
    "wide weights": (40, 3, 8, 1, 1, 1, 5, 8, 7),
    "few bits": (32, 3, 16, 1, 1, 1, 3, 5, 12),
    "six bits": (20, 3, 16, 1, 1, 1, 3, 6, 11),
    "grouped": (24, 3, 6, 2, 1, 1, 4, 8, 8),
    "depthwise": (40, 3, 1, 40, 1, 1, 4, 8, 17),
    "depthwise, strided": (40, 3, 1, 40, 2, 1, 4, 8, 17),
    "depthwise, large": (33, 5, 1, 33, 1, 1, 4, 8, 13),
    "depthwise, large, strided": (33, 5, 1, 33, 2, 1, 4, 8, 13),
    "depthwise, dilated": (24, 3, 1, 24, 1, 2, 4, 8, 11),
    "depthwise, few bits": (24, 3, 1, 24, 1, 1, 4, 5, 11),
}


def convolution(name):
    """A convolution with a bias, a residual, one of the functions, and a lookup behind it."""
    out, size, depth, group, stride, dilation, bits, width, side = CONVOLUTIONS[name]
    place = list(CONVOLUTIONS).index(name)
    rng = np.random.default_rng(place)
    shift = 2 if bits == 5 else 0
    weights = random_weights(rng, (out, size, size, depth), bits, 0.15, shift)
    count = (side + 2 * (size // 2) - dilation * (size - 1) - 1) // stride + 1
    top = 2**width - 1
    q = {
        "x": Quantization(0.03, top // 3, width), "a": Quantization(0.5, 30, 8),
        "b": Quantization(0.5, 120, 8), "c": Quantization(0.02, 5, 8),
    }  # fmt: skip
    attributes = {
        "pads": [size // 2] * 4, "group": group,
        "strides": [stride] * 2, "dilations": [dilation] * 2,
    }  # fmt: skip
    nodes = [
        Node("QuantizeLinear", "q", ["input"], ["x"]),
        Node("QuantizeLinear", "q_a", ["other"], ["a"]),
        Node("Conv", "conv", ["x", "a"], ["b"], attributes, weights),
        Node("Lookup", "table", ["b"], ["c"]),
        Node("DequantizeLinear", "d", ["c"], ["y"]),
    ]
    nodes[2].bias = rng.standard_normal(out).astype(np.float32)
    nodes[2].activation = FUNCTIONS[place % len(FUNCTIONS)]
    nodes[3].table = rng.integers(0, 256, 256).astype(np.uint8)
    inputs = {"input": (2, depth * group, side, side), "other": (2, out, count, count)}
    return build(nodes, q, inputs, "y")


def printed(case, way, arrays):
    """Print the line of a case and a way."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype} {array.shape}".encode() + array.tobytes())
    print("\t".join((case, way, digest.hexdigest())), flush=True)


class Unsupported(Exception):
    """There is a layer that a kernel does not do."""


@contextlib.contextmanager
def forced(chosen):
    """Let sessions take a kernel for all layers of its kind, or raise Unsupported."""

    def kernel(op, family, layer=None):
        if op != chosen.op:
            return registry.kernel(op, family, layer)
        if layer is not None and not chosen.supports(layer):
            raise Unsupported
        return chosen

    places = (planner, prepare)
    before = [place.kernel for place in places]
    for place in places:
        place.kernel = kernel
    try:
        yield
    finally:
        for place, old in zip(places, before, strict=True):
            place.kernel = old


def of(op, packages):
    """Kernels for an operation that run here, of some packages."""
    return [k for k in registry.kernels() if k.op == op and k.family in packages and k.available()]


def convolutions(families, packages):
    """Every kernel for convolutions of codes, on all layers that it supports.

    Raises
    ------
    AssertionError
        If there is a kernel that supports none.
    """
    kernels = of("conv", packages)
    left = {kernel.name for kernel in kernels}
    for name in CONVOLUTIONS:
        graph = convolution(name)
        inputs = random_inputs(graph)
        for family in families:
            printed(name, family, [Session(graph, kernels=family).run(inputs)])
        for kernel in kernels:
            with forced(kernel), contextlib.suppress(Unsupported):
                session = Session(graph, threads=2, kernels="portable")
                printed(name, kernel.name, [session.run(inputs)])
                left.discard(kernel.name)
    assert not left, f"no case has {', '.join(sorted(left))}"


def float_convolutions(families, packages):
    """Do the same of float32."""
    kernels = of("float_conv", packages)
    left = {kernel.name for kernel in kernels}
    for name in FLOAT_CONVOLUTIONS:
        for family in families:
            printed(f"float {name}", family, [float_convolution(name, family)])
        for kernel in kernels:
            found = float_convolution(name, kernel)
            if found is not None:
                printed(f"float {name}", kernel.name, [found])
                left.discard(kernel.name)
    assert not left, f"no case has {', '.join(sorted(left))}"


def files(families, paths):
    """Networks that are loaded from files, and run with one thread and with two."""
    picture = Image.open(sorted((DEMO / "pictures").glob("*.jpg"))[0])
    for path in paths:
        given = path.with_suffix(".npy")
        x = np.load(given) if given.exists() else picture
        for family in families:
            for threads in (1, 2):
                found = load(path, threads=threads, kernels=family).run(x)
                outputs = list(found.values()) if isinstance(found, dict) else [found]
                printed(path.stem, f"{family}, {threads} threads", outputs)


def damaged(families):
    """What loading files says that must be refused."""
    for path in sorted(HOSTILE.glob("*.stlq")):
        try:
            load(path)
        except FormatError as error:
            message = str(error).replace(str(path), path.name)
            printed(path.name, families[0], [np.frombuffer(message.encode(), np.uint8)])


def operators(families):
    """Every operator: packed ones, on float32, and ONNX's own."""
    graph = network()
    for family in families:
        tensors = Session(graph, kernels=family).trace_codes(random_inputs(graph))
        printed("operators", family, [tensors[name] for name in sorted(tensors)])
        printed("floats", family, results(family))
        printed("ONNX operators", family, onnx_results(family))


def read(text):
    """Return {case: {way: digest}} of what was printed."""
    found: dict[str, dict[str, str]] = {}
    for line in text.splitlines():
        if match := re.fullmatch(r"([^\t]+)\t([^\t]+)\t([0-9a-f]{64})", line):
            found.setdefault(match[1], {})[match[2]] = match[3]
    return found


if __name__ == "__main__":
    work.SHARE = 1  # all threads work on networks that are far too small for it
    what, *directories = sys.argv[1:]
    families, packages = {
        "reference": (("reference",), ()),
        "products": (("auto",), ("dot",)),
        "machine": (("auto", "shift"), OF_MACHINES),
        "all": (FAMILIES, (*OF_MACHINES, "portable", "reference")),
    }[what]
    convolutions(families, packages)
    files(families, sorted(DEMO.glob("*.stlq")))
    damaged(families)
    if what != "products":
        float_convolutions(families, packages)
    if what in ("reference", "all"):
        operators(families)
    for directory in directories:
        files(families, sorted(Path(directory).glob("*.stlq")))
