"""The models within the real Triton; ``make test-triton`` runs this, in a Python of its own.

It has NumPy 1 and tritonclient, and neither PyTorch nor onnx: what was compiled before is served.
"""

from __future__ import annotations

import base64
import io
import json
import queue
import shutil
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from google.protobuf import text_format
from PIL import Image
from support.paths import ROOT, TESTS
from support.web.triton import server
from support.web.triton.server import MISSING_BACKEND, Triton
from tritonclient.grpc import model_config_pb2
from tritonclient.utils import InferenceServerException

import internvl_edge
from internvl_edge.integrations.triton.options import RepositoryOptions
from internvl_edge.integrations.triton.repository import write_repository
from internvl_edge.runtime.model import Model

DEMO, CHAT = server.HOME / "int8", server.HOME / "chat"
LABELS = ["zero", "seven", "three"]
CLIENTS = {"http": tritonclient.http, "grpc": tritonclient.grpc}
PROMPT = "Question: how many digits? Answer:"
Asked = dict[str, tuple[Any, str]]  # input → its values and Triton's type


def png(seed: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (240, 240, 3), np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


PICTURES = [png(seed) for seed in range(6)]


@pytest.fixture(scope="session")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Of the demo, whose models have their own files; and its chat model under another name."""
    root = tmp_path_factory.mktemp("repositories")
    write_repository(RepositoryOptions(out=DEMO, repo=root / "demo", self_contained=True))
    write_repository(RepositoryOptions(out=CHAT, repo=root / "talk"))
    shutil.move(root / "talk" / "generate", root / "talk" / "chat")
    config = root / "talk" / "chat" / "config.pbtxt"
    config.write_text(config.read_text().replace('name: "generate"', 'name: "chat"'))
    return root / "demo", root / "talk"


@pytest.fixture(scope="session")
def triton(
    repositories: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Triton]:
    log = tmp_path_factory.mktemp("log") / "triton.log"
    with server.running(*repositories, log=log) as running:
        yield running


@pytest.fixture(scope="session")
def direct() -> Iterator[Model]:
    options = internvl_edge.OrtOptions(num_threads=1)
    with internvl_edge.load(DEMO, options=options) as model:
        yield model


@pytest.fixture(scope="session")
def chat() -> Iterator[Model]:
    options = internvl_edge.OrtOptions(num_threads=1)
    with internvl_edge.load(CHAT, options=options) as model:
        yield model


def inputs_of(kind: str, asked: Asked) -> list[Any]:
    inputs = []
    for name, (values, data_type) in asked.items():
        array = np.array(values, object if data_type == "BYTES" else None)
        array = array.astype(np.int32) if data_type == "INT32" else array
        tensor = CLIENTS[kind].InferInput(name, list(array.shape), data_type)
        tensor.set_data_from_numpy(array)
        inputs.append(tensor)
    return inputs


def ask(triton: Triton, kind: str, model: str, **asked: tuple[Any, str]) -> Any:
    port = triton.http if kind == "http" else triton.grpc
    client = CLIENTS[kind].InferenceServerClient(f"127.0.0.1:{port}")
    with client:
        return client.infer(model, inputs_of(kind, asked))


def post(triton: Triton, path: str, body: Any) -> tuple[int, str]:
    request = urllib.request.Request(
        f"{triton.url}/v2/models/{path}",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def data_url(picture: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(picture).decode()


# --- equality ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CLIENTS)
def test_embeddings_are_the_runtime_s(triton: Triton, direct: Model, kind: str) -> None:
    for pictures in (PICTURES[:1], PICTURES):
        rows = [[picture] for picture in pictures]
        answer = ask(triton, kind, "embed_image", image=(rows, "BYTES"))
        wanted = direct.encode_image(pictures, normalize=True)
        np.testing.assert_array_equal(answer.as_numpy("embedding"), wanted)
    texts = ["a red seven", "ü", "two digits, one of them large"]
    rows = [[text.encode()] for text in texts]
    answer = ask(triton, kind, "embed_text", text=(rows, "BYTES"))
    np.testing.assert_array_equal(
        answer.as_numpy("embedding"), direct.encode_text(texts, normalize=True)
    )


@pytest.mark.parametrize("kind", CLIENTS)
def test_labels_are_the_runtime_s(triton: Triton, direct: Model, kind: str) -> None:
    rows, names = [[PICTURES[0]]], [[label.encode() for label in LABELS]]
    answer = ask(triton, kind, "classify", image=(rows, "BYTES"), labels=(names, "BYTES"))
    (best,) = direct.classify(PICTURES[:1], LABELS)
    assert [name.decode() for name in answer.as_numpy("label")[0]] == [b["label"] for b in best]
    assert [float(score) for score in answer.as_numpy("score")[0]] == [b["score"] for b in best]
    templates = ([[b"the digit {}"]], "BYTES")
    answer = ask(
        triton,
        kind,
        "classify",
        image=(rows, "BYTES"),
        labels=(names, "BYTES"),
        templates=templates,
    )
    (best,) = direct.classify(PICTURES[:1], LABELS, ["the digit {}"])
    assert [float(score) for score in answer.as_numpy("score")[0]] == [b["score"] for b in best]


def test_json_with_a_data_url(triton: Triton, direct: Model) -> None:
    tensor = {
        "name": "image",
        "shape": [1, 1],
        "datatype": "BYTES",
        "data": [data_url(PICTURES[0])],
    }
    status, text = post(triton, "embed_image/infer", {"inputs": [tensor]})
    assert status == 200
    row = np.array(json.loads(text)["outputs"][0]["data"], np.float32)
    np.testing.assert_array_equal(row[None], direct.encode_image(PICTURES[:1], normalize=True))


def test_many_at_once_share_batches(triton: Triton, direct: Model) -> None:
    """Each answer is its own picture's, whatever came along: INT8 sums differ by the batch."""
    wanted = direct.encode_image(PICTURES, normalize=True)

    def one(i: int) -> float:
        rows = [[PICTURES[i % len(PICTURES)]]]
        answer = ask(triton, "grpc", "embed_image", image=(rows, "BYTES")).as_numpy("embedding")
        return float((answer[0] * wanted[i % len(PICTURES)]).sum())

    with ThreadPoolExecutor(8) as pool:
        assert min(pool.map(one, range(64))) > 0.999
    statistics = tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{triton.grpc}")
    with statistics:
        told = statistics.get_inference_statistics("embed_image").model_stats[0]
    assert told.execution_count < told.inference_count


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CLIENTS)
@pytest.mark.parametrize("data", [b"junk", b"/etc/passwd", b"", b"data:/etc/passwd"])
def test_a_bad_picture_is_the_client_s(triton: Triton, kind: str, data: bytes) -> None:
    with pytest.raises(InferenceServerException) as caught:
        ask(triton, kind, "embed_image", image=([[data]], "BYTES"))
    assert caught.value.status() in ("400", "StatusCode.INVALID_ARGUMENT")
    assert "image" in caught.value.message()
    assert "root:" not in str(caught.value)
    good = ask(triton, kind, "embed_image", image=([[PICTURES[0]]], "BYTES"))
    assert np.isfinite(good.as_numpy("embedding")).all()


