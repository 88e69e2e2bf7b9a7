"""A served network answers with the session's bits, and what is wrong with a request is said."""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("kserve", reason="pip install 'logshift[serve]'")
grpc = pytest.importorskip("grpc")

from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb  # noqa: E402
from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import GRPCInferenceServiceStub  # noqa: E402

from logshift import converter  # noqa: E402
from logshift.kernels.errors import InputError  # noqa: E402
from logshift.runtime import load, serving  # noqa: E402

DEMO = Path(converter.__file__).parent / "demo"
FILES = {"four": DEMO / "resnet20-cifar10-w4.stlq", "three": DEMO / "resnet20-cifar10-w3.stlq"}
PICTURES = [path.read_bytes() for path in sorted((DEMO / "pictures").glob("*.jpg"))[:2]]
JSON = {"Content-Type": "application/json"}
BYTES = {"Content-Type": "application/octet-stream"}
LENGTH = "Inference-Header-Content-Length"
X = np.random.default_rng(0).standard_normal((3, 3, 32, 32), np.float32)


class Server:
    """The command `logshift serve` in a process of its own."""

    def __init__(self, *options: str) -> None:
        self.port, self.grpc_port = _free(), _free()
        command = [sys.executable, "-m", "logshift.converter.cli", "serve"]
        command += [str(path) for path in FILES.values()]
        command += ["--name", "four", "--name", "three", "--port", str(self.port)]
        command += ["--grpc-port", str(self.grpc_port), *options]
        self.process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        self.log: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        for _ in range(1200):
            if self.process.poll() is not None:
                break
            try:
                if self.get("/v2/health/ready")[0] == 200:
                    return
            except OSError:
                time.sleep(0.1)
        raise AssertionError("".join(self.log))

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.log.extend(self.process.stderr)

    def get(self, path: str) -> tuple[int, bytes]:
        return self._open(urllib.request.Request(f"http://127.0.0.1:{self.port}{path}"))[:2]

    def post(self, path: str, data, headers=JSON) -> tuple[int, bytes, str | None]:
        body = data if isinstance(data, bytes) else json.dumps(data).encode()
        url = f"http://127.0.0.1:{self.port}{path}"
        return self._open(urllib.request.Request(url, body, headers))

    def _open(self, request) -> tuple[int, bytes, str | None]:
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read(), answer.headers.get(LENGTH)
        except urllib.error.HTTPError as error:
            return error.code, error.read(), None

    def stub(self):
        return GRPCInferenceServiceStub(grpc.insecure_channel(f"127.0.0.1:{self.grpc_port}"))


def _free() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def server():
    served = Server()
    yield served
    served.process.kill()


@pytest.fixture(scope="module", params=list(FILES))
def network(request):
    """Name, and what the session says of `X` and of the pictures."""
    session = load(FILES[request.param])
    pictures = [serving._picture(data) for data in PICTURES]
    return request.param, session.run(X), session.run(pictures)


def _tensor(array: np.ndarray, **more) -> dict:
    kind = {"float32": "FP32", "float64": "FP64", "uint8": "UINT8", "int64": "INT64"}
    shape = list(array.shape)
    return {"name": "image", "shape": shape, "datatype": kind[array.dtype.name]} | more


def _scores(body: bytes) -> np.ndarray:
    (output,) = json.loads(body)["outputs"]
    return np.array(output["data"], np.float32).reshape(output["shape"])


def _binary(tensor: dict, raw: bytes, **more) -> tuple[bytes, dict[str, str]]:
    head = json.dumps(
        {"inputs": [tensor | {"parameters": {"binary_data_size": len(raw)}}]} | more
    ).encode()
    return head + raw, BYTES | {LENGTH: str(len(head))}


def _counted(pictures: list[bytes]) -> bytes:
    return b"".join(len(data).to_bytes(4, "little") + data for data in pictures)


# --- what is asked of a network -------------------------------------------------------------------


