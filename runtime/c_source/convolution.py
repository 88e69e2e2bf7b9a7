"""Convolutions of codes: patches of some pixels, the words of each output channel, its codes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from logshift.kernels.stlq.codec import LogWeights
from logshift.runtime.c_source import curves, words
from logshift.runtime.c_source.fixed import fixed
from logshift.runtime.c_source.helpers import PIXELS, PRODUCTS
from logshift.runtime.c_source.requantize import (
    Scale,
    activated,
    clamp_of,
    rows_of,
    scale,
    scaling,
)
from logshift.runtime.c_source.site import Site, emits, refused
from logshift.runtime.c_source.source import number
from logshift.runtime.operators.base import bounds, target_of
from logshift.runtime.operators.conv import phases
from logshift.runtime.plan.convolution import Phase

_UNROLLED = 64  # positions of a kernel that are written out
_LARGEST = 2**31 - 1


def _parts(site: Site) -> Iterator[tuple[LogWeights, np.ndarray, Phase]]:
    """Yield weights, their output channels and their places; phases side by side are several."""
    node = site.node
    assert node.weights is not None
    weights = node.weights.words()  # those of a file are decoded once
    for taps, phase in phases(node):
        if taps is ...:
            yield weights, np.arange(weights.shape[0]), phase
            continue
        channels = taps[0].ravel()
        count = len(channels) // phase.pixels
        first, second = weights.first[taps], weights.second[taps]
        for pixel in range(phase.pixels):
            own = slice(pixel * count, (pixel + 1) * count)
            part = replace(
                weights, first=first[own], second=second[own], alpha=weights.alpha[channels[own]]
            )
            begin = phase.begin[0], phase.begin[1] + pixel
            yield part, channels[own], replace(phase, begin=begin, pixels=1)


@emits("Conv", "ConvTranspose")
def _conv(site: Site) -> None:
    q_x = site.inputs[0].quantization
    if q_x is None or site.node.weights is None:
        raise refused(
            site.node, "multiplies float32", "activation_bits=8 and nothing in keep_float"
        )
    for number_of, (weights, channels, phase) in enumerate(_parts(site)):
        _Part(site, weights, channels, phase, f"{site.name}_{number_of}").write()


class _Part:
    """One phase of a convolution, as a C function of its own."""

    def __init__(
        self, site: Site, weights: LogWeights, channels: np.ndarray, phase: Phase, name: str
    ) -> None:
        self.site = site = replace(site, name=name)
        self.weights, self.channels, self.phase, self.name = weights, channels, phase, name
        self.x, self.y = site.inputs[0], site.output
        self.r = site.inputs[1] if len(site.inputs) > 1 else None
        self.group = site.node.attributes["group"]
        _, self.kh, self.kw, self.in_group = weights.shape
        self.out_group = len(channels) // self.group
        self.k = self.kh * self.kw * self.in_group
        self.height, self.width = (phase.count(axis, self.y.shape[1 + axis]) for axis in (0, 1))
        self.pixels = self.height * self.width
        self.depthwise = self.in_group == 1 and self.group > 1
        self.multiply = site.options.multiply
        self.block = PRODUCTS if self.multiply or self.depthwise else PIXELS
        if self.pixels < self.block and not self.depthwise:
            self.block = 1
        q_x = self.x.quantization
        assert q_x is not None
        self.q_x = q_x

    def write(self) -> None:
        if self.pixels <= 0:
            return
        site, node = self.site, self.site.node
        to, assumed = target_of(site.graph, node), node.bias
        assert assumed is not None
        w = words.channels_first(self.weights.integers()).astype(np.int64)
        sums, top = w.sum(1), self.q_x.top
        least, most = np.minimum(w, 0).sum(1) * top, np.maximum(w, 0).sum(1) * top
        offset = self.q_x.zero_point * sums
        if np.abs([least, most, least - offset, most - offset]).max(initial=0) > _LARGEST:
            raise refused(node, "has sums of more than 32 bits", "fewer weight_bits")
        m = (self.q_x.scale * self.weights.unit() / to.unit).astype(np.float32)
        b = (assumed[self.channels].astype(np.float64) / to.unit + to.zero).astype(np.float32)
        zero, factor, residual = 0, np.float32(0), None
        if self.r is not None:
            q_r = self.r.quantization
            if q_r is None:
                raise refused(node, "adds a tensor of float32", "nothing in keep_float")
            zero, factor = q_r.zero_point, np.float32(q_r.scale / to.unit)
            residual = (np.arange(256) - zero) * float(factor)
        is_code = self.y.quantization is not None
        lo, hi = clamp_of(site) if is_code else (0, 0)
        plain = is_code and not to.kind
        ends = (lo, hi) if plain else curves.span(to, hi)
        form = fixed(m, b, offset, least, most, *(ends or (0, 0)), residual, self.multiply)
        found = curves.curve(to, form, lo, hi) if to.kind and ends is not None else None
        self.curve = ""
        if plain:
            self.scale = scale(site, form, zero, float(factor))
        elif found is not None:
            self.scale, self.curve = curves.write(site, form, found, zero, float(factor))
        else:
            self.scale = Scale("", rows_of(site, form))
        self.to, self.plain, self.lo, self.hi = to, plain, lo, hi
        self.zero, self.factor = zero, float(factor)
        self._function()

    def _function(self) -> None:
        site, block = self.site, self.block
        lines: list[str] = []
        starts: dict[str, int] = {}
        count = -(-self.pixels // block)
        self.single = block == 1
        kind = "uint8_t" if self.y.quantization is not None else "float"
        tensors = {"x": (self.x, self.phase.first, self.phase.strides)}
        place = self.phase.begin, self.phase.steps
        tensors["y"] = (self.y, *place)
        if self.r is not None:
            tensors["r"] = (self.r, *place)
        lines.append(f"    int32_t n, j, o, column = 0, sums[{block}];")
        for name, (tensor, first, _) in tensors.items():
            starts[name] = tensor.first + first[0] * tensor.row + first[1]
            lines.append(f"    int32_t at_{name}[{block}], {name}0 = {starts[name]};")
        scratch = None
        if not self.depthwise and not self._is_patch:
            size = 1 if self.single else PRODUCTS if self.multiply else 2 * PIXELS
            scratch = site.scratch(self.k * size // 4 * 4 + 4)
        lines.append(f"    for (n = 0; n < {count}; n++) {{")
        rest = self.pixels % block
        if rest and count > 1:  # the last ones once more, with some before them
            last = self.pixels - block
            i, j = divmod(last, self.width)
            moved = [f"column = {j};"]
            for name, (tensor, _, steps) in tensors.items():
                start = starts[name] + i * steps[0] * tensor.row + j * steps[1]
                moved.append(f"{name}0 = {start};")
            lines.append(f"        if (n == {count - 1}) {{")
            lines += [f"            {move}" for move in moved] + ["        }"]
        lines.append(f"        for (j = 0; j < {block}; j++) {{")
        lines += [f"            at_{name}[j] = {name}0;" for name in tensors]
        advance = [f"{name}0 += {steps[1]};" for name, (_, _, steps) in tensors.items()]
        skip = [
            f"{name}0 += {steps[0] * tensor.row - self.width * steps[1]};"
            for name, (tensor, _, steps) in tensors.items()
        ]
        if rest and count == 1:  # fewer pixels than are computed at once: the last one again
            lines.append(f"            if (j >= {self.pixels - 1})\n                continue;")
        lines += [f"            {line}" for line in advance]
        lines.append(f"            if (++column == {self.width}) {{\n                column = 0;")
        lines += [f"                {line}" for line in skip] + ["            }", "        }"]
        lines += self._rows()
        if not self.k:  # what no position of the kernel reaches
            lines += ["        (void)x;", "        (void)at_x;"]
        lines.append("    }")
        parameters = "const uint8_t *x, "
        parameters += "const uint8_t *r, " if self.r is not None else ""
        parameters += f"{kind} *restrict y"
        values = [lambda: self.x.pointer]
        if self.r is not None:
            values.append(lambda: self.r.pointer)  # type: ignore[union-attr]
        values.append(lambda: self.y.pointer)
        if scratch is not None:
            kind = "uint8_t" if self.single or self.multiply else "uint32_t"
            parameters += f", {kind} *restrict patch"
            whole = "arena.bytes + " if kind == "uint8_t" else "arena.words + "
            unit = 1 if kind == "uint8_t" else 4
            values.append(lambda: f"{whole}{scratch.offset // unit}")
        site.write("\n".join(lines), parameters, *values)

    @property
    def _is_patch(self) -> bool:
        """Whether a pixel's input lies in the order of the weights already."""
        x = self.x
        return (
            self.single
            and self.pixels == 1
            and (x.row == self.kw or self.kh == 1)
            and self.phase.dilations[1] == 1
            and (self.phase.dilations[0] == 1 or self.kh == 1)
            and (x.plane == self.kh * self.kw or self.in_group == 1)
            and self.kw >= 1
        )

    def _offsets(self) -> np.ndarray:
        rows = np.arange(self.kh) * self.phase.dilations[0] * self.x.row
        columns = np.arange(self.kw) * self.phase.dilations[1]
        return (rows[:, None] + columns).reshape(-1)

    # --- rows -------------------------------------------------------------------------------------

    def _rows(self) -> list[str]:
        """Return the loops over groups and output channels of some pixels."""
        call, table, kind = self._weights()
        lines = ["        {", f"        const struct row *w = {self.scale.rows};"]
        lines.append(f"        const {kind} *p = {table};")
        planes = {"y": self.y.plane}
        if self.r is not None:
            planes["r"] = self.r.plane
        lines += [f"        int32_t {name}_plane = 0;" for name in planes]
        inner = f"for (o = 0; o < {self.out_group}; o++, w++) {{"
        if self.group > 1:
            lines.append("        int32_t g, of = 0;")
            lines.append(
                f"        for (g = 0; g < {self.group}; g++,"
                f" of += {self.in_group * self.x.plane}) {{"
            )
        of = "x + of" if self.group > 1 else "x"
        if not self.depthwise:
            lines += [f"            {line}" for line in self._gather(of)]
        lines.append(f"            {inner}")
        lines.append(f"                p = {call.format(x=of, patch=self._patch(of))};")
        lines += [f"                {line}" for line in self._finish()]
        lines += [f"                {name}_plane += {plane};" for name, plane in planes.items()]
        lines.append("            }")
        if self.group > 1:
            lines.append("        }")
        return [*lines, "        }"]

    def _patch(self, of: str) -> str:
        return f"{of} + at_x[0]" if self._is_patch else "patch"

    def _weights(self) -> tuple[str, str, str]:
        """Return the call that sums up a row, the table that it reads, and the type of that."""
        site, rows, name = self.site, len(self.channels), f"{self.name}_words"
        table = site.source.table
        if self.multiply:
            w = words.channels_first(self.weights.integers())
            largest = np.abs(w.astype(np.int64)).max(initial=0)
            wide = next(bits for bits in (8, 16, 32) if largest < 2 ** (bits - 1))
            values = w.astype(f"int{wide}")
            kind = f"int{wide}_t"
            if self.depthwise:
                site.helper("taps_products", width=wide)
                offsets = table(self._offsets().astype(np.int32), f"{self.name}_taps")
                call = f"taps_products{wide}({{x}}, at_x, {offsets}, {self.k}, p, sums)"
            else:
                helper = "product" if self.single else "products"
                site.helper(helper, width=wide)
                call = f"{helper}{wide}({{patch}}, p, {self.k}, sums)"
            return call, table(values, name), kind
        found = words.Words.of(self.weights)
        if self.depthwise:
            lines = list(words.taps(found, rows, self._offsets()))
            values, wide = _narrow([n for line in lines for n in line])
            site.helper("taps", width=wide)
            return f"taps{wide}({{x}}, at_x, p, sums)", table(values, name), f"uint{wide}_t"
        if site.options.layout == "small":
            bits, shift = self.weights.bits, self.weights.residual_shift
            values = np.frombuffer(b"".join(words.packed(self.weights)), np.uint8)
            helper = "small_single" if self.single else "small"
            numbers = {"bits": bits, "mask": 2**bits - 1}
            if not self.single:
                numbers["chunk"] = words.CHUNK
            site.helper(helper, **numbers)
            call = f"{helper}{bits}({{patch}}, p, {self.k}, {shift}, sums)"
            return call, table(values, name), "uint8_t"
        unit = 1 if self.single else 2 * PIXELS
        lines = list(words.programs(found, rows, self.q_x.top, unit))
        values, wide = _narrow([n for line in lines for n in line])
        helper = "single" if self.single else "sums"
        site.helper(helper, width=wide)
        return f"{helper}{wide}({{patch}}, p, sums)", table(values, name), f"uint{wide}_t"

    def _gather(self, of: str) -> list[str]:
        """Return what brings the inputs of some pixels where a row's words look for them."""
        if self._is_patch or not self.k:
            return []
        offsets, plane = self._offsets(), self.x.plane
        loop = f"for (c = 0; c < {self.in_group}; c++"
        if self.single or self.multiply:
            step = 1 if self.single else PRODUCTS
            head = ["{", "uint8_t *q = patch;"]
            if self.single:
                head += ["int32_t c;", f"const uint8_t *a = {of} + at_x[0];"]
            else:
                head += [
                    "int32_t c, i;",
                    f"for (i = 0; i < {PRODUCTS}; i++) {{",
                    f"    const uint8_t *a = {of} + at_x[i];",
                    "    q = patch + i;",
                ]
            body = self._taken(offsets, step, lambda o: f"a[{o}]")
            lines = [*head, f"    {loop}, a += {plane}, q += {step * len(offsets)}) {{"]
            lines += [f"        {line}" for line in body] + ["    }"]
            return [*lines, *([] if self.single else ["}"]), "}"]
        lines = ["{", "int32_t c, i;", f"for (i = 0; i < {PIXELS}; i += 2) {{"]
        lines += [f"    const uint8_t *a = {of} + at_x[i], *b = {of} + at_x[i + 1];"]
        lines += ["    uint32_t *q = patch + (i >> 1);"]
        lines += [f"    {loop}, a += {plane}, b += {plane}, q += {PIXELS // 2 * len(offsets)}) {{"]
        taken = self._taken(offsets, PIXELS // 2, lambda o: f"a[{o}] | (uint32_t)b[{o}] << 16")
        return [*lines, *(f"        {line}" for line in taken), "    }", "}", "}"]

    def _taken(self, offsets: np.ndarray, step: int, value: Callable[[object], str]) -> list[str]:
        if len(offsets) <= _UNROLLED:
            return [f"q[{i * step}] = {value(int(o))};" for i, o in enumerate(offsets)]
        down, right = self.phase.dilations[0] * self.x.row, self.phase.dilations[1]
        return [
            "int32_t k, l, s = 0, t = 0;",
            f"for (k = 0; k < {self.kh}; k++, s += {down - self.kw * right})",
            f"    for (l = 0; l < {self.kw}; l++, s += {right}, t += {step})",
            f"        q[t] = {value('s')};",
        ]

    def _finish(self) -> list[str]:
        """Return what makes outputs of the sums of some pixels."""
        site, block = self.site, self.block
        pointer = f"&{self.scale.scale}"
        residual = self.r is not None
        if self.plain:
            end = "_residual" if residual else ""
            more = ", r + r_plane, at_r" if residual else ""
            if block == 1:
                scaling(site, "scale1")
                site.helper(f"settle{end}")
                more = ", r[r_plane + at_r[0]]" if residual else ""
                return [
                    f"y[y_plane + at_y[0]] = settle{end}({pointer}, w, sums[0],"
                    f" scale1({pointer}, w, sums[0]){more});"
                ]
            scaling(site, "scale4")
            site.helper(f"finish4{end}")
            lines = []
            for half in range(0, block, 4):
                at = f" + {half}" if half else ""
                more = f", r + r_plane, at_r{at}" if residual else ""
                lines.append(f"finish4{end}({pointer}, w, sums{at}, y + y_plane, at_y{at}{more});")
            return lines
        site.helper("linear")
        lines = ["v = linear((float)(sums[j] - w->offset), w->m, w->b);"]
        if residual:
            lines.append(
                f"v = linear((float)((int32_t)r[r_plane + at_r[j]] - {self.zero}),"
                f" {number(self.factor)}, v);"
            )
        if self.y.quantization is None:
            limits = bounds(site.node, None)
            site.helper("bounded")
            low, high = (number(float(np.float32(limits[key]))) for key in ("lo", "hi"))
            value = f"bounded(v, {low}, {high})"
        else:
            slope = ""
            if self.to.slopes is not None:
                assert site.node.bias is not None
                slopes = np.full(len(site.node.bias), self.to.slopes)[self.channels]
                table = site.source.table(slopes.astype(np.float32), f"{self.name}_slopes")
                slope = f"{table}[w - {self.scale.rows}]"
            value = activated(site, self.to, "v", self.lo, self.hi, slope)
        loop, to = f"for (j = 0; j < {block}; j++) {{", "y[y_plane + at_y[j]]"
        if not self.curve:
            inner = ["float v;", *lines, f"{to} = {value};"]
            return [loop, *(f"    {line}" for line in inner), "}"]
        return ["{", *(f"    {line}" for line in self._looked_up(loop, to, lines, value)), "}"]

    def _looked_up(self, loop: str, to: str, lines: list[str], value: str) -> list[str]:
        """Return what looks outputs up in the curve, and computes by `lines` those in doubt."""
        site, block, pointer = self.site, self.block, f"&{self.scale.scale}"
        if block == 1:
            scaling(site, "scale1")
            scaled = [f"uint32_t u[1] = {{scale1({pointer}, w, sums[0])}};"]
        else:
            scaling(site, "scale4")
            scaled = [f"uint32_t u[{block}];"]
            scaled += [f"scale4({pointer}, w, sums + {i}, u + {i});" for i in range(0, block, 4)]
        added = ""
        if self.r is not None:
            added = f" + (uint32_t){self.scale.scale}.residual[r[r_plane + at_r[j]]]"
        inner = [
            f"int32_t code = curved(&{self.curve}, (int32_t)(u[j]{added}));",
            "if (code < 0) {", "    float v;", *(f"    {line}" for line in lines),
            f"    code = {value};", "}", f"{to} = (uint8_t)code;",
        ]  # fmt: skip
        return [*scaled, loop, *(f"    {line}" for line in inner), "}"]


def _narrow(numbers: list[int]) -> tuple[np.ndarray, int]:
    """Return numbers in the narrowest of two types, and its width."""
    wide = 32 if max(numbers, default=0) >= 2**16 else 16
    return np.array(numbers, f"uint{wide}"), wide
