"""The model, on the golden checkpoint's PyTorch components and on sessions that count."""

from __future__ import annotations

import importlib.util
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
from PIL import Image
from support.tiny_onnx import linear, open_directory

from internvl_edge.artifact.manifest import TensorSpec
from internvl_edge.artifact.open import Artifact
from internvl_edge.errors import (
    ArtifactError,
    HardwareError,
    InputError,
    InternVLError,
    MediaError,
    UsageError,
)
from internvl_edge.runtime import session as sessions
from internvl_edge.runtime.feeds import check_outputs
from internvl_edge.runtime.images.video import decode_frames, dual_softmax
from internvl_edge.runtime.model import Model, load
from internvl_edge.runtime.session import Session
from internvl_edge.runtime.tasks.vectors import ranked, softmax, unit
from internvl_edge.types import Array

ALL = ("vision", "image_embed", "image_pool", "image_queries", "text_embed", "matcher")
OUTPUT = {
    "vision": "last_hidden_state",
    "image_embed": "image_embeds",
    "image_pool": "image_embeds",
    "image_queries": "query_embeds",
    "text_embed": "text_embeds",
    "matcher": "match_logits",
}
ATOL = 1e-5


class FunctionSession:
    """A session around a NumPy function that counts the rows it was given."""

    inputs: Mapping[str, TensorSpec] = {}
    outputs: Mapping[str, TensorSpec] = {}
    largest: Mapping[str, int] = {}

    def __init__(self, output: str, function: Any) -> None:
        self.output, self.function = output, function
        self.batches: list[int] = []
        self.closed = 0

    def run(
        self,
        feeds: Mapping[str, Array],
        *,
        check: bool = True,
        outputs: Sequence[str] | None = None,
    ) -> dict[str, Array]:
        self.batches.append(len(next(iter(feeds.values()))))
        found = self.function(**feeds)
        assert outputs is None or check_outputs({self.output: None}, outputs)  # type: ignore[dict-item]
        return {self.output: found}

    def close(self) -> None:
        self.closed += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


# --- the golden checkpoint -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(golden: Path) -> Path:
    return golden / "tiny" / "checkpoint"


@pytest.fixture(scope="module")
def ref(golden: Path) -> Any:
    return np.load(golden / "tiny" / "reference.npz")


@pytest.fixture(scope="module")
def torch_sessions(tiny: Path) -> Any:
    import torch

    from internvl_edge.artifact.components import COMPONENTS
    from internvl_edge.export.checkpoint.load import load_reference
    from internvl_edge.export.components import build_component

    reference = load_reference(tiny)
    modules = {name: build_component(COMPONENTS[name], reference) for name in ALL}

    def open_one(component: str) -> Session:
        def compute(**feeds: Array) -> Array:
            tensors = [torch.tensor(feeds[name]) for name in COMPONENTS[component].inputs]
            with torch.inference_mode():
                found = modules[component](*tensors)
            first: Array = (found[0] if isinstance(found, tuple) else found).numpy()
            return first

        return FunctionSession(OUTPUT[component], compute)

    return open_one


def directory(tiny: Path, components: Sequence[str]) -> Artifact:
    return open_directory(tiny, components, preprocessing={"size": 56}, image_size=56)


@pytest.fixture
def model(tiny: Path, torch_sessions: Any) -> Any:
    with Model(directory(tiny, ALL), torch_sessions) as opened:
        yield opened


def pictures(count: int, seed: int = 0) -> list[Array]:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(30, 90, (count, 2))
    return [rng.integers(0, 256, (h, w, 3), np.uint8) for h, w in sizes]


def test_golden_image_embeddings(model: Model, ref: Any) -> None:
    pixels = ref["in.pixel_values"]
    c, g = model.encode_image(pixels), model.encode_image(pixels, "g")
    np.testing.assert_allclose(c, ref["c.image_embed"], atol=ATOL)
    np.testing.assert_allclose(g, ref["g.image_embed"], atol=ATOL)
    assert c.dtype == g.dtype == np.float32


def test_vision_and_pool_are_image_embed(tiny: Path, torch_sessions: Any, ref: Any) -> None:
    with Model(directory(tiny, ["vision", "image_pool"]), torch_sessions) as model:
        found = model.encode_image(ref["in.pixel_values"])
    np.testing.assert_allclose(found, ref["c.image_embed"], atol=ATOL)