def test_metadata(server):
    assert json.loads(server.get("/v2/models")[1]) == {"models": ["four", "three"]}
    found = json.loads(server.get("/v2/models/four")[1])
    assert found["name"], found["platform"] == ("four", "logshift")
    assert found["inputs"] == [{"name": "image", "datatype": "FP32", "shape": [-1, 3, 32, 32]}]
    assert found["outputs"] == [{"name": "output", "datatype": "FP32", "shape": [-1, 10]}]
    answer = server.stub().ModelMetadata(pb.ModelMetadataRequest(name="three"))
    assert answer.platform == "logshift"
    assert list(answer.inputs[0].shape) == [-1, 3, 32, 32]


def test_health(server):
    assert json.loads(server.get("/v2/health/live")[1]) == {"live": True}
    assert json.loads(server.get("/v2/models/four/ready")[1]) == {"name": "four", "ready": True}
    assert server.get("/v2/models/none/ready")[0] == 404
    assert server.stub().ModelReady(pb.ModelReadyRequest(name="four")).ready


def test_metrics(server):
    server.post("/v1/models/three:predict", {"instances": X.tolist()})
    status, body = server.get("/metrics")
    assert status == 200
    (count,) = (
        line
        for line in body.decode().splitlines()
        if line.startswith('request_predict_seconds_count{model_name="three"}')
    )
    assert float(count.split()[-1]) >= 1


# --- the same bits in each protocol ---------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_json(server, network, dtype):
    name, scores, _ = network
    message = {"inputs": [_tensor(X.astype(dtype), data=X.ravel().tolist())], "id": "a"}
    status, body, _ = server.post(f"/v2/models/{name}/infer", message)
    assert status == 200
    assert json.loads(body)["id"] == "a"
    assert (_scores(body) == scores).all()


def test_nested_json(server, network):
    name, scores, _ = network
    message = {"inputs": [_tensor(X, data=X.tolist())], "outputs": [{"name": "output"}]}
    status, body, _ = server.post(f"/v2/models/{name}/infer", message)
    assert status == 200
    assert (_scores(body) == scores).all()


def test_binary(server, network):
    name, scores, _ = network
    body, headers = _binary(_tensor(X), X.tobytes(), parameters={"binary_data_output": True})
    status, answer, length = server.post(f"/v2/models/{name}/infer", body, headers)
    assert status == 200
    assert length is not None
    (output,) = json.loads(answer[: int(length)])["outputs"]
    found = np.frombuffer(answer[int(length) :], np.float32).reshape(output["shape"])
    assert (found == scores).all()


def test_version_1(server, network):
    name, scores, _ = network
    for instances in (X.tolist(), [{"image": x.tolist()} for x in X]):
        status, body, _ = server.post(f"/v1/models/{name}:predict", {"instances": instances})
        assert status == 200
        assert (np.float32(json.loads(body)["predictions"]) == scores).all()


def test_grpc(server, network):
    name, scores, _ = network
    raw = pb.ModelInferRequest(
        model_name=name,
        inputs=[{"name": "image", "shape": X.shape, "datatype": "FP32"}],
        raw_input_contents=[X.tobytes()],
    )
    numbers = pb.ModelInferRequest(
        model_name=name,
        inputs=[
            {
                "name": "image",
                "shape": X.shape,
                "datatype": "FP32",
                "contents": {"fp32_contents": X.ravel()},
            }
        ],
    )
    for request in (raw, numbers):
        answer = server.stub().ModelInfer(request)
        found = np.frombuffer(answer.raw_output_contents[0], np.float32)
        assert (found.reshape(list(answer.outputs[0].shape)) == scores).all()


def test_pictures(server, network):
    """Files of pictures, and their pixels."""
    name, _, scores = network
    tensor = {"name": "image", "shape": [2], "datatype": "BYTES"}
    coded = [base64.b64encode(data).decode() for data in PICTURES]
    infer = f"/v2/models/{name}/infer"
    assert (_scores(server.post(infer, {"inputs": [tensor | {"data": coded}]})[1]) == scores).all()
    body, headers = _binary(tensor, _counted(PICTURES))
    assert (_scores(server.post(infer, body, headers)[1]) == scores).all()
    pixels = serving._picture(PICTURES[1])[None]
    body, headers = _binary(_tensor(pixels), pixels.tobytes())
    assert (_scores(server.post(infer, body, headers)[1]) == scores[1:]).all()
    first = {"instances": [{"b64": data} for data in coded]}
    body = server.post(f"/v1/models/{name}:predict", first)[1]
    assert (np.float32(json.loads(body)["predictions"]) == scores).all()
    request = pb.ModelInferRequest(
        model_name=name, inputs=[tensor | {"contents": {"bytes_contents": PICTURES}}]
    )
    answer = server.stub().ModelInfer(request)
    assert (np.frombuffer(answer.raw_output_contents[0], np.float32) == scores.ravel()).all()


