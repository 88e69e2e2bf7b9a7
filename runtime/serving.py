"""Serve networks by the Open Inference Protocol, on KServe's model server.

REST (v1 and v2) and gRPC; `logshift serve` starts it. The server, its protocols and its metrics are
KServe's; here is what it asks of a network, and what it gets wrong with requests that are no good.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import json
import os
import struct
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from logshift.kernels.errors import InputError
from logshift.runtime import cores
from logshift.runtime.graph import ValueInfo
from logshift.runtime.session import Session, load

try:
    _arguments, sys.argv = sys.argv, sys.argv[:1]  # KServe reads them while it is imported
    try:
        import kserve
        import kserve.model_server
        from fastapi import Request
        from fastapi.exceptions import RequestValidationError
        from fastapi.responses import JSONResponse
        from kserve.constants.constants import INFERENCE_CONTENT_LENGTH_HEADER
        from kserve.errors import InvalidInput, ModelNotFound
        from kserve.protocol.dataplane import DataPlane
        from kserve.protocol.infer_type import (
            InferInput,
            InferOutput,
            InferRequest,
            InferResponse,
        )
        from kserve.protocol.rest.v2_datamodels import InferenceRequest
        from kserve.utils.numpy_codec import from_np_dtype
    finally:
        sys.argv = _arguments
except ModuleNotFoundError as error:
    raise InputError(
        f"serving needs {error.name}, which is not installed: pip install 'logshift[serve]'"
    ) from error

_PICTURES = "BYTES"  # the datatype of encoded pictures
_MALFORMED = (KeyError, TypeError, ValueError, AttributeError)  # what parsing a bad request raises


class Network(kserve.Model):
    """A packed network as KServe knows it.

    Takes float arrays as the ONNX model does. A network that holds preprocessing also takes
    pictures: uint8 arrays (N, H, W, C), or files such as JPEG in a tensor of datatype BYTES and
    shape (N,), in JSON in base64.

    Parameters
    ----------
    name : str
        What requests call it.
    path : path-like
        A `.stlq` file.
    threads : int
        Threads of a run.
    pool : ThreadPoolExecutor
        Where runs take place; it has as many threads as there may be runs at once.
    """

    def __init__(
        self, name: str, path: str | os.PathLike[str], threads: int, pool: ThreadPoolExecutor
    ) -> None:
        super().__init__(name)
        self._path, self._threads, self._pool = Path(path), threads, pool
        self._session: Session | None = None

    @property
    def session(self) -> Session:
        """The loaded network."""
        if self._session is None:
            self.load()
        assert self._session is not None
        return self._session

    def load(self) -> bool:
        """Load the file, and run the network once, so that the first request is as fast as others.

        Raises
        ------
        FormatError, OSError
            As `logshift.runtime.load`.
        """
        session = self.open()
        session.run({info.name: np.zeros(info.nominal, info.dtype) for info in session.inputs})
        self._session, self.ready = session, True
        return True

    def open(self) -> Session:
        """Return a session of the file."""
        return load(self._path, threads=self._threads)

    def get_input_types(self) -> list[dict[str, Any]]:
        """Return name, datatype and shape of each input, -1 for what may vary."""
        return [_described(info) for info in self.session.inputs]

    def get_output_types(self) -> list[dict[str, Any]]:
        """Return name, datatype and shape of each output, -1 for what may vary."""
        return [_described(info) for info in self.session.outputs]

    async def predict(
        self,
        payload: dict[str, Any] | InferRequest,
        headers: dict[str, str] | None = None,
        response_headers: dict[str, str] | None = None,
    ) -> dict[str, Any] | InferResponse:
        """Run the network on a request of either version of the protocol."""
        answer = self._infer if isinstance(payload, InferRequest) else self._predict
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, answer, payload)
        except InputError as error:
            raise InvalidInput(str(error)) from error

    def _infer(self, request: InferRequest) -> InferResponse:
        """Answer a request of version 2."""
        given: dict[str, np.ndarray | list[np.ndarray]] = {}
        for tensor in request.inputs:
            if tensor.name in given:
                raise InputError(f"input {tensor.name!r} is given twice")
            given[tensor.name] = _tensor(tensor)
        outputs = self._run(given)
        wanted = [output.name for output in request.request_outputs or ()] or list(outputs)
        for name in wanted:
            if name not in outputs:
                raise InputError(f"there is no output {name!r}; the network has {list(outputs)}")
        found = []
        for name in wanted:
            array = outputs[name]
            output = InferOutput(name, list(array.shape), from_np_dtype(array.dtype), array)
            if request.from_grpc:  # KServe asks an array whether it is true otherwise
                output.set_data_from_numpy(array)
            found.append(output)
        return InferResponse(
            request.id or "",
            self.name,
            found,
            use_binary_outputs=request.use_binary_outputs,
            requested_outputs=request.request_outputs,
        )

    def _predict(self, request: Any) -> dict[str, Any]:
        """Answer a request of version 1: instances, each an example or, by name, its tensors."""
        instances = request.get("instances") if isinstance(request, dict) else None
        if not isinstance(instances, list) or not instances:
            raise InputError('a request of version 1 is {"instances": [...]}, one or more')
        infos = self.session.inputs
        named = all(isinstance(example, dict) and "b64" not in example for example in instances)
        if not named and len(infos) > 1:
            raise InputError(
                f"the network has inputs {[info.name for info in infos]}; each instance must hold"
                " all of them by name"
            )
        given: dict[str, np.ndarray | list[np.ndarray]] = {}
        for info in infos:
            try:
                column = [example[info.name] if named else example for example in instances]
            except KeyError:
                raise InputError(f"an instance holds no input {info.name!r}") from None
            given[info.name] = _column(info, column)
        outputs = {name: array.tolist() for name, array in self._run(given).items()}
        if len(outputs) == 1:
            return {"predictions": next(iter(outputs.values()))}
        rows = zip(*outputs.values(), strict=False)
        return {"predictions": [dict(zip(outputs, row, strict=True)) for row in rows]}

    def _run(self, given: Mapping[str, np.ndarray | list[np.ndarray]]) -> dict[str, np.ndarray]:
        names = [info.name for info in self.session.inputs]
        if set(given) != set(names):
            raise InputError(f"inputs {sorted(given)} given, the network takes {sorted(names)}")
        result = self.session.run(given if len(names) > 1 else given[names[0]])
        return result if isinstance(result, dict) else {self.session.outputs[0].name: result}


class _Requests(DataPlane):
    """KServe's data plane, but what is wrong with a request is said, and costs no error 500."""

    async def model_metadata(self, model_name: str) -> dict[str, Any]:
        """Return what is known of a network."""
        return await super().model_metadata(model_name) | {"platform": "logshift"}

    def decode(
        self, body: Any, headers: Any, protocol_version: str = "v1", model_name: str | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Return the request that a body holds."""
        try:
            return super().decode(body, headers, protocol_version, model_name)
        except InvalidInput:
            raise
        except _MALFORMED as error:
            raise InvalidInput(
                f"this is no request of the Open Inference Protocol ({type(error).__name__}:"
                f" {error})"
            ) from error

    def decode_inference_request(self, body: Any, headers: Any, model_name: str) -> InferRequest:
        """Return a request of version 2; tensors behind the JSON stay as they are, bytes.

        KServe makes them a list of numbers, one by one, and fails where they are a picture.
        """
        if not isinstance(body, bytes) or INFERENCE_CONTENT_LENGTH_HEADER not in headers:
            return super().decode_inference_request(body, headers, model_name)
        position = int(headers[INFERENCE_CONTENT_LENGTH_HEADER])
        if not 0 <= position <= len(body):
            raise ValueError(f"{INFERENCE_CONTENT_LENGTH_HEADER} is {position} of {len(body)}")
        message = json.loads(body[:position])
        raw: list[bytes | None] = []
        for tensor in message["inputs"]:
            if "data" in tensor:
                raw.append(None)
                continue
            size = tensor.get("parameters", {}).get("binary_data_size")
            if type(size) is not int or not 0 < size <= len(body) - position:
                raise ValueError(f"input {tensor['name']!r} has neither data nor so many bytes")
            raw.append(body[position : position + size])
            position += size
            tensor["data"] = []
        if position != len(body):
            raise ValueError(f"{len(body) - position} bytes belong to no input")
        request = InferRequest.from_inference_request(
            InferenceRequest.model_validate(message), model_name
        )
        return InferRequest(
            model_name,
            request.inputs,
            request.id,
            raw_inputs=raw,
            parameters=request.parameters,
            request_outputs=request.request_outputs,
        )


class _Networks(kserve.ModelRepository):
    """The networks that are served: one that was unloaded by a request can be loaded again."""

    def __init__(self, networks: Sequence[Network]) -> None:
        super().__init__()
        self._known = {network.name: network for network in networks}

    def load(self, name: str) -> bool:
        """Load a network's file anew."""
        if name not in self._known:
            raise ModelNotFound(name)
        network = self._known[name]
        network.load()
        self.update(network)
        return True


class _Server(kserve.ModelServer):
    """KServe's server; when it stops, what it has accepted is answered."""

    def stop(self, sig: int) -> None:
        """Stop taking requests, and answer those that were taken.

        KServe forgets its models first, so that requests that are being read find none.
        """

        async def shut_down() -> None:
            if self._grpc_server is not None:
                await self._grpc_server.stop(sig)

        asyncio.get_running_loop().create_task(shut_down())


def serve(
    networks: Mapping[str, str | os.PathLike[str]],
    *,
    port: int = 8080,
    grpc_port: int | None = 8081,
    threads: int = 1,
    grace: int = 30,
) -> None:
    """Serve packed networks by the Open Inference Protocol until the process is told to stop.

    REST is at `http://HOST:port/v2/models/NAME/infer` (and `/v1/models/NAME:predict`), gRPC at
    `grpc_port`, metrics for Prometheus at `/metrics`. SIGTERM and SIGINT end it once the requests
    that it has accepted are answered.

    Parameters
    ----------
    networks : mapping of name to path
        Packed files, by the name in requests.
    port, grpc_port : int
        TCP ports, on all of the machine's addresses; without `grpc_port` there is no gRPC.
    threads : int
        Threads of a run. So many runs take place at once as this process has cores for.
    grace : int
        Seconds that requests have to be answered when the process is told to stop.

    Raises
    ------
    InputError
        If a setting is out of range, or KServe is not installed.
    FormatError, OSError
        If a file cannot be loaded.
    """
    if not networks:
        raise InputError("there is no network to serve")
    available = cores.default_threads()
    if not 1 <= threads <= available:
        raise InputError(f"threads is {threads}; this process may use {available}")
    with ThreadPoolExecutor(available // threads, "logshift") as pool:
        models = [Network(name, path, threads, pool) for name, path in networks.items()]
        start(models, port=port, grpc_port=grpc_port, grace=grace)


def start(models: Sequence[Network], *, port: int, grpc_port: int | None, grace: int = 30) -> None:
    """Load networks and serve them, as `serve` does."""
    for model in models:
        model.load()
    server = _Server(
        http_port=port,
        grpc_port=grpc_port or 0,
        enable_grpc=grpc_port is not None,
        registered_models=_Networks(models),
        enable_latency_logging=False,
        grace_period=grace,
    )
    server.dataplane = _Requests(model_registry=server.registered_models)
    kserve.model_server.app.add_exception_handler(RequestValidationError, _refuse)
    server.start(list(models))


async def _refuse(_: Request, error: Exception) -> JSONResponse:
    """Answer a body that is not as the protocol says, as KServe answers other bad requests."""
    assert isinstance(error, RequestValidationError)
    found = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:3])
    message = f"this is no request of the Open Inference Protocol ({found})"
    return JSONResponse({"error": message}, HTTPStatus.BAD_REQUEST)


