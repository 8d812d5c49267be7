"""The models within Triton: what they answer equals the runtime, and errors are whose they are."""

from __future__ import annotations

import base64
import io
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.web.triton import backend_utils as pb
from support.web.triton.backend_utils import Request, Sender

import internvl_edge
from internvl_edge.errors import ResourceError, SessionDead, UsageError
from internvl_edge.runtime.model import Model
from internvl_edge.types import Array

pytestmark = pytest.mark.slow

Started = Callable[..., Any]
INVALID, UNAVAILABLE, INTERNAL = (
    pb.TritonError.INVALID_ARG,
    pb.TritonError.UNAVAILABLE,
    pb.TritonError.INTERNAL,
)


def png(seed: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 50, 3), np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


PICTURES = [png(i) for i in range(3)]


def of(*values: bytes, batched: bool = True) -> Array:
    """BYTES [B,1], or without a batch [N]."""
    array = np.array(values, object)
    return array[:, None] if batched else array


def error_of(response: Any) -> tuple[int, str]:
    assert response.has_error()
    return response.error().code(), response.error().message()


# --- embeddings ----------------------------------------------------------------------------------


def test_pictures_of_all_requests_are_one_batch(
    started: Started, compiled: Path, direct: Model
) -> None:
    model = started(compiled, "embed_image")
    requests = [Request(image=of(*PICTURES[:2])), Request(image=of(PICTURES[2]))]
    first, second = model.execute(requests)
    wanted = direct.encode_image(PICTURES, normalize=True)
    np.testing.assert_array_equal(first.tensors["embedding"], wanted[:2])
    np.testing.assert_array_equal(second.tensors["embedding"], wanted[2:])
    assert first.tensors["embedding"].dtype == np.float32


def test_texts(started: Started, compiled: Path, direct: Model) -> None:
    model = started(compiled, "embed_text")
    texts = ["a red seven", "ü"]
    (answer,) = model.execute([Request(text=of(*(text.encode() for text in texts)))])
    wanted = direct.encode_text(texts, normalize=True)
    np.testing.assert_array_equal(answer.tensors["embedding"], wanted)


@pytest.mark.parametrize("mode", ["c", "g"])
def test_what_a_config_may_change(
    started: Started, compiled: Path, direct: Model, tmp_path: Path, mode: str
) -> None:
    repo = tmp_path / "repo"
    started(compiled, "embed_text", mode=mode)
    config = repo / "embed_image" / "config.pbtxt"
    config.write_text(config.read_text().replace('"true"', '"false"'))
    (answer,) = started(compiled, "embed_image", repo=repo).execute([Request(image=of(*PICTURES))])
    np.testing.assert_array_equal(
        answer.tensors["embedding"], direct.encode_image(PICTURES, mode=mode)
    )
    config.write_text(config.read_text().replace('"false"', '"no"'))
    with pytest.raises(UsageError, match="true or false for normalize; found '1' and 'no'"):
        started(compiled, "embed_image", repo=repo)


def test_a_model_with_files_of_its_own(started: Started, compiled: Path, direct: Model) -> None:
    model = started(compiled, "embed_text", self_contained=True)
    (answer,) = model.execute([Request(text=of(b"seven"))])
    wanted = direct.encode_text(["seven"], normalize=True)
    np.testing.assert_array_equal(answer.tensors["embedding"], wanted)


def test_a_data_url_is_a_picture(started: Started, compiled: Path, direct: Model) -> None:
    url = b"data:image/png;base64," + base64.b64encode(PICTURES[0])
    (answer,) = started(compiled, "embed_image").execute([Request(image=of(url))])
    wanted = direct.encode_image(PICTURES[:1], normalize=True)
    np.testing.assert_array_equal(answer.tensors["embedding"], wanted)


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "an empty file"),
        (b"/etc/passwd", "expected a JPEG, PNG or WebP"),
        (b"file:///etc/passwd", "expected a JPEG, PNG or WebP"),
        (b"http://127.0.0.1/x.png", "expected a JPEG, PNG or WebP"),
        (b"data:/etc/passwd", "with a comma before its data"),
        (b"data:text/plain;base64,AAAA", "expected a data: URL of an image"),
        (b"data:image/png;base64,!!!!", "is not base64"),
        (b"data:\xff,", "expected UTF-8, found byte 0xff"),
        (PICTURES[0][:60], "image"),
    ],
)
def test_a_bad_picture_takes_no_other_along(
    started: Started, compiled: Path, direct: Model, data: bytes, said: str
) -> None:
    model = started(compiled, "embed_image")
    good, bad, last = model.execute(
        [Request(image=of(b)) for b in (PICTURES[0], data, PICTURES[1])]
    )
    code, text = error_of(bad)
    assert code == INVALID
    assert said in text
    assert "root:" not in text
    for answer, picture in ((good, PICTURES[0]), (last, PICTURES[1])):
        wanted = direct.encode_image([picture], normalize=True)
        np.testing.assert_allclose(answer.tensors["embedding"], wanted, atol=1e-6)