def test_golden_text_embeddings(model: Model, ref: Any) -> None:
    found = model.encode_text(ref["in.text_ids"])
    np.testing.assert_allclose(found, ref["text.embed"], atol=ATOL)
    found32 = model.encode_text(ref["in.text_ids"].astype(np.int32), batch_size=2)
    np.testing.assert_allclose(found32, ref["text.embed"], atol=ATOL)


@pytest.mark.filterwarnings("ignore:a text of")
def test_golden_strings(model: Model, ref: Any, golden: Path) -> None:
    import json

    cases = json.loads((golden / "tiny" / "tokenizer_cases.json").read_text(encoding="utf-8"))
    found = model.encode_text(cases["texts"])
    np.testing.assert_allclose(found, ref["tok.text_embed"], atol=ATOL)


@pytest.mark.parametrize("mode", ["c", "g"])
def test_golden_similarity(model: Model, ref: Any, mode: str) -> None:
    found = model.retrieve(ref["in.pixel_values"], ref["in.text_ids"], mode)
    golden_logits = ref[f"{mode}.logits_per_image"]  # exp(logit_scale) · cosine
    scale = golden_logits.flat[0] / found.similarity.flat[0]
    np.testing.assert_allclose(scale * found.similarity, golden_logits, atol=1e-3)
    np.testing.assert_array_equal(
        found.texts_of_image, np.argsort(-golden_logits, axis=1, kind="stable")
    )
    np.testing.assert_array_equal(
        found.images_of_text, np.argsort(-golden_logits.T, axis=1, kind="stable")
    )


def test_golden_match(model: Model, ref: Any) -> None:
    negative, positive = ref["train.in.negative_ids"], ref["train.in.positive_ids"]
    half = len(negative) // 2
    ids = np.concatenate([negative[:half], positive[half:]])
    found = model.match(ref["train.in.pixel_values"], ids, batch_size=3)
    logits = ref["train.itm.logits"].astype(np.float64)
    np.testing.assert_allclose(found, 1 / (1 + np.exp(logits[:, 0] - logits[:, 1])), atol=ATOL)
    assert found.shape == (len(ids),)
    assert found.dtype == np.float32


@pytest.mark.parametrize("mode", ["c", "g"])
def test_one_image_gives_what_it_gives_in_a_batch(model: Model, mode: str) -> None:
    images = pictures(5)
    together = model.encode_image(images, mode, batch_size=4)
    alone = np.concatenate([model.encode_image(image, mode) for image in images])
    np.testing.assert_allclose(together, alone, atol=ATOL)


def test_one_text_gives_what_it_gives_in_a_batch(model: Model) -> None:
    texts = ["a", "a photo of a red panda", "two dogs"]
    together = model.encode_text(texts)
    alone = np.concatenate([model.encode_text(text) for text in texts])
    np.testing.assert_allclose(together, alone, atol=ATOL)


def test_match_of_one_with_many_is_match_of_pairs(model: Model) -> None:
    images, texts = pictures(3), ["a", "a red panda", "two dogs"]
    pairs = model.match([images[0]] * 3, texts, batch_size=2)
    np.testing.assert_allclose(model.match(images[0], texts, batch_size=2), pairs, atol=ATOL)
    pairs = model.match(images, [texts[1]] * 3)
    np.testing.assert_allclose(model.match(images, texts[1], batch_size=2), pairs, atol=ATOL)


def test_classification_by_hand(model: Model) -> None:
    images, labels = pictures(2), ["cat", "red panda", "dog"]
    templates = ("a photo of a {}", "a bad photo of the {c}.")
    found = model.classify(images, labels, templates)
    rows = []
    for label in labels:
        prompts = [f"a photo of a {label}", f"a bad photo of the {label}."]
        embeds = model.encode_text(prompts)
        mean = (embeds / np.linalg.norm(embeds, axis=1, keepdims=True)).mean(axis=0)
        rows.append(mean / np.linalg.norm(mean))
    embeds = model.encode_image(images, transform="classification")
    embeds /= np.linalg.norm(embeds, axis=1, keepdims=True)
    logits = 100 * embeds.astype(np.float64) @ np.stack(rows).T
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    for scores, ranking in zip(expected, found, strict=True):
        assert [r["label"] for r in ranking] == [labels[k] for k in np.argsort(-scores)]
        assert [r["score"] for r in ranking] == pytest.approx(sorted(scores)[::-1], abs=1e-4)
        assert sum(r["score"] for r in ranking) == pytest.approx(1)


