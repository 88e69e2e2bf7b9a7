"""Other ways from a network to a microcontroller, to compare `logshift export --format c` with.

onnx2c (https://github.com/kraiskil/onnx2c) writes C of ONNX: here of QLinearConv, int8 as
onnxruntime quantizes. TensorFlow Lite for Microcontrollers
(https://github.com/tensorflow/tflite-micro) interprets an int8 model with the kernels of its
reference, or of CMSIS-NN. Neither is on PyPI: `docs/microcontrollers.md` says how to get them.
"""

from __future__ import annotations

import math
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from benchmarks.targets import HERE, Target, compiled
from logshift.converter.export import export
from logshift.runtime.file import format
from logshift.runtime.graph import Graph, Node

_SAMPLES = 8
ARENA = 2**19  # bytes; what a network uses of it is measured
_OPERATORS = ("Conv2D", "DepthwiseConv2D", "Add", "Pad", "Mean", "Reshape")
# What those take of the sources in tensorflow/lite, but for kernels that CMSIS-NN has too.
_CORE = """
micro/flatbuffer_utils micro/memory_helpers micro/micro_allocation_info micro/micro_allocator
micro/micro_context micro/micro_interpreter micro/micro_interpreter_context
micro/micro_interpreter_graph micro/micro_log micro/micro_op_resolver
micro/micro_resource_variable micro/micro_utils micro/memory_planner/greedy_memory_planner
micro/memory_planner/linear_memory_planner
micro/arena_allocator/non_persistent_arena_buffer_allocator
micro/arena_allocator/persistent_arena_buffer_allocator
micro/arena_allocator/single_arena_buffer_allocator
micro/tflite_bridge/flatbuffer_conversions_bridge micro/tflite_bridge/micro_error_reporter
micro/kernels/kernel_util micro/kernels/add_common micro/kernels/conv_common
micro/kernels/depthwise_conv_common micro/kernels/pad_common micro/kernels/reduce
micro/kernels/reduce_common micro/kernels/reshape micro/kernels/reshape_common kernels/kernel_util
kernels/internal/common kernels/internal/portable_tensor_utils
kernels/internal/quantization_util kernels/internal/runtime_shape
kernels/internal/tensor_ctypes core/api/flatbuffer_conversions core/api/tensor_utils
core/c/common array ../compiler/mlir/lite/core/api/error_reporter
../compiler/mlir/lite/schema/schema_utils
""".split()
KERNELS = ("reference", "CMSIS-NN")
_REPLACED = ("add", "conv", "depthwise_conv", "pad")
_CMSIS = ("BasicMath", "Convolution", "NNSupport", "Pad")
_FLAGS = (  # of the project's Makefile, a release
    "-O2", "-DNDEBUG", "-DTF_LITE_STATIC_MEMORY", "-DTF_LITE_STRIP_ERROR_STRINGS",
    "-ffunction-sections", "-fdata-sections", "-fno-unwind-tables",
    "-fno-asynchronous-unwind-tables",
)  # fmt: skip
_CXX = ("-std=c++17", "-fno-rtti", "-fno-exceptions", "-fno-threadsafe-statics")


def samples(graph: Graph) -> list[np.ndarray]:
    """Return inputs for calibration, float32, one picture each."""
    shape = (1, *graph.inputs[0].nominal[1:])
    rng = np.random.default_rng(1)
    return [rng.standard_normal(shape).astype(np.float32) for _ in range(_SAMPLES)]


# --- onnx2c ---------------------------------------------------------------------------------------