def test_a_bad_picture_takes_no_other_along(triton: Triton, direct: Model) -> None:
    def one(data: bytes) -> Any:
        try:
            return ask(triton, "http", "embed_image", image=([[data]], "BYTES"))
        except InferenceServerException as error:
            return error.status()

    with ThreadPoolExecutor(8) as pool:
        done = list(pool.map(one, [PICTURES[0], b"junk"] * 20))
    assert done[1::2] == ["400"] * 20
    assert all(answer.as_numpy("embedding").shape == (1, 64) for answer in done[::2])


# --- text ----------------------------------------------------------------------------------------


class Stream:
    """One request of ``ModelStreamInfer``, and its responses as they come."""

    def __init__(self, triton: Triton, model: str, asked: Asked) -> None:
        self._queue: queue.Queue[tuple[Any, Any]] = queue.Queue()
        self.client = tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{triton.grpc}")
        self.client.start_stream(lambda result, error: self._queue.put((result, error)))
        self.client.async_stream_infer(
            model, inputs_of("grpc", asked), enable_empty_final_response=True
        )

    def __iter__(self) -> Iterator[str]:
        while True:
            result, error = self._queue.get(timeout=60)
            if error is not None:
                raise error
            if (text := result.as_numpy("text")) is not None:
                yield text[0].decode()
            if result.get_response().parameters["triton_final_response"].bool_param:
                return

    def close(self, *, cancel: bool = False) -> None:
        self.client.stop_stream(cancel_requests=cancel)
        self.client.close()