def test_a_video_is_the_mean_of_its_frames(model: Model, tmp_path: Path) -> None:
    frames = pictures(6)
    each = model.encode_image(frames, transform="clip")
    found = model.encode_video(frames)
    np.testing.assert_allclose(found, each.mean(axis=0), atol=ATOL)
    np.testing.assert_allclose(
        model.encode_video(frames, normalize=True), unit(each.mean(axis=0)), atol=ATOL
    )
    np.testing.assert_allclose(
        model.encode_video(frames, num_frames=3), each[[1, 3, 5]].mean(axis=0), atol=ATOL
    )
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / f"{i}.png")
    np.testing.assert_allclose(model.encode_video(tmp_path), found, atol=ATOL)
    np.testing.assert_allclose(
        model.encode_video(tmp_path, num_frames=3), each[[1, 3, 5]].mean(axis=0), atol=ATOL
    )


def test_kinds_of_images_agree(model: Model, tmp_path: Path) -> None:
    array = pictures(1)[0]
    path = tmp_path / "picture.png"
    Image.fromarray(array).save(path)
    kinds = [array, Image.fromarray(array), path, str(path), path.read_bytes()]
    one_by_one = [model.encode_image(kind) for kind in kinds]
    for found in [*one_by_one, *model.encode_image(kinds)[:, None]]:
        np.testing.assert_array_equal(found.shape, one_by_one[0].shape)
        np.testing.assert_allclose(found, one_by_one[0], atol=ATOL)
    batch = np.stack([array, array])  # uint8 [B, H, W, 3]
    np.testing.assert_allclose(model.encode_image(batch)[1:], one_by_one[0], atol=ATOL)


def test_unit_length_when_asked(model: Model) -> None:
    images, texts = pictures(2), ["a", "b"]
    for embeds in (
        model.encode_image(images, normalize=True),
        model.encode_image(images, "g", normalize=True),
        model.encode_text(texts, normalize=True),
    ):
        np.testing.assert_allclose(np.linalg.norm(embeds, axis=1), 1, atol=ATOL)


@pytest.mark.parametrize("word", ["no", 1, None], ids=["word", "number", "none"])
def test_unit_length_is_asked_by_true_or_false(model: Model, word: Any) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: model.encode_image(pictures(1), normalize=word),
        lambda: model.encode_text(["a"], normalize=word),
        lambda: model.encode_video(pictures(2), normalize=word),
    ]
    for call in calls:
        with pytest.raises(UsageError, match="normalize must be True or False"):
            call()


def test_pixel_values_of_another_size_are_named(model: Model) -> None:
    other = np.zeros((2, 3, 5, 7), np.float32)
    with pytest.raises(MediaError, match=r"taken as normalised.*found \[2, 3, 5, 7\]; pass list"):
        model.encode_image(other)


# --- counting sessions ---------------------------------------------------------------------------


class Counting:
    """Sessions of simple functions, opened on demand."""

    def __init__(self, components: Sequence[str], path: Path) -> None:
        self.sessions: dict[str, FunctionSession] = {}
        self.opened: list[str] = []
        self.model = Model(open_directory(path, components), self.open)

    def open(self, component: str) -> Session:
        functions: dict[str, Any] = {
            "vision": lambda pixel_values: pixel_values.reshape(len(pixel_values), 16, 3) + 1,
            "image_embed": lambda pixel_values: pixel_values.mean(axis=(2, 3)) + 1,
            "image_pool": lambda last_hidden_state: last_hidden_state.mean(axis=1),
            "image_queries": lambda last_hidden_state: last_hidden_state.max(axis=1),
            "text_embed": lambda input_ids, attention_mask: np.stack(
                [attention_mask.sum(axis=1), input_ids.max(axis=1), input_ids[:, 0]], axis=1
            ).astype(np.float32),
            "matcher": lambda last_hidden_state, input_ids, attention_mask: np.stack(
                [last_hidden_state.mean(axis=(1, 2)), input_ids.mean(axis=1)], axis=1
            ),
        }
        self.opened.append(component)
        self.sessions[component] = FunctionSession(OUTPUT[component], functions[component])
        return self.sessions[component]


@pytest.fixture
def counting(tmp_path: Path) -> Counting:
    return Counting(ALL, tmp_path)


PIXELS = np.random.default_rng(0).standard_normal((5, 3, 4, 4)).astype(np.float32)
IDS = np.array([[1, 5, 6, 2], [1, 7, 2, 0]])