def onnx2c(program: Path, graph: Graph, directory: Path) -> None:
    """Write `net.c` and `net.h` of a network as onnx2c has it: int8, but float32 at its edges."""
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    packed, plain, quantized = (directory / f"net.{kind}" for kind in ("stlq", "onnx", "int8.onnx"))
    format.write(graph, packed)
    export(packed, plain)
    model = _without_quantization(onnx.load(plain))
    name = model.graph.input[0].name
    onnx.save(model, plain)
    quant_pre_process(str(plain), str(plain))

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.given = iter([{name: x} for x in samples(graph)])

        def get_next(self) -> dict[str, np.ndarray]:
            return next(self.given, {})

    # Its average and its matrix product know no codes.
    quantize_static(
        str(plain), str(quantized), Reader(), quant_format=QuantFormat.QOperator,
        activation_type=QuantType.QInt8, weight_type=QuantType.QInt8,
        op_types_to_quantize=["Conv", "Add", "Relu"],
    )  # fmt: skip
    text = subprocess.run([program, quantized], capture_output=True, text=True, check=True).stdout
    shape, outputs = model.graph.input[0].type.tensor_type.shape, model.graph.output[0].type
    sizes = [d.dim_value for d in shape.dim]
    last = [d.dim_value for d in outputs.tensor_type.shape.dim]
    of = lambda dims: "".join(f"[{n}]" for n in dims)  # noqa: E731
    (directory / "net.c").write_text(
        f'#include "net.h"\n{text}\nvoid net_run(const float *x, float *y)\n'
        f"{{\n    entry((const float (*){of(sizes[1:])})x, (float (*){of(last[1:])})y);\n}}\n"
    )
    _header(directory, math.prod(sizes), math.prod(last), "float", "float")