def test_pieces_are_the_answer(triton: Triton, direct: Model) -> None:
    for picture in PICTURES[:3]:
        stream = Stream(
            triton, "generate", {"image": ([picture], "BYTES"), "prompt": ([PROMPT], "BYTES")}
        )
        (wanted,) = direct.answer(picture, PROMPT)
        assert "".join(stream) == wanted
        stream.close()


def test_text_over_http(triton: Triton, direct: Model) -> None:
    body = {"image": data_url(PICTURES[0]), "prompt": PROMPT, "max_new_tokens": 8}
    (wanted,) = direct.answer(PICTURES[0], PROMPT, max_new_tokens=8)
    status, text = post(triton, "generate/generate_stream", body)
    pieces = [json.loads(line.removeprefix("data: ")) for line in text.split("\n") if line]
    assert (status, "".join(piece["text"] for piece in pieces)) == (200, wanted)
    status, text = post(triton, "generate/generate", {**body, "stream": False})
    assert (status, json.loads(text)["text"]) == (200, wanted)
    status, text = post(
        triton, "generate/generate", {**body, "stream": False, "image": "/etc/passwd"}
    )
    assert status == 400
    assert "root:" not in text


def test_a_chat_model_that_was_renamed(triton: Triton, chat: Model) -> None:
    question = "What is in the picture?"
    for pictures in ([], PICTURES[:1], PICTURES[:2]):
        asked: Asked = {"prompt": ([question], "BYTES"), "max_new_tokens": ([12], "INT32")}
        if pictures:
            asked["image"] = (pictures, "BYTES")
        stream = Stream(triton, "chat", asked)
        wanted = chat.chat(pictures or None, question, max_new_tokens=12).text
        assert "".join(stream).strip() == wanted.strip()
        stream.close()


def test_a_client_that_leaves_frees_the_place(triton: Triton, chat: Model) -> None:
    asked: Asked = {"prompt": (["Tell me a story."], "BYTES"), "max_new_tokens": ([200], "INT32")}
    left = [Stream(triton, "chat", asked) for _ in range(6)]
    for stream in left:
        stream.close(cancel=True)
    stream = Stream(triton, "chat", {**asked, "max_new_tokens": ([2], "INT32")})
    assert isinstance("".join(stream), str)
    stream.close()


# --- the server ----------------------------------------------------------------------------------


def test_sigterm_lets_a_stream_end(repositories: tuple[Path, Path], tmp_path: Path) -> None:
    """The picture takes a second. A client that leaves its stream open would hold up the end."""
    file = io.BytesIO()
    Image.new("RGB", (7000, 7000), (9, 99, 200)).save(file, "PNG")
    asked: Asked = {"image": ([file.getvalue()], "BYTES"), "prompt": ([PROMPT], "BYTES")}
    with server.running(repositories[0], log=tmp_path / "log") as triton:
        stream = Stream(triton, "generate", asked)
        whole = "".join(stream)
        stream.close()
        stream = Stream(triton, "generate", asked)
        time.sleep(0.3)
        codes: list[int] = []
        ending = threading.Thread(target=lambda: codes.append(triton.terminate()))
        began = time.monotonic()
        ending.start()
        assert "".join(stream) == whole
        stream.close()
        ending.join()
    assert codes == [0]
    assert time.monotonic() - began < 25  # of the 30 that it waits for what does not end


def test_triton_takes_the_component_s_config(tmp_path: Path) -> None:
    """This Triton has no ONNX Runtime, which is the only thing that it misses."""
    write_repository(RepositoryOptions(out=DEMO, repo=tmp_path / "repo", backend="onnxruntime"))
    text = server.refused(tmp_path / "repo", tmp_path / "log")
    failed = [line for line in text.splitlines() if "failed to load '" in line]
    assert failed
    assert all("'image_embed'" in line for line in failed), failed
    assert f"{MISSING_BACKEND} 'onnxruntime'" in text


def test_configs_are_read_by_tritonclient(repositories: tuple[Path, Path]) -> None:
    known = TESTS / "golden" / "triton" / "model_config.binpb"
    assert model_config_pb2.DESCRIPTOR.serialized_pb == known.read_bytes()
    for repository in repositories:
        for path in repository.glob("*/config.pbtxt"):
            text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())


def test_it_is_this_checkout_that_is_tested() -> None:
    assert Path(internvl_edge.__file__).is_relative_to(ROOT)
    assert np.__version__.startswith("1.")