class FakeTokenizer:
    calls = 0

    def contrastive(self, texts: list[str], pad_to: str) -> Array:
        self.calls += 1
        assert pad_to == "longest"
        return np.array([[1, 3 + len(text), 2] for text in texts], np.int64)


def test_components_open_when_they_are_needed(counting: Counting) -> None:
    model = counting.model
    assert counting.opened == []
    model.encode_image(PIXELS)
    assert counting.opened == ["image_embed"]
    model.encode_image(PIXELS, "g")
    model.encode_image(PIXELS, "g")
    assert sorted(counting.opened) == ["image_embed", "image_pool", "image_queries", "vision"]


def test_each_image_goes_through_the_vit_once(counting: Counting) -> None:
    counting.model.encode_image(PIXELS, "g", batch_size=2)
    assert counting.sessions["vision"].batches == [2, 2, 1]
    counting.model.match(PIXELS, IDS[:1], batch_size=5)
    assert counting.sessions["vision"].batches == [2, 2, 1, 5]
    counting.model.match(PIXELS[:1], IDS, batch_size=1)
    assert counting.sessions["vision"].batches == [2, 2, 1, 5, 1]
    assert counting.sessions["matcher"].batches == [5, 1, 1]


def test_labels_are_encoded_once(counting: Counting) -> None:
    model, tokenizer = counting.model, FakeTokenizer()
    model.components.__dict__["tokenizer"] = tokenizer
    labels = ["cat", "mouse"]
    first = model.classify(PIXELS, labels)
    assert model.classify(PIXELS, labels) == first
    assert tokenizer.calls == 1
    model.classify(PIXELS, labels, ["the {}"])
    model.classify(PIXELS, labels[::-1])
    assert tokenizer.calls == 3
    with pytest.raises(ValueError, match="read-only"):
        model.text_classifier(labels)[0] = 0


def test_only_the_last_classifiers_are_kept(counting: Counting) -> None:
    model, tokenizer = counting.model, FakeTokenizer()
    model.components.__dict__["tokenizer"] = tokenizer
    for i in range(40):
        model.text_classifier([str(i)])
    assert len(model.components.classifiers) == 16
    model.text_classifier(["39"])
    assert tokenizer.calls == 40
    model.text_classifier(["0"])
    assert tokenizer.calls == 41


def test_closing_closes_every_session(counting: Counting) -> None:
    with counting.model as model:
        model.encode_image(PIXELS, "g")
    model.close()
    assert [session.closed for session in counting.sessions.values()] == [1, 1, 1]
    with pytest.raises(UsageError, match="closed; load it again"):
        model.encode_image(PIXELS)


def test_threads_share_one_session(counting: Counting) -> None:
    expected = [counting.model.encode_image(PIXELS * (i + 1) / 8, "g") for i in range(8)]
    fresh = Counting(ALL, counting.model.artifact.path)
    barrier = threading.Barrier(8)

    def encode(i: int) -> Array:
        barrier.wait(10)
        return fresh.model.encode_image(PIXELS * (i + 1) / 8, "g")

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(encode, range(8)))
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_array_equal(a, b)
    assert sorted(fresh.opened) == ["image_pool", "image_queries", "vision"]


# --- videos --------------------------------------------------------------------------------------


def test_videos_are_means_of_their_frames(model: Model) -> None:
    videos = [pictures(3, seed) for seed in range(4)]
    found = model.classify_videos(videos, ["a", "bb"], num_frames=2)
    weights = model.text_classifier(["a", "bb"])
    for video, labels in zip(videos, found, strict=True):
        scores = softmax(100 * model.encode_video(video, 2, normalize=True) @ weights.T)
        assert {item["label"]: item["score"] for item in labels} == pytest.approx(
            {"a": scores[0], "bb": scores[1]}, abs=1e-4
        )


def test_videos_are_ranked_by_dual_softmax(model: Model) -> None:
    videos, texts = [pictures(2, seed) for seed in range(4)], ["a", "bb", "c d"]
    found, plain = (model.retrieve_videos(videos, texts, dual=dual) for dual in (True, False))
    np.testing.assert_array_equal(found.similarity, plain.similarity)
    np.testing.assert_array_equal(plain.texts_of_image, ranked(plain.similarity))
    np.testing.assert_array_equal(found.texts_of_image, ranked(dual_softmax(found.similarity)))
    np.testing.assert_array_equal(found.images_of_text, ranked(dual_softmax(found.similarity.T)))