def _without_quantization(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model of one picture whose activations are float32, not rounded to codes."""
    other: dict[str, str] = {}
    kept = []
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = other.get(name, name)
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            other[node.output[0]] = node.input[0]
        else:
            kept.append(node)
    del model.graph.node[:]
    model.graph.node.extend(kept)
    for info in (*model.graph.input, *model.graph.output):
        info.type.tensor_type.shape.dim[0].dim_value = 1
    return model


# --- TensorFlow Lite for Microcontrollers ---------------------------------------------------------


def tflite(graph: Graph) -> bytes:
    """Return a network as an int8 model of TensorFlow Lite, whose scales it calibrates itself."""
    import tensorflow as tf

    layers = tf.keras.layers
    _, c, h, w = graph.inputs[0].nominal
    values: dict[str, Any] = {}
    given = tf.keras.Input((h, w, c), batch_size=1)
    values[graph.inputs[0].name] = given
    for node in graph.nodes:
        x = values[node.inputs[0]]
        if node.op == "Conv":
            x = _convolution(layers, node, x)
            if len(node.inputs) > 1:
                x = layers.Add()([x, values[node.inputs[1]]])
            if node.attributes["clamp"][0] == 0:
                x = layers.ReLU()(x)
        elif node.op == "GlobalAveragePool":
            x = layers.GlobalAveragePooling2D(keepdims=True)(x)
        elif node.op == "Flatten":
            x = layers.Flatten()(x)
        else:
            assert node.op == "QuantizeLinear", node.op
        values[node.outputs[0]] = x
    model = tf.keras.Model(given, values[graph.outputs[0].name])
    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = lambda: ([x.transpose(0, 2, 3, 1)] for x in samples(graph))
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    converter.inference_input_type = converter.inference_output_type = tf.int8
    return converter.convert()


def _convolution(layers: Any, node: Node, x: Any) -> Any:
    words, attributes = node.weights, node.attributes
    assert words is not None and node.bias is not None
    w = (words.integers() * words.unit()[:, None, None, None]).astype(np.float32)
    top, left, bottom, right = attributes["pads"]
    kernel, strides = w.shape[1:3], attributes["strides"]
    same = strides == [1, 1] and top + bottom == kernel[0] - 1 and left + right == kernel[1] - 1
    if not same and any(attributes["pads"]):
        x = layers.ZeroPadding2D(((top, bottom), (left, right)))(x)
    padding = "same" if same else "valid"
    if attributes["group"] > 1:
        layer = layers.DepthwiseConv2D(kernel, strides, padding)
        w = w.transpose(1, 2, 0, 3)
    else:
        layer = layers.Conv2D(len(w), kernel, strides, padding)
        w = w.transpose(1, 2, 3, 0)
    y = layer(x)
    layer.set_weights([w, node.bias])
    return y


class TfliteMicro:
    """A checkout with what `make third_party_downloads` brings, compiled for cores when asked.

    Parameters
    ----------
    sources : Path
    objects : Path
        Directory of what has been compiled.
    """

    def __init__(self, sources: Path, objects: Path) -> None:
        self.sources, self.objects = sources, objects
        self.downloads = sources / "tensorflow/lite/micro/tools/make/downloads"

    def write(self, model: bytes, sizes: tuple[int, int], directory: Path) -> None:
        """Write `net.h` and the model as C; outputs have four bytes more, see `tflite_micro.cc`."""
        numbers = ",".join(map(str, model))
        (directory / "model.c").write_text(
            f"__attribute__((aligned(16))) const unsigned char net_model[] = {{{numbers}}};\n"
        )
        _header(directory, sizes[0], sizes[1] + 4, "int8_t", "int8_t")

    def compiled(self, target: Target, kernels: str, directory: Path) -> list[Path]:
        """Return the object files of the network that `write` left in a directory."""
        is_cmsis = kernels == "CMSIS-NN"
        core = self._objects(target, [Path(f"tensorflow/lite/{name}.cc") for name in _CORE])
        place = "micro/kernels/cmsis_nn" if is_cmsis else "micro/kernels"
        core += self._objects(
            target, [Path(f"tensorflow/lite/{place}/{name}.cc") for name in _REPLACED]
        )
        if is_cmsis:
            root = self.downloads / "cmsis_nn/Source"
            files = [
                file.relative_to(self.sources)
                for kind in _CMSIS
                for file in sorted((root / f"{kind}Functions").glob("*.c"))
                if not file.stem.endswith(("_f16", "_f32"))  # of the types of other headers
            ]
            core += self._objects(target, files)
        adds = "".join(f" operators.Add{name}();" for name in _OPERATORS)
        glue = directory / "tflite_micro.o"
        defined = [
            f"-DARENA={ARENA}", f"-DOPERATORS={len(_OPERATORS)}", f"-DADD_OPERATORS={adds}",
        ]  # fmt: skip
        subprocess.run(
            [*self._compiler(target, "g++"), *_CXX, *defined, "-fno-use-cxa-atexit",
             f"-I{directory}", "-c", HERE / "tflite_micro.cc", "-o", glue],
            check=True,
        )  # fmt: skip
        return [glue, compiled(target, directory / "model.c", ("-O2",)), *core]

    def _compiler(self, target: Target, kind: str) -> list[str]:
        places = (
            ".", "flatbuffers/include", "gemmlowp", "ruy", "cmsis_nn", "cmsis_nn/Include",
        )  # fmt: skip
        included = [f"-I{self.downloads / place}" for place in places]
        return [
            f"{target.prefix}-{kind}", *target.flags, *_FLAGS, "-DCMSIS_NN", f"-I{self.sources}",
            *included,
        ]  # fmt: skip

    def _objects(self, target: Target, files: list[Path]) -> list[Path]:
        made = []
        for file in files:
            name = str(file).replace("../", "").replace("/", "_") + ".o"
            place = self.objects / "".join(target.flags) / name
            if not place.exists():
                place.parent.mkdir(parents=True, exist_ok=True)
                compiler = self._compiler(target, "g++" if file.suffix == ".cc" else "gcc")
                options = _CXX if file.suffix == ".cc" else ()
                subprocess.run(
                    [*compiler, *options, "-c", self.sources / file, "-o", place], check=True
                )
            made.append(place)
        return made


def _header(directory: Path, inputs: int, outputs: int, x: str, y: str) -> None:
    (directory / "net.h").write_text(
        f"#include <stdint.h>\n#define NET_X_SIZE {inputs}\n#define NET_Y_SIZE {outputs}\n"
        f"void net_run(const {x} *x, {y} *y);\n"
    )
