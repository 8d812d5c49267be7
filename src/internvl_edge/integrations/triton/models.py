"""The models that run within Triton, in a process of its Python backend each.

Triton makes an object of a class, calls ``initialize`` once, ``execute`` with as many requests as
it has joined, and ``finalize`` in the end. ``tasks`` says which tensors each takes and gives. An
answer equals that of ``internvl_edge.load`` bit for bit where the batch is the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from threading import Semaphore
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from internvl_edge.artifact.components import CHAT_DECODER, DECODER, IMAGE_EMBED
from internvl_edge.artifact.open import open_artifact
from internvl_edge.errors import MediaError, SessionDead, UsageError
from internvl_edge.integrations.triton.bridge import BridgeSession
from internvl_edge.integrations.triton.requests import (
    answered,
    failure,
    number,
    picture,
    response,
    rows_of,
    text_of,
)
from internvl_edge.integrations.triton.tasks import TASKS, is_chat
from internvl_edge.runtime.model import Model
from internvl_edge.runtime.ort.options import OrtOptions
from internvl_edge.runtime.session import Session, open_component
from internvl_edge.runtime.tasks.embed import DEFAULT_TEMPLATES

__all__ = ["Classify", "EmbedImage", "EmbedText", "Generate", "Settings"]

MOST_AT_ONCE = 4  # answers that share a decoder, where it can be shared
Names = tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What ``config.pbtxt`` and Triton say of a model's instance."""

    out: Path  # the compiled directory
    device: str
    threads: int
    normalize: bool  # give embeddings unit length
    mode: str  # of image embeddings
    image_model: str | None  # the model of Triton that embeds images; None: it does so itself

    @classmethod
    def of(cls, args: Mapping[str, str]) -> Settings:
        """Read the arguments of ``initialize``.

        Raises:
            UsageError: a parameter that cannot be.
        """
        given = json.loads(args["model_config"]).get("parameters", {})
        told = {key: value["string_value"] for key, value in given.items()}
        here = Path(args["model_repository"]) / args["model_version"] / "out"
        is_gpu = args["model_instance_kind"] == "GPU"
        threads, normalize = told.get("threads", "1"), told.get("normalize", "true")
        if not threads.isdecimal() or normalize not in ("true", "false"):
            raise UsageError(
                f"parameters of {args['model_name']}: expected a whole number of threads, and "
                f"true or false for normalize; found {threads!r} and {normalize!r}"
            )
        return cls(
            out=Path(told["out"]) if "out" in told else here,
            device=f"cuda:{args['model_instance_device_id']}" if is_gpu else "cpu",
            threads=int(threads),
            normalize=normalize == "true",
            mode=told.get("mode", "c"),
            image_model=told.get("image_model"),
        )

    def open(self) -> Model:
        """Open the directory; components open when they are first used."""
        artifact = open_artifact(self.out)
        # Threads that wait in a loop would take the cores of other instances.
        options = OrtOptions(num_threads=self.threads, spin=False)

        def open_one(component: str) -> Session:
            if component == IMAGE_EMBED and self.image_model is not None:
                return BridgeSession(artifact.manifest.components[component], self.image_model)
            return open_component(artifact, component, device=self.device, options=options)

        return Model(artifact, open_one)


class _TritonModel:
    """An open model, from ``initialize`` to ``finalize``."""

    task: str  # in ``TASKS``

    def initialize(self, args: Mapping[str, str]) -> None:
        """Open every component that is needed: a model that cannot answer is not loaded."""
        self._settings = Settings.of(args)
        self._model = self._settings.open()
        self._is_dead = False
        manifest = self._model.artifact.manifest
        for component in TASKS[self.task].needs(manifest, self._settings.mode):
            self._model.session(component)

    def is_ready(self) -> bool:
        """Tell whether the device still answers; newer Tritons ask."""
        return not self._is_dead

    def finalize(self) -> None:
        """Close it."""
        self._model.close()

    def _failed(self, error: Exception) -> Any:
        self._is_dead |= isinstance(error, SessionDead)
        return pb_utils.InferenceResponse(error=failure(error))


class EmbedImage(_TritonModel):
    """Pictures to embeddings."""

    task = "embed_image"

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Embed the pictures of all requests as one batch."""
        return answered(requests, _pictures, self._embed, self._failed)

    def _embed(self, pictures: Sequence[bytes | str]) -> list[dict[str, Any]]:
        settings = self._settings
        embeds = self._model.encode_image(
            list(pictures), settings.mode, settings.normalize, batch_size=len(pictures)
        )
        return [{"embedding": row} for row in embeds]


class EmbedText(_TritonModel):
    """Texts to embeddings."""

    task = "embed_text"

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Embed the texts of all requests as one batch."""
        return answered(
            requests, lambda request: _texts(request, "text"), self._embed, self._failed
        )

    def _embed(self, texts: Sequence[Names]) -> list[dict[str, Any]]:
        given = [text for row in texts for text in row]
        embeds = self._model.encode_text(given, self._settings.normalize, batch_size=len(given))
        return [{"embedding": row} for row in embeds]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Labelled:
    """A picture, and what it may be."""

    picture: bytes | str
    labels: Names
    templates: Names