@pytest.mark.slow
def test_a_video_file_is_a_video(model: Model, tmp_path: Path) -> None:
    av = pytest.importorskip("av", reason="PyAV is not installed")
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for image in np.random.default_rng(0).integers(0, 256, (5, 48, 64, 3), np.uint8):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    found = model.encode_video(path, num_frames=2)
    np.testing.assert_allclose(found, model.encode_video(decode_frames(path, 2)), atol=ATOL)


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("components", "call", "asked"),
    [
        (["vision"], lambda m: m.encode_image(PIXELS), "vision,image_embed"),
        (["text_embed"], lambda m: m.encode_image(PIXELS), "text_embed,image_embed"),
        (["image_embed"], lambda m: m.encode_image(PIXELS, "g"), "vision,image_pool,image_queries"),
        (["image_embed"], lambda m: m.encode_text("a"), "image_embed,text_embed"),
        (["image_embed"], lambda m: m.classify(PIXELS, ["a"]), "image_embed,text_embed"),
        (["image_embed"], lambda m: m.retrieve(PIXELS, ["a"]), "image_embed,text_embed"),
        (["vision"], lambda m: m.match(PIXELS, ["a"]), "vision,matcher"),
    ],
)
def test_a_missing_component_says_what_to_export(
    tmp_path: Path, components: list[str], call: Any, asked: str
) -> None:
    counting = Counting(components, tmp_path)
    with pytest.raises(UsageError, match=f"has no component .* --components .*{asked}"):
        call(counting.model)
    assert counting.opened == []


@pytest.mark.parametrize(
    ("model", "call", "message"),
    [
        ({"internvl": None}, lambda m: m.encode_text("a"), "a vision tower alone, which has no te"),
        ({"internvl": {}}, lambda m: m.components.require("chat_vision"), "has no chat_vision"),
        ({"chat": {"num_queries": 0, "llama": {}}}, lambda m: m.encode_image(PIXELS), "-Chat"),
        (
            {"chat": {"num_queries": 0, "llama": {}}},
            lambda m: m.components.require("chat_queries", "chat_decoder"),
            "an InternVL-Chat, which has no chat_queries, chat_decoder",
        ),
    ],
)
def test_what_the_checkpoint_lacks_is_not_advised(
    tmp_path: Path, model: dict[str, Any], call: Any, message: str
) -> None:
    counting = Counting(["vision"], tmp_path)
    counting.model.components.artifact.manifest.model.clear()
    counting.model.components.artifact.manifest.model.update(model)
    with pytest.raises(UsageError, match=message):
        call(counting.model)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m.encode_image(PIXELS, "d"), UsageError, "mode 'd'"),
        (lambda m: m.encode_image([]), MediaError, "at least one image"),
        (lambda m: m.encode_image(PIXELS[:0]), MediaError, "at least one image"),
        (lambda m: m.encode_image(None), MediaError, "found NoneType"),
        (lambda m: m.encode_image("/no/such/picture.jpg"), MediaError, "picture.jpg"),
        (lambda m: m.encode_image(PIXELS, batch_size=0), UsageError, "batch_size 0"),
        (lambda m: m.encode_text([]), MediaError, "at least one text"),
        (lambda m: m.encode_text(7), MediaError, "found int"),
        (lambda m: m.encode_text(""), MediaError, "text 1 of 1: expected text, found none"),
        (lambda m: m.retrieve(PIXELS, ["a", " "]), MediaError, "text 2 of 2: expected text"),
        (lambda m: m.encode_text(["a", 7]), MediaError, "text 2 of 2: .* found int"),
        (lambda m: m.encode_text([[1, 2], [3]]), MediaError, "rows of 2, 1 items"),
        (lambda m: m.encode_text([["a"], ["b"]]), MediaError, "as many integers each"),
        (lambda m: m.encode_text(["a"] * 70 + ["\0"]), MediaError, "text 71 of 71"),
        (lambda m: m.encode_text(IDS[0]), MediaError, r"found \[4\]"),
        (lambda m: m.encode_text(IDS[:0]), MediaError, r"found \[0, 4\]"),
        (lambda m: m.encode_text(-IDS), MediaError, "from -7"),
        (lambda m: m.encode_text(IDS * 1.0), MediaError, "found ndarray"),
        (lambda m: m.classify(PIXELS, []), MediaError, "labels: expected one or more"),
        (lambda m: m.classify(PIXELS, "zero, seven"), UsageError, r"\['zero', 'seven'\], found"),
        (lambda m: m.classify(PIXELS, ["a"], mode="d"), UsageError, "mode 'd'"),
        (lambda m: m.retrieve([], ["a"]), MediaError, "at least one image"),
        (lambda m: m.classify(PIXELS, ["a", " "]), MediaError, "non-empty"),
        (lambda m: m.classify(PIXELS, ["a", 1]), MediaError, "non-empty strings"),
        (lambda m: m.classify(PIXELS, ["a", "b", "a"]), UsageError, "'a' is there more than once"),
        (lambda m: m.classify(PIXELS, ["a"], []), UsageError, "templates"),
        (lambda m: m.classify(PIXELS, ["a"], ["a photo"]), UsageError, "template 'a photo'"),
        (lambda m: m.classify(PIXELS, ["a"], ["{} {c}"]), UsageError, "expected one"),
        (lambda m: m.classify(PIXELS, ["a"], ["{} {x}"]), UsageError, "expected one"),
        (lambda m: m.classify(PIXELS, ["a"], "{0.__class__}"), UsageError, "expected one"),
        (lambda m: m.match(PIXELS, np.ones((3, 2), int)), UsageError, "5 images and 3 texts"),
        (lambda m: m.classify_videos([], ["a"]), MediaError, "videos: expected a list"),
        (lambda m: m.retrieve_videos("clip.mp4", ["a"]), MediaError, "found 'clip.mp4'"),
        (lambda m: m.encode_video([]), MediaError, "at least one image"),
        (lambda m: m.encode_video(PIXELS, num_frames=0), UsageError, "num_frames"),
    ],
)
def test_rejections(counting: Counting, call: Any, error: type[InputError], message: str) -> None:
    with pytest.raises(error, match=message):
        call(counting.model)
    assert all(session.batches == [] for session in counting.sessions.values())


