"""Writing a packed network as C: the plan of one picture, its files, and what they need."""

from __future__ import annotations

import math
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from logshift.kernels.errors import ConversionError, InputError
from logshift.runtime.c_source import convolution, floats, simple
from logshift.runtime.c_source.site import EMITTERS, Options, Site, refused
from logshift.runtime.c_source.source import Source
from logshift.runtime.c_source.tensors import Arena, Tensor, borders, picture
from logshift.runtime.file import format
from logshift.runtime.graph import Graph, Node, Shape, ValueInfo
from logshift.runtime.infer import infer
from logshift.runtime.validate import validate

assert convolution and floats and simple  # they register what they write

LAYOUTS = ("fast", "small")
# Give a tensor another name or shape, and leave its numbers where they are.
_VIEWS = ("Flatten", "Reshape", "Squeeze", "Unsqueeze", "Identity", "Dropout")
_KEYWORDS = (
    "auto break case char const continue default do double else enum extern float for goto if"
    " inline int long register restrict return short signed sizeof static struct switch typedef"
    " union unsigned void volatile while"
).split()


@dataclass(frozen=True)
class Exported:
    """What `export_c` has written.

    Attributes
    ----------
    files : tuple of Path
    name : str
        What names of functions and macros begin with.
    arena_bytes : int
        RAM of all tensors.
    """

    files: tuple[Path, ...]
    name: str
    arena_bytes: int


def export_c(
    packed: Graph | str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    name: str | None = None,
    layout: str = "fast",
    multiply: bool = False,
    codes: bool = False,
    main: bool = False,
) -> Exported:
    """Write a packed network as portable C99 that computes the runtime's bits.

    Parameters
    ----------
    packed : Graph or path of a packed file
    directory : path-like
        Where `NAME.h`, `NAME.c` and with `main` `NAME_main.c` are written; made if there is none.
    name : str, optional
        A C identifier; by default the file's name, "network" of a Graph.
    layout : {"fast", "small"}
        Weights as lists of what to add (two bytes a word), or packed as in the file.
    multiply : bool
        Products in place of shifts and adds, for cores that have a multiplier.
    codes : bool
        Inputs and outputs are uint8 codes where the network has codes of them, not float32.
    main : bool
        Also write a program: inputs, one after the other, from the standard input, outputs to the
        standard output, little-endian.

    Returns
    -------
    Exported

    Raises
    ------
    ConversionError
        If a node cannot be written; names it.
    InputError
        If an argument is none of those above.
    FormatError
        If the packed file is damaged.
    OSError
        If a file cannot be read or written.
    """
    if layout not in LAYOUTS:
        raise InputError(f"layout is {layout!r}; choose one of {', '.join(LAYOUTS)}")
    if name is None:
        name = "network" if isinstance(packed, Graph) else Path(packed).name.split(".")[0]
        name = re.sub(r"\W|^(?=\d)", "_", name, flags=re.ASCII) or "network"
    if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII) or name in _KEYWORDS:
        raise InputError(f"name is {name!r}; it must be an identifier of C")
    graph = packed if isinstance(packed, Graph) else format.read(packed)
    network = _Network(graph, name, Options(layout, multiply), codes)
    texts = {f"{name}.h": network.header(), f"{name}.c": network.code()}
    if main:
        texts[f"{name}_main.c"] = network.main()
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    # All are complete before the first one has its name.
    with tempfile.TemporaryDirectory(prefix=".export", dir=target) as made:
        for file, text in texts.items():
            (Path(made) / file).write_text(text, encoding="ascii")
        for file in texts:
            os.replace(Path(made) / file, target / file)
    return Exported(tuple(target / file for file in texts), name, network.arena_bytes)