# --- requests that are no good --------------------------------------------------------------------

GOOD = _tensor(X[:1], data=X[:1].ravel().tolist())
BAD = {
    "not JSON": (b"{", "JSON"),
    "nothing": (b"", "Open Inference Protocol"),
    "a list": ([], "Open Inference Protocol"),
    "no inputs": ({}, "inputs: Field required"),
    "inputs of another type": ({"inputs": 3}, "inputs: Input should be a valid list"),
    "no input": ({"inputs": []}, "the network takes ['image']"),
    "another name": ({"inputs": [GOOD | {"name": "x"}]}, "the network takes ['image']"),
    "twice": ({"inputs": [GOOD, GOOD]}, "'image' is given twice"),
    "too few numbers": ({"inputs": [GOOD | {"data": [1.0]}]}, "cannot reshape"),
    "words": ({"inputs": [GOOD | {"data": ["a"] * 3072}]}, "could not convert"),
    "another size": (
        {"inputs": [GOOD | {"shape": [1, 3, 16, 64]}]},
        "expected (batch, 3, 32, 32)",
    ),
    "no such datatype": ({"inputs": [GOOD | {"datatype": "FP8"}]}, "datatype FP8"),
    "integers": ({"inputs": [GOOD | {"datatype": "INT64"}]}, "has dtype int64; it takes float32"),
    "no such output": ({"inputs": [GOOD], "outputs": [{"name": "y"}]}, "no output 'y'"),
    "no picture": (
        {"inputs": [{"name": "image", "shape": [1], "datatype": "BYTES", "data": ["aGk="]}]},
        "there is no picture",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_request(server, case):
    body, says = BAD[case]
    status, answer, _ = server.post("/v2/models/four/infer", body)
    assert status == 400
    assert says in json.loads(answer)["error"]


@pytest.mark.parametrize(
    ("instances", "says"),
    [
        ([], "one or more"),
        ([[1, [2]]], "are no array"),
        (["a"], "are no array"),
        ([{"x": 1}], "holds no input 'image'"),
        ([{"b64": 3}], "there is no picture"),
        ([None], "expected (batch, 3, 32, 32)"),
    ],
)
def test_bad_instances(server, instances, says):
    status, answer, _ = server.post("/v1/models/four:predict", {"instances": instances})
    assert status == 400
    assert says in json.loads(answer)["error"]


@pytest.mark.parametrize("length", [None, "x", "-1", "9999999", "3"])
def test_bad_length_of_the_head(server, length):
    body, headers = _binary(_tensor(X), X.tobytes())
    headers = {key: value for key, value in headers.items() if key != LENGTH}
    status, answer, _ = server.post(
        "/v2/models/four/infer", body, headers | ({} if length is None else {LENGTH: length})
    )
    assert status == 400
    assert json.loads(answer)["error"]


@pytest.mark.parametrize("raw", [X.tobytes()[:-1], X.tobytes() + b"x", b"", _counted(PICTURES)[:9]])
def test_bad_bytes(server, raw):
    for tensor in (_tensor(X), {"name": "image", "shape": [1], "datatype": "BYTES"}):
        body, headers = _binary(tensor, raw)
        assert server.post("/v2/models/four/infer", body, headers)[0] == 400
        request = pb.ModelInferRequest(model_name="four", inputs=[tensor], raw_input_contents=[raw])
        with pytest.raises(grpc.RpcError) as error:
            server.stub().ModelInfer(request)
        assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_unknown_network(server):
    assert server.post("/v2/models/none/infer", {"inputs": [GOOD]})[0] == 404
    with pytest.raises(grpc.RpcError) as error:
        server.stub().ModelInfer(pb.ModelInferRequest(model_name="none"))
    assert error.value.code() == grpc.StatusCode.NOT_FOUND


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["name", "shape", "data", "b64", "image"]), inner)
    ),
    max_leaves=8,
)
KEYS = {"name", "shape", "datatype", "data", "parameters"}


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.sampled_from(sorted(KEYS)), VALUES, st.booleans())
def test_any_value_instead_of_a_good_one(server, key, value, behind):
    """Whatever takes the place of a part of a request, no answer is an error of the server."""
    if behind:
        tensor = _tensor(X[:1]) | {"parameters": {"binary_data_size": 12288}, key: value}
        head = {"inputs": [tensor], "outputs": [{"name": value}] if value else None}
        coded = json.dumps(head).encode()
        body, headers = coded + X[:1].tobytes(), BYTES | {LENGTH: str(len(coded))}
        status = server.post("/v2/models/four/infer", body, headers)[0]
    else:
        message = {"inputs": [_tensor(X[:1], data=X[:1].ravel().tolist()) | {key: value}]}
        status = server.post("/v2/models/four/infer", message)[0]
        assert server.post("/v1/models/four:predict", {"instances": value})[0] in (200, 400)
    assert status in (200, 400)