def test_a_name_of_the_same_family_is_no_typo(tmp_path: Path) -> None:
    model = Counting(["text_embed"], tmp_path).model
    with pytest.raises(UsageError) as refusal:
        model.encode_image(PIXELS)
    assert "did you mean" not in str(refusal.value)
    with pytest.raises(UsageError, match="did you mean 'text_embed'"):
        model.session("text_embd")


def test_ids_may_be_lists(counting: Counting) -> None:
    found = counting.model.encode_text(IDS.tolist())
    np.testing.assert_array_equal(found, counting.model.encode_text(IDS))


def test_an_image_is_counted_in_the_request(counting: Counting) -> None:
    with pytest.raises(MediaError, match=r"image 13 of 13 \(bytes, 1 bytes\)"):
        counting.model.encode_image([*pictures(12), b"x"])


def test_texts_without_a_tokenizer(counting: Counting) -> None:
    counting.model.artifact.manifest.files.pop("tokenizer.model")
    with pytest.raises(UsageError, match=r"has no tokenizer.model.*token ids"):
        counting.model.retrieve(PIXELS, ["a"])
    assert counting.opened == [], "refused before the images are encoded"
    assert counting.model.retrieve(PIXELS, IDS).similarity.shape == (5, 2)


def test_a_label_with_braces_is_only_a_label(counting: Counting) -> None:
    seen: list[str] = []

    class Listening(FakeTokenizer):
        def contrastive(self, texts: list[str], pad_to: str) -> Array:
            seen.extend(texts)
            return super().contrastive(texts, pad_to)

    counting.model.components.__dict__["tokenizer"] = Listening()
    counting.model.text_classifier(["{c}", "{}"], ["a {}", "the {c}"])
    assert seen == ["a {c}", "the {c}", "a {}", "the {}"]


def test_load_refuses_what_is_not_a_directory_of_ours(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError):
        load(tmp_path)
    with pytest.raises(ArtifactError, match=r"nothing.*expected a directory"):
        load(os.fsencode(tmp_path / "nothing"))  # type: ignore[arg-type]
    for wrong in (None, 5, ["out"], object):
        with pytest.raises(UsageError, match="expected the path of a compiled directory, found"):
            load(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("backend", "error", "message"),
    [
        ("onxx", UsageError, "backend 'onxx': expected auto, onnxruntime"),
        ("tensorrt", HardwareError, "no CUDA device"),
        ("tensorrt-rtx", HardwareError, "no CUDA device"),
    ],
)
def test_load_refuses_a_backend_that_cannot_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str, error: Any, message: str
) -> None:
    finding = importlib.util.find_spec("json")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "tensorrt" else finding
    )
    monkeypatch.setattr(sessions, "gpu_count", lambda: 0)
    with pytest.raises(error, match=message):
        load(tmp_path, backend=backend)


