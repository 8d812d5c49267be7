"""The demo: its data, its language, its tokenizer, and the model trained on them."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import sentencepiece as spm
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from internvl_edge.demo import evaluate, language, scenes
from internvl_edge.demo.training.batches import BOS, EOS, IGNORED, TrainingBatches, pixel_values
from internvl_edge.demo.training.reference import CHECKPOINT, ReferenceModel
from internvl_edge.demo.training.tokenizer import VOCAB_SIZE, train_tokenizer
from internvl_edge.demo.training.train import (
    CONFIG,
    PatchHeads,
    Plan,
    generation,
    losses,
    rate,
    save_checkpoint,
)
from internvl_edge.errors import MissingDependency
from internvl_edge.export.checkpoint.load import load_reference
from internvl_edge.export.config.checkpoint import load_config
from internvl_edge.export.models import InternVL
from internvl_edge.runtime.text.tokenizer import TOKENIZER_FILE, Tokenizer

MAX_CHECKPOINT_NBYTES = 8_000_000
seeds = st.integers(0, 2**32 - 1)


def description(seed: int, count: int) -> language.Description:
    return language.random_description(np.random.default_rng(seed), count)


@pytest.fixture(scope="module")
def reference() -> ReferenceModel:
    return ReferenceModel()


@pytest.fixture(scope="module")
def tokenizer() -> spm.SentencePieceProcessor:
    return spm.SentencePieceProcessor(model_file=str(CHECKPOINT / TOKENIZER_FILE))


# --- language --------------------------------------------------------------------------------


def parse(caption: str) -> tuple[list[tuple[str, str]], set[str]]:
    """The items and the relations that a caption names, by splitting words."""
    relations = {axis for axis in language.AXES if f" {axis} " in caption}
    for axis in relations:
        caption = caption.replace(f" {axis} ", "|")
    items = [tuple(item.split(" ")[1:]) for item in caption.split("|")]
    return [(colour, digit) for colour, digit in items], relations


@given(seeds, st.integers(1, 3))
def test_a_caption_says_everything_and_nothing_twice(seed: int, count: int) -> None:
    truth = description(seed, count)
    items, relations = parse(str(truth))
    assert items == [(language.COLOURS[i.colour], language.DIGITS[i.digit]) for i in truth.items]
    assert relations == ({truth.axis} if count > 1 else set())
    assert len({digit for _, digit in items}) == len({colour for colour, _ in items}) == count


@given(seeds, st.integers(1, 3))
def test_a_near_miss_is_false_in_one_thing(seed: int, count: int) -> None:
    truth = description(seed, count)
    wrong = language.near_miss(truth, np.random.default_rng(seed))
    (right_items, right_axis), (items, axis) = parse(str(truth)), parse(str(wrong))
    assert str(wrong) != str(truth)
    words = itertools.chain(*right_items), itertools.chain(*items)
    changed_words = sum(a != b for a, b in zip(*words, strict=True))
    is_reversed = items == right_items[::-1] and axis == right_axis
    assert is_reversed or (changed_words, axis == right_axis) in {(1, True), (0, False)}


@given(seeds, st.integers(1, 3))
def test_answers_follow_from_the_caption(seed: int, count: int) -> None:
    truth = description(seed, count)
    prompt, answer = language.random_question(truth, np.random.default_rng(seed))
    items, _ = parse(str(truth))
    question = prompt.removeprefix("Question: ").removesuffix("? Answer:")
    *_, last = question.split(" ")
    if question.startswith("what colour"):
        assert (answer, last) in items
    elif question.startswith("how many"):
        assert answer == language.COUNTS[count - 1]
    elif last in language.COLOURS:
        assert (last, answer) in items
    else:
        assert answer == items[0 if last in ("left", "above") else -1][1]
        assert (last in ("left", "right")) == (truth.axis == "left of")


# --- scenes ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_no_scan_is_in_both_splits() -> None:
    train, held_out = scenes.scans("train"), scenes.scans("held-out")
    assert sum(map(len, train)) + sum(map(len, held_out)) == 1797
    for trained, kept in zip(train, held_out, strict=True):
        assert 0.19 < len(kept) / (len(kept) + len(trained)) < 0.21
        assert not {s.tobytes() for s in trained} & {s.tobytes() for s in kept}


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    scenes.scans.cache_clear()
    with pytest.raises(MissingDependency, match=r"internvl-edge\[demo\]"):
        scenes.scans("train")
    scenes.scans.cache_clear()


@pytest.mark.parametrize("split", ["train", "held-out"])
def test_scenes_follow_from_seed_and_index(split: scenes.Split) -> None:
    first, again = scenes.scene(split, 7, 3), scenes.scene(split, 7, 3)
    assert np.array_equal(first.image, again.image)
    assert first.truth == again.truth
    assert not np.array_equal(first.image, scenes.scene(split, 7, 4).image)
    assert not np.array_equal(first.image, scenes.scene(split, 8, 3).image)


@pytest.mark.parametrize("index", range(40))
def test_items_lie_as_the_caption_says(index: int) -> None:
    """Positions and colours are read back from the pixels."""
    drawn = scenes.scene("held-out", 11, index)
    assert drawn.image.shape == (scenes.CANVAS, scenes.CANVAS, 3)
    centres = []
    for number, item in enumerate(drawn.truth.items):
        rows, columns = np.nonzero(drawn.owner == number)
        assert len(rows) >= 8
        centres.append((rows.mean(), columns.mean()))
        ink = drawn.image[rows, columns].mean(axis=0)
        hues = np.array([scenes.RGB[name] for name in language.COLOURS], float)
        cosine = hues @ ink / np.linalg.norm(hues, axis=1)
        assert cosine.argmax() == item.colour
    along, across = np.diff(centres, axis=0).T[:: 1 if drawn.truth.axis == "above" else -1]
    assert (along > 8).all()
    assert (abs(across) < along).all()


def test_data_sets() -> None:
    images, captions = scenes.retrieval_scenes(60)
    assert len(set(captions)) == len(images) == 60
    _, labels = scenes.classification_scenes(60)
    assert set(labels) == set(range(10))
    images, texts, is_match = scenes.matching_pairs(60)
    assert is_match.sum() == 30
    assert [t == c for t, c in zip(texts, _captions(60, 4), strict=True)] == is_match.tolist()
    images, questions = scenes.question_scenes(60)
    assert len(images) == len(questions) == 60
    assert len(scenes.calibration_images(5)) == len(scenes.calibration_texts(5)) == 5
    assert scenes.calibration_texts(20) == scenes.calibration_texts(20)


def _captions(n: int, seed: int) -> list[str]:
    return [scenes.scene("held-out", seed, i).caption for i in range(n)]


# --- tokenizer -------------------------------------------------------------------------------


@given(st.text(st.characters(blacklist_categories=("Cs", "Cc")), max_size=30))
def test_any_text_survives_the_tokenizer(text: str) -> None:
    tokenizer = spm.SentencePieceProcessor(model_file=str(CHECKPOINT / TOKENIZER_FILE))
    ids = tokenizer.encode(text)
    assert 0 not in ids
    if "\u2581" not in text:  # SentencePiece's own sign for a space
        assert tokenizer.decode(ids) == text


def test_the_tokenizer_is_laid_out_as_llama(tokenizer: spm.SentencePieceProcessor) -> None:
    special = tokenizer.unk_id(), tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.pad_id()
    assert special == (0, 1, 2, -1)
    assert tokenizer.vocab_size() == VOCAB_SIZE == CONFIG.qllama.vocab_size
    for word in (*language.DIGITS, *language.COLOURS, "above", "left"):
        assert len(tokenizer.encode(f"a {word}")) == 2
    whole = tokenizer.encode(f"{language.CAPTION_PROMPT} a red seven")
    parts = [tokenizer.encode(text) for text in (language.CAPTION_PROMPT, "a red seven")]
    assert whole == parts[0] + parts[1]


def test_training_the_tokenizer_again_gives_the_same_bytes(tmp_path: Path) -> None:
    train_tokenizer(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (CHECKPOINT / TOKENIZER_FILE).read_bytes()


def test_the_runtime_makes_the_ids_that_were_trained_on(
    tokenizer: spm.SentencePieceProcessor,
) -> None:
    runtime = Tokenizer(CHECKPOINT / TOKENIZER_FILE)
    batch = TrainingBatches(tokenizer, seed=9, count=1, size=12)[0]
    drawn = [scenes.scene("train", 9, i) for i in range(12)]
    true = [row for row in range(12) if batch.is_match[row]]
    ids = runtime.match([drawn[row].caption for row in true])
    expected = batch.match_ids[true].numpy()
    assert _stripped(ids) == _stripped(expected)
    texts = ["a photo of a nine", "a red seven left of a blue three"]
    glued = [[BOS, *tokenizer.encode(language.CONTRASTIVE_PREFIX + t), EOS] for t in texts]
    assert _stripped(runtime.contrastive(texts)) == glued


def _stripped(ids: np.ndarray) -> list[list[int]]:
    return [[i for i in row if i > 0] for row in ids.tolist()]


# --- batches and losses ----------------------------------------------------------------------


def test_batches_are_what_they_say(tokenizer: spm.SentencePieceProcessor) -> None:
    data = TrainingBatches(tokenizer, seed=3, count=2, size=24)
    batch, again = data[1], data[1]
    assert torch.equal(batch.generated_ids, again.generated_ids)
    drawn = [scenes.scene("train", 3, 24 + i) for i in range(24)]
    assert torch.equal(batch.pixels, pixel_values([s.image for s in drawn]))
    for row, s in enumerate(drawn):
        assert batch.positives[row, row]
        assert set(batch.patch_digits[row].tolist()) - {IGNORED} <= {
            item.digit for item in s.truth.items
        }
        stated = tokenizer.decode([i for i in batch.match_ids[row].tolist() if i > EOS])
        assert (stated == s.caption) == bool(batch.is_match[row])
        labels = batch.generated_labels[row]
        learnt = labels != IGNORED
        assert torch.equal(labels[learnt], batch.generated_ids[row][learnt])
        assert labels[learnt][-1] == EOS
        assert batch.generated_ids[row, 0] == BOS
        assert not learnt[0]


def test_a_text_is_positive_for_every_scene_it_is_true_of(
    tokenizer: spm.SentencePieceProcessor,
) -> None:
    batch = TrainingBatches(tokenizer, seed=4, count=1, size=64)[0]
    drawn = [scenes.scene("train", 4, i) for i in range(64)]
    for column in range(64):
        ids = [i for i in batch.text_ids[column].tolist() if i > EOS]
        text = tokenizer.decode(ids).removeprefix(language.CONTRASTIVE_PREFIX)
        named = [d for d in language.DIGITS if text in {t.format(d) for t in language.TEMPLATES}]
        for row, s in enumerate(drawn):
            alone = len(s.truth.items) == 1
            truth = (
                alone and language.DIGITS[s.truth.items[0].digit] == named[0]
                if named
                else s.caption == text
            )
            assert bool(batch.positives[row, column]) == truth


@pytest.mark.slow
def test_training_forward_agrees_with_inference(
    reference: ReferenceModel, tokenizer: spm.SentencePieceProcessor
) -> None:
    batch = TrainingBatches(tokenizer, seed=5, count=1, size=6)[0]
    model = reference.model
    with torch.inference_mode():
        vision = model.vision_model(batch.pixels)
        logits, queries = generation(model, vision, batch.generated_ids)
        expected, _ = model.prefill(vision, batch.generated_ids, (batch.generated_ids > 0).long())
        real = batch.generated_ids > 0  # nobody reads what stands on padding
        expected = expected[:, CONFIG.num_query_token :]
        torch.testing.assert_close(logits[real], expected[real], atol=1e-4, rtol=0)
        torch.testing.assert_close(queries, model.encode_queries(vision)[0], atol=1e-4, rtol=0)


def test_every_parameter_learns(tokenizer: spm.SentencePieceProcessor) -> None:
    torch.manual_seed(0)
    model, heads = InternVL(CONFIG), PatchHeads(CONFIG.vision.hidden_size)
    with torch.no_grad():
        torch.nn.init.normal_(model.text_projection)
        torch.nn.init.normal_(model.query_tokens)
    batch = TrainingBatches(tokenizer, seed=6, count=1, size=8)[0]
    torch.stack(list(losses(model, heads, batch).values())).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


# --- the trained checkpoint ------------------------------------------------------------------


def test_the_checkpoint_is_small_and_strictly_ours() -> None:
    config = load_config(CHECKPOINT)
    assert config.internvl == CONFIG
    assert sum(f.stat().st_size for f in CHECKPOINT.iterdir()) <= MAX_CHECKPOINT_NBYTES
    with safe_open(CHECKPOINT / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    InternVL(CONFIG).load_state_dict(state, strict=True)


def test_saving_and_loading_round_trips(tmp_path: Path, reference: ReferenceModel) -> None:
    save_checkpoint(reference.model, tmp_path)
    loaded = load_reference(tmp_path)
    for name, tensor in reference.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    for name in ("config.json", "preprocessor_config.json", "model.safetensors"):
        assert (tmp_path / name).read_bytes() == (CHECKPOINT / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["c", "g"])
def test_it_classifies_and_retrieves(reference: ReferenceModel, mode: str) -> None:
    assert evaluate.zero_shot_accuracy(reference, 200, mode) >= 0.9
    assert evaluate.retrieval_recall_at_1(reference, 100, mode) >= 0.8


@pytest.mark.slow
def test_it_matches(reference: ReferenceModel) -> None:
    assert evaluate.matching_accuracy(reference, 200) >= 0.95


@pytest.mark.slow
def test_it_captions_and_answers(reference: ReferenceModel) -> None:
    assert evaluate.caption_exact_match(reference, 100) >= 0.85
    assert evaluate.vqa_accuracy(reference, 100) >= 0.85


class Oracle:
    """Knows every scene by its bytes; wrong on purpose for a share of them."""

    def __init__(self, truths: dict[bytes, str], wrong: int) -> None:
        self.truths, self.wrong = truths, wrong

    def caption(self, images: list[scenes.Pixels], **_: object) -> list[str]:
        known = [self.truths[image.tobytes()] for image in images]
        return ["a cat"] * self.wrong + known[self.wrong :]

    def match(self, images: list[scenes.Pixels], texts: list[str]) -> np.ndarray:
        return np.array(
            [float(self.truths[i.tobytes()] == t) for i, t in zip(images, texts, strict=True)]
        )


def test_figures_are_shares_of_right_answers() -> None:
    drawn = [scenes.scene("held-out", 3, i) for i in range(20)]
    drawn += [scenes.scene("held-out", 4, i) for i in range(20)]
    oracle = Oracle({s.image.tobytes(): s.caption for s in drawn}, wrong=5)
    assert evaluate.caption_exact_match(oracle, 20) == 0.75  # type: ignore[arg-type]
    assert evaluate.matching_accuracy(oracle, 20) == 1.0


def test_the_plan_ends_at_zero_learning_rate() -> None:
    plan = Plan(steps=50, warmup_steps=10)
    rates = [rate(step, plan) for step in range(51)]
    assert max(rates) == rates[9] == 1.0
    assert rates[50] == 0
    assert all(a >= b for a, b in itertools.pairwise(rates[9:]))