def test_texts_that_are_none(started: Started, compiled: Path) -> None:
    model = started(compiled, "embed_text")
    empty, other = model.execute([Request(text=of(b"")), Request(text=of(b"\xff\xfe"))])
    assert error_of(other) == (INVALID, "text: expected UTF-8, found byte 0xff")
    assert not empty.has_error() or error_of(empty)[0] == INVALID


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ResourceError("memory ran out"), UNAVAILABLE, "memory ran out"),
        (SessionDead("the GPU is gone"), UNAVAILABLE, "the GPU is gone"),
        (ValueError("a secret of ours"), INTERNAL, "the model failed; its log says why"),
    ],
)
def test_errors_that_are_not_the_client_s(
    started: Started,
    compiled: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    code: int,
    said: str,
) -> None:
    model = started(compiled, "embed_text")
    assert model.is_ready()

    def fails(*given: Any, **how: Any) -> Any:
        raise error

    monkeypatch.setattr(Model, "encode_text", fails)
    pb.Logger.said.clear()
    answers = model.execute([Request(text=of(b"one")), Request(text=of(b"two"))])
    assert [error_of(answer) for answer in answers] == [(code, said)] * 2
    assert model.is_ready() == (not isinstance(error, SessionDead))
    assert any("a secret of ours" in text for text in pb.Logger.said) == (code == INTERNAL)


# --- labels --------------------------------------------------------------------------------------


def test_labels(started: Started, compiled: Path, direct: Model) -> None:
    model = started(compiled, "classify")
    labels, templates = ["zero", "seven", "ü"], ["a photo of a {}", "the digit {}"]
    rows = np.array([[text.encode() for text in labels]] * 2, object)
    spelled = np.array([[text.encode() for text in templates]], object)
    plain, other = model.execute(
        [
            Request(image=of(*PICTURES[:2]), labels=rows),
            Request(image=of(PICTURES[2]), labels=rows[:1, :2], templates=spelled),
        ]
    )
    for i, best in enumerate(direct.classify(PICTURES[:2], labels)):
        assert [x.decode() for x in plain.tensors["label"][i]] == [one["label"] for one in best]
        assert [float(x) for x in plain.tensors["score"][i]] == [one["score"] for one in best]
    assert plain.tensors["score"].dtype == np.float32
    (best,) = direct.classify(PICTURES[2:], labels[:2], templates)
    assert [float(x) for x in other.tensors["score"][0]] == [one["score"] for one in best]


def test_labels_that_cannot_be(started: Started, compiled: Path) -> None:
    model = started(compiled, "classify")
    good = np.array([[b"zero", b"seven"]], object)
    twice = np.array([[b"zero", b"zero"]], object)
    place = np.array([[b"no place"]], object)
    first, second, third, fourth = model.execute(
        [
            Request(image=of(PICTURES[0]), labels=good),
            Request(image=of(PICTURES[0]), labels=twice),
            Request(image=of(PICTURES[0]), labels=good, templates=place),
            Request(image=of(PICTURES[0]), labels=good[:, :0]),
        ]
    )
    assert not first.has_error()
    assert [error_of(answer)[0] for answer in (second, third, fourth)] == [INVALID] * 3
    assert "no place" in error_of(third)[1]


# --- text ----------------------------------------------------------------------------------------


def answers_of(model: Any, **inputs: Array) -> Sender:
    """Ask, and wait for the last response."""
    sender = Sender()
    assert model.execute([Request(sender, **inputs)]) is None
    for _ in range(2000):
        if sender.is_over:
            break
        threading.Event().wait(0.01)
    assert sender.is_over
    return sender


def text_of(sender: Sender) -> str:
    return "".join(response.tensors["text"][0].decode() for response in sender.responses)