def test_sessions_are_onnx_runtimes(tmp_path: Path) -> None:
    from functools import partial

    from internvl_edge.runtime.session import open_component

    linear(tmp_path / "vision.onnx")
    artifact = open_directory(tmp_path, ["vision"])
    with Model(artifact, partial(open_component, artifact, device="cpu")) as model:
        found = model.session("vision").run({"x": np.ones((1, 4), np.float32)})
        assert found["total"] == [4]


# --- numbers -------------------------------------------------------------------------------------


def test_unit_keeps_zeros_and_dtype() -> None:
    rows = np.array([[3, 4], [0, 0]], np.float32)
    found = unit(rows)
    np.testing.assert_allclose(found, np.array([[0.6, 0.8], [0, 0]]))
    assert found.dtype == np.float32


def test_softmax_of_large_logits() -> None:
    found = softmax(np.array([[1e4, 1e4 - 1], [-1e4, 0]], np.float32))
    np.testing.assert_allclose(found, np.array([[0.7310586, 0.2689414], [0, 1]]), atol=1e-6)


# --- what people hand over -----------------------------------------------------------------------

ODD: dict[str, Any] = {
    "None": None,
    "float": 3.5,
    "nan": float("nan"),
    "flag": True,
    "mapping": {},
    "set": {1},
    "object": object(),
    "function": lambda: 1,
    "bytes": b"x",
    "nested": [[]],
    "nones": [None],
    "empty": "",
    "half": "\ud800",
    "ids": [[1.5]],
    "array": np.zeros((2, 2)),
    "scalar": np.array(3),
    "type": int,
    "endless": -(10**9),
}
CALLS: dict[str, dict[str, Any]] = {
    "encode_image": {"images": 0, "mode": "c", "batch_size": 2, "transform": "clip"},
    "encode_text": {"texts": "a", "batch_size": 2, "on_long": "error"},
    "encode_video": {"frames": 0, "num_frames": 1, "mode": "c", "batch_size": 2},
    "text_classifier": {"labels": ["a", "b"], "templates": ["a {}"], "on_long": "error"},
    "classify": {"images": 0, "labels": ["a", "b"], "templates": "a {}", "top_k": 1, "mode": "c"},
    "retrieve": {"images": 0, "texts": "a", "mode": "c", "batch_size": 2, "on_long": "error"},
    "classify_videos": {"videos": 1, "labels": ["a"], "num_frames": 1, "top_k": 1},
    "retrieve_videos": {"videos": 1, "texts": "a", "num_frames": 1, "batch_size": 2},
    "match": {"images": 0, "texts": "a", "batch_size": 2, "on_long": "error"},
}


@pytest.mark.filterwarnings("ignore:float32")
@pytest.mark.parametrize("method", CALLS)
def test_odd_arguments_work_or_are_refused_by_an_error_of_ours(model: Model, method: str) -> None:
    picture = pictures(1)[0]
    given = {"images": picture, "frames": [picture], "videos": [[picture]]}
    usual = {name: given.get(name, value) for name, value in CALLS[method].items()}
    getattr(model, method)(**usual)
    for argument in usual:
        for odd in ODD.values():
            with suppress(InternVLError):
                getattr(model, method)(**usual | {argument: odd})


@pytest.mark.parametrize(
    ("method", "name", "ours"),
    [
        ("classify", "candidate_labels", "labels"),
        ("classify", "template", "templates"),
        ("classify", "hypothesis_template", "templates"),
        ("classify", "top", "top_k"),
        ("encode_text", "normalize_embeddings", "normalize"),
        ("encode_text", "sentences", "texts"),
        ("encode_image", "pixel_values", "images"),
        ("encode_video", "n_frames", "num_frames"),
    ],
)
def test_names_of_other_libraries_are_told_ours(
    model: Model, method: str, name: str, ours: str
) -> None:
    with pytest.raises(UsageError, match=f"{method}: argument '{name}'.*called '{ours}' here"):
        getattr(model, method)(**{name: 1})
    with pytest.raises(UsageError, match="did you mean"):
        model.encode_image(pictures(1), normalise_it=True, batchsize=3)  # type: ignore[call-arg]