def _described(info: ValueInfo) -> dict[str, Any]:
    shape = [dim if isinstance(dim, int) else -1 for dim in info.shape]
    return {"name": info.name, "datatype": from_np_dtype(np.dtype(info.dtype)), "shape": shape}


def _tensor(tensor: InferInput) -> np.ndarray | list[np.ndarray]:
    """Return the array of a tensor, or its pictures."""
    try:
        array = tensor.as_numpy()
    except (InvalidInput, struct.error, *_MALFORMED) as error:
        raise InputError(
            f"input {tensor.name!r} is no tensor of datatype {tensor.datatype} and shape"
            f" {tensor.shape} ({error})"
        ) from None
    return [_picture(item) for item in array.reshape(-1)] if tensor.datatype == _PICTURES else array


def _column(info: ValueInfo, values: list[Any]) -> np.ndarray | list[np.ndarray]:
    """Return an input's array, or its pictures, of one value for each instance."""
    if all(isinstance(value, dict) and "b64" in value for value in values):
        return [_picture(value["b64"]) for value in values]
    try:
        return np.array(values, info.dtype)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"instances of input {info.name!r} are no array: {error}") from None


def _picture(item: Any) -> np.ndarray:
    """Return the pixels of an encoded picture, (H, W, 3) uint8."""
    try:
        data = item if isinstance(item, bytes) else base64.b64decode(item, validate=True)
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image.convert("RGB"))
    except (TypeError, binascii.Error, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"there is no picture (JPEG, PNG ... in base64): {error}") from None