class _Network:
    def __init__(self, graph: Graph, name: str, options: Options, codes: bool) -> None:
        validate(graph)
        self.graph, self.name, self.options, self.codes = graph, name, options, codes
        self.shapes, self.batch = _shapes(graph)
        self.alias = {
            node.outputs[0]: node.inputs[0]
            for node in graph.nodes
            if node.op in _VIEWS and (node.is_onnx or node.op == "Flatten")
        }
        self.inputs, self.outputs = self._edges()
        self.nodes = self._needed()
        self.source, self.arena, self.floats = Source(), Arena(), Arena()
        self.tensors: dict[str, Tensor] = {}
        self._plan()

    def root(self, tensor: str) -> str:
        while tensor in self.alias:
            tensor = self.alias[tensor]
        return tensor

    def _edges(self) -> tuple[list[str], list[str]]:
        """Return the tensors that callers give and get; with `codes` those of codes instead."""
        for info in (*self.graph.inputs, *self.graph.outputs):
            if info.dtype != "float32":
                raise ConversionError(
                    f"{info.name!r} is {info.dtype}: only inputs and outputs of float32 are"
                    " exported as C; take a model that casts nothing at its edges"
                )
        inputs = [info.name for info in self.graph.inputs]
        outputs = [self.root(info.name) for info in self.graph.outputs]
        if self.codes:
            readers: dict[str, list[Node]] = {}
            makers = {node.outputs[0]: node for node in self.graph.nodes}
            for node in self.graph.nodes:
                for x in node.inputs:
                    readers.setdefault(self.root(x), []).append(node)
            for i, x in enumerate(inputs):
                found = [n for n in readers.get(x, []) if n.op == "QuantizeLinear"]
                if len(found) == 1 == len(readers[x]):
                    inputs[i] = found[0].outputs[0]
            for i, y in enumerate(outputs):
                if y in makers and makers[y].op == "DequantizeLinear":
                    outputs[i] = makers[y].inputs[0]
        return inputs, outputs

    def _needed(self) -> list[Node]:
        needed, nodes = set(self.outputs), []
        for node in reversed(self.graph.nodes):
            if node.outputs[0] in self.alias or needed.isdisjoint(node.outputs):
                continue
            if node.outputs[0] in self.inputs:
                continue
            if (node.domain, node.op) not in EMITTERS or len(node.outputs) > 1:
                raise refused(
                    node, "has no form in C" + " as an ONNX operator" * node.is_onnx,
                    "a model that ends before it, or does it on codes",
                )  # fmt: skip
            nodes.append(node)
            needed.update(self._sources(node))
        return nodes[::-1]

    def _sources(self, node: Node) -> list[str]:
        """Return the tensors whose values a node reads: of Resize's second only the size counts."""
        return [self.root(x) for x in (node.inputs[:1] if node.op == "Resize" else node.inputs)]

    def _plan(self) -> None:
        graph, edges = self.graph, borders(self.graph, self.nodes, self.shapes)
        last: dict[str, int] = {}
        for index, node in enumerate(self.nodes):
            for x in (*node.inputs, *node.outputs):
                last[self.root(x)] = index
        blocks = []
        arguments = dict(zip(self.inputs, _numbered("x", self.inputs), strict=True))
        results: dict[str, str] = {}
        for y, argument in zip(self.outputs, _numbered("y", self.outputs), strict=True):
            results.setdefault(y, argument)

        def add(tensor: str, index: int) -> Tensor:
            made = Tensor(
                picture(self.shapes[tensor]), edges.get(tensor, (0, 0, 0, 0)),
                graph.quantization.get(tensor),
            )  # fmt: skip
            self.tensors[tensor] = made
            if tensor in arguments and not made.is_bordered:
                made.pointer = arguments[tensor]
            elif tensor in results and not made.is_bordered:
                made.pointer = results[tensor]
            else:
                end = len(self.nodes) if tensor in results else last[tensor]
                is_code = made.quantization is not None
                arena = self.arena if is_code else self.floats
                block = arena.add(made.size * (1 if is_code else 4), index, end)
                blocks.append((made, block))
            return made

        def border(made: Tensor) -> None:
            if made.is_bordered:
                zero = made.quantization.zero_point if made.quantization else 0
                self.source.call(lambda: f"memset({made.pointer}, {zero}, {made.size});")

        for x in self.inputs:
            made = add(x, 0)
            if made.pointer == "":  # codes that are given without the border
                border(made)
                self._copy(made, arguments[x], inward=True)
        for index, node in enumerate(self.nodes):
            inputs = [self.tensors[x] for x in self._sources(node)]
            made = add(node.outputs[0], index)
            border(made)
            site = Site(
                graph,
                node,
                index,
                f"step{index}",
                inputs,
                made,
                self.source,
                self.arena,
                self.options,
                self.shapes,
            )
            EMITTERS[node.domain, node.op](site)
        for y, argument in zip(self.outputs, _numbered("y", self.outputs), strict=True):
            if self.tensors[y].pointer != argument:
                self._copy(self.tensors[y], argument, inward=False)
        self.code_bytes, self.float_bytes = self.arena.arrange(), self.floats.arrange()
        for made, block in blocks:
            if made.quantization is not None:
                made.pointer = f"arena.bytes + {block.offset}"
            else:
                made.pointer = f"reals + {block.offset // 4}"

    def _copy(self, tensor: Tensor, argument: str, inward: bool) -> None:
        c, h, w = tensor.shape
        size = 1 if tensor.quantization is not None else 4
        name = "copy_codes" if size == 1 else "copy_reals"
        self.source.helper(name)
        plane, row = tensor.plane, tensor.row

        def call() -> str:
            inside = f"{tensor.pointer} + {tensor.first}"
            to = f"{inside}, {argument}, {plane}, {row}, {h * w}, {w}"
            if not inward:
                to = f"{argument}, {inside}, {h * w}, {w}, {plane}, {row}"
            return f"{name}({to}, {c}, {h}, {w});"

        self.source.call(call)

    # --- files -----------------------------------------------------------------------------------

    @property
    def arena_bytes(self) -> int:
        return self.code_bytes + self.float_bytes

    def _values(self) -> list[tuple[str, ValueInfo, str, int]]:
        """Argument, declaration, tensor and elements (of one picture) of each input and output."""
        found = []
        for letter, infos, names in (
            ("x", self.graph.inputs, self.inputs), ("y", self.graph.outputs, self.outputs),
        ):  # fmt: skip
            arguments = _numbered(letter, names)
            for argument, info, tensor in zip(arguments, infos, names, strict=True):
                found.append((argument, info, tensor, math.prod(self.tensors[tensor].shape)))
        return found

    def _type(self, tensor: str) -> str:
        return "uint8_t" if self.graph.is_code(tensor) else "float"

    def _signature(self, function: str) -> str:
        arguments = ", ".join(
            f"{'const ' if argument[0] == 'x' else ''}{self._type(tensor)} *{argument}"
            for argument, _, tensor, _ in self._values()
        )
        return f"void {function}({arguments})"

    def header(self) -> str:
        upper = self.name.upper()
        lines = [
            f"/* {self.name}: a network of power-of-two weights, written by logshift.",
            "   One run at a time: the arena is static. */",
            f"#ifndef {upper}_H", f"#define {upper}_H", "", "#include <stdint.h>", "",
            f"#define {upper}_ARENA_BYTES {self.arena_bytes}",
        ]  # fmt: skip
        for argument, info, tensor, size in self._values():
            prefix = f"{upper}_{argument.upper()}"
            shape = " x ".join(map(str, (self.batch, *self.shapes[tensor][1:])))
            name = info.name.encode("ascii", "replace").decode().replace("*/", "* /")
            lines += ["", f"/* {name}: {self._type(tensor)}, {shape} */"]
            lines.append(f"#define {prefix}_SIZE {size * self.batch}")
            if q := self.graph.quantization.get(tensor):
                lines.append(f"#define {prefix}_SCALE {float(q.scale)!r}")
                lines.append(f"#define {prefix}_ZERO_POINT {q.zero_point}")
        lines += ["", "#ifdef __cplusplus", 'extern "C" {', "#endif", ""]
        lines += [
            f"{self._signature(f'{self.name}_run')};",
            "",
            "#ifdef __cplusplus",
            "}",
            "#endif",
        ]
        return "\n".join([*lines, "", "#endif", ""])

    def code(self) -> str:
        head = [
            f"/* {self.name}: written by logshift; see {self.name}.h. */",
            "#include <float.h>", "#include <math.h>", "#include <string.h>", "",
            f'#include "{self.name}.h"', "",
            "#if FLT_EVAL_METHOD != 0", "#error compile with float32 arithmetic (-msse2, not x87)",
            "#endif", "typedef char shifts_keep_the_sign[(-1 >> 1) == -1 ? 1 : -1];", "",
            "/* The words come first: what lies here is aligned for them. */",
            "static union {", f"    uint32_t words[{max(self.code_bytes // 4, 1)}];",
            f"    uint8_t bytes[{max(self.code_bytes, 4)}];", "} arena;",
        ]  # fmt: skip
        if not self.code_bytes:
            head = head[:-4]
        if self.float_bytes:
            head.append(f"static float reals[{self.float_bytes // 4}];")
        calls = [f"    {call()}" for call in self.source.calls]
        signature = self._signature(f"{self.name}_run")
        values = self._values()
        if self.batch > 1:
            advance = ", ".join(f"{argument} += {size}" for argument, _, _, size in values)
            calls = [
                "    int32_t picture;",
                f"    for (picture = 0; picture < {self.batch}; picture++, {advance}) {{",
                *(f"    {call}" for call in calls), "    }",
            ]  # fmt: skip
        body = "\n".join(calls)
        return "\n".join([*head, self.source.text(), f"{signature}\n{{\n{body}\n}}", ""])

    def main(self) -> str:
        values = self._values()
        lines = [
            f"/* Inputs of {self.name} from the standard input, outputs to the standard output. */",
            "#include <stdio.h>",
            "#ifdef _WIN32", "#include <fcntl.h>", "#include <io.h>", "#endif",
            "",
            f'#include "{self.name}.h"', "",
        ]  # fmt: skip
        for argument, _, tensor, size in values:
            lines.append(f"static {self._type(tensor)} {argument}[{size * self.batch}];")
        lines += ["", "int main(void)", "{", "#ifdef _WIN32"]
        lines += ["    _setmode(0, _O_BINARY);", "    _setmode(1, _O_BINARY);", "#endif"]
        for argument, *_ in values:
            if argument[0] == "x":
                lines.append(
                    f"    if (fread({argument}, sizeof {argument}, 1, stdin) != 1) {{\n"
                    f'        fputs("too few inputs\\n", stderr);\n        return 1;\n    }}'
                )
        lines.append(f"    {self.name}_run({', '.join(argument for argument, *_ in values)});")
        for argument, *_ in values:
            if argument[0] == "y":
                lines.append(
                    f"    if (fwrite({argument}, sizeof {argument}, 1, stdout) != 1)\n"
                    "        return 1;"
                )
        return "\n".join([*lines, "    return fflush(stdout) != 0;", "}", ""])


def _numbered(letter: str, names: list[str]) -> list[str]:
    """Return what the arguments for these tensors are called."""
    return [f"{letter}{i}" for i in range(len(names))] if len(names) > 1 else [letter]


def _shapes(graph: Graph) -> tuple[Mapping[str, Shape], int]:
    """Return all tensors' shapes, and how many pictures a run is of: one if that is free."""
    inputs = {}
    for info in graph.inputs:
        free = bool(info.shape) and isinstance(info.shape[0], str)
        inputs[info.name] = (1, *info.nominal[1:]) if free else info.nominal
    shapes = infer(graph, inputs).shapes
    for info in graph.outputs:
        if info.name not in shapes:
            raise ConversionError(
                f"output {info.name!r} has a shape that only a run can tell, which C cannot have;"
                " convert a model that ends before it"
            )
    batches = {shape[0] if shape else 0 for shape in inputs.values()}
    batches |= {shapes[info.name][0] if shapes[info.name] else 0 for info in graph.outputs}
    if len(batches) != 1:
        raise ConversionError(
            "inputs and outputs are of different numbers of pictures; only networks whose first"
            " axis is the batch are exported as C"
        )
    return shapes, batches.pop()