def test_templates_may_be_functions(model: Model) -> None:
    functions = [lambda c: f"a {c}", lambda c: f"one {c.upper()}"]
    found = model.text_classifier(["cat", "dog"], functions)
    texts = [["a cat", "one CAT"], ["a dog", "one DOG"]]
    means = [unit(model.encode_text(some, normalize=True).mean(axis=0)) for some in texts]
    np.testing.assert_allclose(found, means, atol=ATOL)
    assert model.text_classifier(["cat", "dog"], list(functions)) is found
    with pytest.raises(UsageError, match=r"it failed for the label 'cat': .*argument"):
        model.text_classifier(["cat"], [lambda: "a"])  # type: ignore[list-item, misc]
    with pytest.raises(UsageError, match="expected a string for the label 'cat', found NoneType"):
        model.text_classifier(["cat"], [lambda c: None])  # type: ignore[list-item, return-value]


def test_one_label_has_its_cosine(model: Model) -> None:
    picture = pictures(1)[0]
    embeds = model.encode_image(picture, normalize=True, transform="classification")
    cosines = (embeds @ model.text_classifier(["a", "b"]).T)[0]
    ((only,),) = model.classify(picture, ["b"])
    assert only["score"] == 1 and only["cosine"] == pytest.approx(float(cosines[1]), abs=1e-5)
    (best,) = model.classify(picture, ["a", "b"], top_k=1)
    assert len(best) == 1 and best[0]["cosine"] == pytest.approx(float(cosines.max()), abs=1e-5)


def test_generators_are_read_a_batch_at_a_time(model: Model) -> None:
    given, alive, most = pictures(7), 0, 0

    def frames() -> Any:
        nonlocal alive, most
        for picture in given:
            alive += 1
            most = max(most, alive)
            yield picture

    def counted(function: Any) -> Any:
        def counting(feeds: Any, **more: Any) -> Any:
            nonlocal alive
            alive -= len(next(iter(feeds.values())))
            return function(feeds, **more)

        return counting

    session = model.session("image_embed")
    session.run = counted(session.run)  # type: ignore[method-assign]
    found = model.encode_image(frames(), batch_size=2)
    assert most <= 3  # the first one is looked at to see that there is any
    np.testing.assert_allclose(found, model.encode_image(given), atol=ATOL)
    scores = model.match((p for p in given), "a", batch_size=3)
    np.testing.assert_allclose(scores, model.match(given, "a"), atol=ATOL)
    with pytest.raises(MediaError, match=r"image 3 \(bytes, 1 bytes\)"):
        model.encode_image(iter([*given[:2], b"x"]), batch_size=2)


def test_pixel_values_that_are_none_are_refused(model: Model) -> None:
    with pytest.raises(MediaError, match="these are not normalised"):
        model.encode_image(np.full((1, 3, 56, 56), 200, np.float32))


def test_long_texts_are_refused_where_that_is_asked_for(model: Model) -> None:
    long, picture = "a b c " * 200, pictures(1)[0]
    for call in (
        lambda: model.encode_text([*["a"] * 70, long], on_long="error"),
        lambda: model.match(picture, long, on_long="error"),
        lambda: model.retrieve(picture, long, on_long="error"),
        lambda: model.classify(picture, [long], on_long="error"),
        lambda: model.classify_videos([[picture]], [long], on_long="error"),
        lambda: model.retrieve_videos([[picture]], [long], on_long="error"),
    ):
        with pytest.raises(MediaError, match="at most 80 are read; shorten it"):
            call()


def as_torch_has_it(name: str) -> Any:
    """What stands for ``torch.device``, which needs no PyTorch."""
    return type("device", (), {"__str__": lambda _: name})()


def test_devices_are_known_at_once() -> None:
    assert sessions.require_device(as_torch_has_it("cuda:1")) == "cuda:1"
    assert sessions.require_device(None) == "auto"
    for wrong in ("gpu", "CUDA", "cuda:", "cpu:0", 0, b"cpu", "x" * 999, as_torch_has_it("mps")):
        with pytest.raises(
            UsageError, match="expected 'auto', 'cpu', 'cuda' or 'cuda:1'"
        ) as caught:
            load("nowhere", device=wrong)  # type: ignore[arg-type]
        assert len(str(caught.value)) < 250
    with pytest.raises(UsageError, match="images: expected ImageOptions, found dict"):
        Model(None, lambda _: None, {})  # type: ignore[arg-type, return-value]
    with pytest.raises(UsageError, match=r"load: argument 'device_map'.*called 'device' here"):
        load("nowhere", device_map="auto")  # type: ignore[call-arg]