# --- coming and going -----------------------------------------------------------------------------


def test_unloaded_and_loaded_again(server):
    assert server.post("/v2/repository/models/three/unload", b"")[0] == 200
    assert server.post("/v2/models/three/infer", {"inputs": [GOOD]})[0] == 404
    assert server.post("/v2/repository/models/three/load", b"")[0] == 200
    assert server.post("/v2/models/three/infer", {"inputs": [GOOD]})[0] == 200


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM")
def test_stopped_under_load():
    """Requests sent before the signal are answered; later ones are answered or find no server."""
    server = Server()
    big = np.repeat(X, 8, axis=0)
    rest, headers = _binary(_tensor(big), big.tobytes())
    proto = pb.ModelInferRequest(
        model_name="four",
        inputs=[{"name": "image", "shape": big.shape, "datatype": "FP32"}],
        raw_input_contents=[big.tobytes()],
    )
    answers: list[tuple[float, str]] = []
    stopped = threading.Event()

    def ask_by_rest() -> None:
        while not stopped.is_set():
            sent = time.monotonic()
            try:
                answers.append((sent, f"{server.post('/v2/models/four/infer', rest, headers)[0]}"))
            except OSError:
                answers.append((sent, "no server"))

    def ask_by_grpc() -> None:
        stub = server.stub()
        while not stopped.is_set():
            sent = time.monotonic()
            try:
                stub.ModelInfer(proto)
                answers.append((sent, "200"))
            except grpc.RpcError as error:
                gone = error.code() == grpc.StatusCode.UNAVAILABLE
                answers.append((sent, "no server" if gone else str(error.code())))

    clients = [threading.Thread(target=ask) for ask in (ask_by_rest, ask_by_grpc) * 4]
    for client in clients:
        client.start()
    time.sleep(2)
    told = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(40) in (0, -signal.SIGTERM)
    stopped.set()
    for client in clients:
        client.join()
    before = [answer for sent, answer in answers if sent < told - 0.05]
    assert len(before) > 20
    assert set(before) == {"200"}
    assert {answer for _, answer in answers} <= {"200", "no server"}


def test_what_cannot_be_served(tmp_path):
    with pytest.raises(InputError, match="no network"):
        serving.serve({})
    with pytest.raises(InputError, match="threads is 999"):
        serving.serve({"demo": FILES["four"]}, threads=999)
    with pytest.raises(OSError, match="none"):
        serving.serve({"demo": tmp_path / "none.stlq"})


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--name", "a", "--name", "b"), "1 files and 2 names"),
        ((os.fspath(FILES["four"]),), "two networks have one name"),
    ],
)
def test_command_refuses(arguments, says):
    command = [sys.executable, "-m", "logshift.converter.cli", "serve", str(FILES["four"])]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert says in done.stderr