def test_pieces_are_the_answer(started: Started, compiled: Path, direct: Model) -> None:
    model = started(compiled, "generate")
    prompt = "Question: how many? Answer:"
    given = {
        "image": of(PICTURES[0], batched=False),
        "prompt": of(prompt.encode(), batched=False),
        "max_new_tokens": np.array([7], np.int32),
    }
    (wanted,) = direct.answer(PICTURES[0], prompt, max_new_tokens=7)
    assert text_of(answers_of(model, **given)) == wanted
    whole = answers_of(model, **given, stream=np.array([False]))
    assert (len(whole.responses), text_of(whole)) == (1, wanted)


def test_who_leaves_frees_the_place(started: Started, compiled: Path) -> None:
    model = started(compiled, "generate")
    given = {
        "image": of(PICTURES[0], batched=False),
        "prompt": of(b"a", batched=False),
        "max_new_tokens": np.array([40], np.int32),
    }
    sender = Sender(cancels_after=1)
    model.execute([Request(sender, **given)])
    assert len(answers_of(model, **given).responses) >= len(sender.responses)
    assert len(sender.responses) <= 1


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"image": of(b"junk", batched=False)}, "expected a JPEG"),
        ({"image": of(*PICTURES[:2], batched=False)}, "image: expected one, found 2"),
        ({"prompt": of(b"\xff", batched=False)}, "prompt: expected UTF-8"),
        ({"prompt": of(b"a", b"b", batched=False)}, "prompt: expected one"),
        ({"max_new_tokens": np.array([0], np.int32)}, "max_new_tokens 0"),
        ({"max_new_tokens": np.array([1, 2], np.int32)}, "expected one number, found 2"),
        ({"max_new_tokens": np.array([10**6], np.int32)}, "positions"),
    ],
)
def test_questions_that_cannot_be(
    started: Started, compiled: Path, changed: dict[str, Array], said: str
) -> None:
    given = {"image": of(PICTURES[0], batched=False), "prompt": of(b"a", batched=False)}
    sender = answers_of(started(compiled, "generate"), **given | changed)
    code, text = error_of(sender.responses[-1])
    assert code == INVALID
    assert said in text


def test_a_chat_model(started: Started, compiled_chat: Path) -> None:
    model = started(compiled_chat, "generate")
    with internvl_edge.load(compiled_chat) as chat:
        for pictures in ([], PICTURES[:1], PICTURES[:2]):
            given = {"image": of(*pictures, batched=False)} if pictures else {}
            wanted = chat.chat(pictures or None, "what is it?", max_new_tokens=5).text
            prompt = of(b"what is it?", batched=False)
            limit = np.array([5], np.int32)
            assert (
                text_of(answers_of(model, prompt=prompt, max_new_tokens=limit, **given)) == wanted
            )
    sender = answers_of(model, prompt=of(b"<image> what?", batched=False))
    assert error_of(sender.responses[-1])[0] == INVALID


# --- another model of the same Triton ------------------------------------------------------------


def test_image_embeddings_of_another_model(
    started: Started, compiled: Path, direct: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def other(request: Any) -> Any:
        asked.append((request.model_name, request.names))
        outputs = direct.session("image_embed").run(request.inputs, outputs=request.names)
        return pb.InferenceResponse([pb.Tensor(name, array) for name, array in outputs.items()])

    monkeypatch.setattr(pb.InferenceRequest, "other", other, raising=False)
    model = started(compiled, "embed_image", backend="onnxruntime", device="cuda")
    (answer,) = model.execute([Request(image=of(*PICTURES))])
    wanted = direct.encode_image(PICTURES, normalize=True)
    np.testing.assert_array_equal(answer.tensors["embedding"], wanted)
    assert asked == [("image_embed", ["image_embeds"])]


@pytest.mark.parametrize(
    ("given", "told"),
    [(pb.TritonError.UNAVAILABLE, UNAVAILABLE), (pb.TritonError.INTERNAL, INTERNAL)],
)
def test_the_other_model_fails(
    started: Started, compiled: Path, monkeypatch: pytest.MonkeyPatch, given: int, told: int
) -> None:
    failed = pb.InferenceResponse(error=pb.TritonError("the queue is full", given))
    monkeypatch.setattr(pb.InferenceRequest, "other", lambda request: failed, raising=False)
    model = started(compiled, "embed_image", backend="onnxruntime", device="cuda")
    (answer,) = model.execute([Request(image=of(PICTURES[0]))])
    assert error_of(answer)[0] == told


def test_outside_of_triton_its_module_is_not_needed() -> None:
    assert "torch" not in sys.modules["internvl_edge.integrations.triton"].__dict__
    from internvl_edge.integrations import triton

    assert set(triton.__all__) <= set(dir(triton))
    with pytest.raises(AttributeError, match="has no attribute 'Embed'"):
        _ = triton.Embed