class Classify(_TritonModel):
    """Pictures and labels to the labels' scores, best first."""

    task = "classify"

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Classify the pictures of all requests; those with the same labels are one batch."""
        return answered(requests, self._read, self._classify, self._failed)

    def _read(self, request: Any) -> list[_Labelled]:
        pictures = _pictures(request)
        labels = _texts(request, "labels")
        templates = _texts(request, "templates") or [DEFAULT_TEMPLATES] * len(pictures)
        return [
            _Labelled(picture=picture, labels=names, templates=spelled)
            for picture, names, spelled in zip(pictures, labels, templates, strict=True)
        ]

    def _classify(self, rows: Sequence[_Labelled]) -> list[dict[str, Any]]:
        done: dict[int, dict[str, Any]] = {}
        for same in _alike(rows, lambda row: (row.labels, row.templates)):
            first = rows[same[0]]
            ranked = self._model.classify(
                [rows[i].picture for i in same],
                first.labels,
                first.templates,
                self._settings.mode,
                batch_size=len(same),
            )
            for i, best in zip(same, ranked, strict=True):
                labels = [entry["label"].encode("utf-8") for entry in best]
                scores = np.array([entry["score"] for entry in best], np.float32)
                done[i] = {"label": np.array(labels, object), "score": scores}
        return [done[i] for i in range(len(rows))]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Question:
    pictures: list[bytes | str]
    prompt: str
    max_new_tokens: int | None
    is_stream: bool


class Generate(_TritonModel):
    """A prompt on pictures to text, in pieces as they come.

    An InternVL-G continues the prompt on one picture. An InternVL-Chat answers it as a question
    about any number of pictures, of which each has its place at an ``<image>`` in the prompt.
    """

    task = "generate"

    def initialize(self, args: Mapping[str, str]) -> None:
        """Open it; answers share the decoder where its cache has a fixed capacity."""
        super().initialize(args)
        components = self._model.components
        self._is_chat = is_chat(self._model.artifact.manifest)
        decoder = components.session(CHAT_DECODER if self._is_chat else DECODER)
        count = max(1, components.answers.share(decoder, MOST_AT_ONCE))
        self._places = Semaphore(count)
        self._threads = ThreadPoolExecutor(count, "internvl-edge-generate")

    def execute(self, requests: Sequence[Any]) -> None:
        """Begin to answer; waits for a place, so that others wait in Triton's queue."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                question = self._read(request)
            except Exception as error:
                self._send_failed(sender, error)
                continue
            self._places.acquire()
            self._threads.submit(self._answer, question, sender)

    def finalize(self) -> None:
        """Close it once what is under way has ended."""
        self._threads.shutdown()
        super().finalize()

    def _read(self, request: Any) -> _Question:
        images, prompts = rows_of(request, "image"), rows_of(request, "prompt")
        if prompts is None or prompts.size != 1:
            raise UsageError("prompt: expected one")
        whole = number(request, "stream") == 0
        return _Question(
            pictures=[] if images is None else [picture(data) for data in images.reshape(-1)],
            prompt=text_of(prompts.reshape(-1)[0], "prompt"),
            max_new_tokens=number(request, "max_new_tokens"),
            is_stream=not whole,
        )

    def _answer(self, question: _Question, sender: Any) -> None:
        try:
            pieces = self._pieces(question)
            with closing(pieces):
                if question.is_stream:
                    for piece in _until_cancelled(pieces, sender):
                        sender.send(_piece(piece))
                    sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
                else:
                    text = "".join(_until_cancelled(pieces, sender))
                    sender.send(_piece(text), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        except Exception as error:
            self._send_failed(sender, error)
        finally:
            self._places.release()

    def _pieces(self, question: _Question) -> Any:
        pictures = question.pictures
        how: dict[str, Any] = {}
        if question.max_new_tokens is not None:
            how["max_new_tokens"] = question.max_new_tokens
        if self._is_chat:
            return self._model.chat_stream(pictures or None, question.prompt, **how)
        if len(pictures) != 1:
            raise MediaError(f"image: expected one, found {len(pictures)}")
        return self._model.stream(pictures[0], question.prompt, **how)

    def _send_failed(self, sender: Any, error: Exception) -> None:
        sender.send(self._failed(error), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def _until_cancelled(pieces: Iterator[str], sender: Any) -> Iterator[str]:
    for piece in pieces:
        if sender.is_cancelled():
            return
        yield piece


def _piece(text: str) -> Any:
    return response({"text": np.array([text.encode("utf-8")], object)})


def _pictures(request: Any) -> list[bytes | str]:
    rows = rows_of(request, "image")
    return [] if rows is None else [picture(data) for data in rows.reshape(-1)]


def _texts(request: Any, name: str) -> list[Names]:
    """Read the texts of each row."""
    rows = rows_of(request, name)
    return [] if rows is None else [tuple(text_of(data, name) for data in row) for row in rows]


def _alike(rows: Sequence[Any], key: Callable[[Any], Any]) -> list[list[int]]:
    """Group the indices of rows by a key, in the order of the first of each."""
    groups: dict[Any, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(key(row), []).append(i)
    return list(groups.values())
