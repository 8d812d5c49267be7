"""A decoder whose cache is written in place, compared with one whose cache grows."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.chat.generation import COMPONENTS, Compiled, noise, on_host
from support.checkpoints import TINY, write_chat, write_internvl, write_tokenizer
from support.gpu.fake_engine import CAPACITY, IN_PLACE, KEY, PRESENT, Engine
from support.gpu.trt_bench import TARGETS, Bench, on_gpu_and_on_host

import internvl_edge
from internvl_edge import compiler, open_session
from internvl_edge.artifact.open import open_artifact
from internvl_edge.benchmark.inputs import seeded_feeds
from internvl_edge.benchmark.limits.workload import read_workload
from internvl_edge.compiler import ExportOptions
from internvl_edge.compiler.oracle.bisect import bisect
from internvl_edge.errors import FeedError, ResourceError, UsageError, VerificationError
from internvl_edge.export.models import qllama
from internvl_edge.export.models.qllama import decoding_mask, extended, in_place_mask
from internvl_edge.runtime.generation.answers import AnswerOptions, Answers, Opening
from internvl_edge.runtime.generation.batch import Generation, Prompt
from internvl_edge.runtime.generation.cache import DeviceDecoding, empty_cache, start
from internvl_edge.runtime.generation.fixed_cache import PAST, grown, in_place, placed, positions_of
from internvl_edge.runtime.generation.loop import generate, stream
from internvl_edge.runtime.generation.text import until_end
from internvl_edge.types import Array

pytestmark = pytest.mark.slow

ROOM = 40  # positions of the tiny models' caches here


# --- the reference -------------------------------------------------------------------------------


@given(
    past=st.integers(0, 5), length=st.integers(1, 4), spare=st.integers(0, 3), seed=st.integers(0)
)
@settings(max_examples=60, deadline=None)
def test_masks_and_caches_are_those_that_grow(
    past: int, length: int, spare: int, seed: int
) -> None:
    """Whatever lies after the new positions, in the cache and in its mask."""
    rng = np.random.default_rng(seed)
    rows, used = 3, past + length
    mask = torch.from_numpy(rng.integers(0, 2, (rows, used)))
    rest = torch.from_numpy(rng.integers(0, 2, (rows, spare)))
    first = torch.full((rows,), past)
    found = in_place_mask(torch.cat((mask, rest), dim=1), length, first)
    assert torch.equal(found[..., :used], decoding_mask(mask, length))
    assert not found[..., used:].any()
    draw = rng.standard_normal
    new, held = (
        tuple(torch.from_numpy(draw((rows, 2, n, 4))) for _ in "kv") for n in (length, used + spare)
    )
    key, value = extended((*held, first), new)  # type: ignore[arg-type]
    grew = extended((held[0][:, :, :past], held[1][:, :, :past]), new)  # type: ignore[arg-type]
    for a, b, before in zip((key, value), grew, held, strict=True):
        assert torch.equal(a[:, :, :used], b)
        assert torch.equal(a[:, :, used:], before[:, :, used:])


def test_rows_may_begin_at_places_of_their_own() -> None:
    held, new = torch.zeros(2, 1, 5, 1), torch.ones(2, 1, 2, 1)
    key, _ = extended((held, held, torch.tensor([3, 0])), (new, new))
    assert key[:, 0, :, 0].tolist() == [[0, 0, 0, 1, 1], [1, 1, 0, 0, 0]]
    seen = in_place_mask(torch.ones(2, 5, dtype=torch.int64), 2, torch.tensor([3, 0]))
    assert seen[:, 0].sum(-1).tolist() == [[4, 5], [1, 2]]


# --- ONNX Runtime --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def original(golden: Path, tmp_path_factory: Any) -> tuple[Compiled, dict[str, Array]]:
    out = tmp_path_factory.mktemp("golden") / "out"
    options = ExportOptions(
        checkpoint=golden / "tiny" / "checkpoint",
        out=out,
        components=COMPONENTS,
        cache_capacity=64,
    )
    compiler.export(options)
    with np.load(golden / "tiny" / "reference.npz") as file:
        return Compiled(out), {name: file[name] for name in file.files}


@pytest.mark.parametrize("begin", [start, on_host])
def test_greedy_and_beams_are_the_originals(original: Any, begin: Any) -> None:
    compiled, ref = original
    cache = compiled.cache(ref["in.pixel_values"])
    ids, mask = ref["in.prompt_ids_leftpad"], ref["in.prompt_mask_leftpad"]
    greedy = Generation(max_new_tokens=12)
    rows = [row[kept > 0].tolist() for row, kept in zip(ids, mask, strict=True)]
    found = generate(begin(compiled.decoder, cache), Prompt(rows=rows, past=8), greedy)
    np.testing.assert_array_equal(found, ref["gen.greedy_leftpad_max12"][:, 1:])
    ids = ref["in.prompt_ids"]
    beams = Generation(num_beams=5, min_new_tokens=8, max_new_tokens=30)
    prompt = Prompt(rows=ids.tolist(), past=8)
    for row, new in enumerate(generate(begin(compiled.decoder, cache), prompt, beams)):
        expected = ref[f"gen.beam5_min8_max30.row{row}"][0, 1:]
        np.testing.assert_array_equal(new[: len(expected)], expected)


@pytest.mark.parametrize("draft", [0, 4])
def test_greedy_is_the_originals_in_rows_and_with_drafts(original: Any, draft: int) -> None:
    """Each prompt on its own image: alone, and all of them in a decoder of two rows."""
    compiled, ref = original
    cache = compiled.cache(ref["in.pixel_values"])
    kept = zip(ref["in.prompt_ids_leftpad"], ref["in.prompt_mask_leftpad"], strict=True)
    prompts = [Prompt(rows=[ids[mask > 0].tolist()], past=8) for ids, mask in kept]
    how = Generation(max_new_tokens=12, draft_tokens=draft)
    with closing(Answers(AnswerOptions(slots=2 if draft == 0 else 0))) as answers:
        streams = [
            answers.tokens(
                compiled.decoder,
                Opening(cache={n: v[i : i + 1] for n, v in cache.items()}, prompt=prompt),
                how,
            )
            for i, prompt in enumerate(prompts)
        ]
        found = [[int(token[0]) for token in tokens] for tokens in streams]
    for ids, expected in zip(found, ref["gen.greedy_leftpad_max12"][:, 1:].tolist(), strict=True):
        assert ids == until_end(expected, how) + [2] * (2 in expected)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_internvl(tmp_path_factory.mktemp("in_place") / "checkpoint", seed=9).path
    write_tokenizer(path)
    return path


def exported(checkpoint: Path, out: Path, **more: Any) -> Path:
    options = {"components": COMPONENTS, "cache_capacity": ROOM} | more
    compiler.export(ExportOptions(checkpoint=checkpoint, out=out, **options))
    return out


@pytest.fixture(scope="module")
def out(written: Path) -> Path:
    return exported(written, written.parent / "out")


def test_the_graph_is_standard_and_says_its_capacity(out: Path) -> None:
    onnx.checker.check_model(out / "decoder.onnx", full_check=True)
    record = open_artifact(out).manifest.components["decoder"]
    shapes = {spec.name: spec.shape for spec in (*record.inputs, *record.outputs)}
    assert shapes["write_indices"] == ("batch",)
    assert shapes["attention_mask"] == ("batch", ROOM)
    assert shapes["present.0.key"] == shapes["past_key_values.0.key"] == ("batch", 3, ROOM, 16)
    assert record.verification is not None
    assert record.verification["sqnr_db"] > 100


@pytest.mark.parametrize("precision", ["fp16", "int8", "fp8", "int8-wo", "int4-wo"])
def test_every_precision_agrees_with_its_reference(
    written: Path, tmp_path: Path, precision: str
) -> None:
    """The reference's cache grows; a quantized graph is held against its simulation."""
    directory = exported(written, tmp_path / "out", precision=precision)
    figures = compiler.verify(directory, written)["decoder"]
    assert figures.get("simulated_sqnr_db", figures["sqnr_db"]) > 40


def test_blocks_are_compared_one_by_one(written: Path, out: Path) -> None:
    (reading,) = bisect(out, written, component="decoder")
    assert all(block.isolated_db > 100 for block in reading.blocks)
    assert not any(tensor.is_bad for block in reading.blocks for tensor in block.tensors)


def test_steps_write_where_the_cache_lies(out: Path) -> None:
    compiled = Compiled(out)
    decoding = start(compiled.decoder, compiled.cache(noise()))
    assert isinstance(decoding, DeviceDecoding)
    prompt = Prompt(rows=[[5] * 3] * 2, past=8)
    tokens = stream(decoding, prompt, Generation(max_new_tokens=10, stop_ids=()))
    next(tokens)
    places = [[value.data_ptr() for value in decoding._cache] for _ in tokens]
    assert len(places) == 9
    assert all(place == places[0] for place in places)


def test_text_is_that_of_a_cache_that_grows(written: Path, out: Path, tmp_path: Path) -> None:
    other = exported(written, tmp_path / "out", cache_capacity=None)
    with internvl_edge.load(out) as fixed, internvl_edge.load(other) as free:
        for how in ({}, {"num_beams": 3}, {"temperature": 1.0, "seed": 3}):
            found = [
                model.generate(noise(1, 3), np.array([[1, 7, 9]]), max_new_tokens=20, **how)
                for model in (fixed, free)
            ]
            np.testing.assert_array_equal(*found)


def test_a_chat_is_that_of_a_cache_that_grows(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    write_chat(checkpoint, seed=4)
    found = []
    for name, capacity in (("fixed", 60), ("free", None)):
        exported(checkpoint, tmp_path / name, components=None, cache_capacity=capacity)
        with internvl_edge.load(tmp_path / name) as model:
            ids = np.array([[1, 7, 9, 4]])
            found.append(model.generate(None, ids, max_new_tokens=12))
    np.testing.assert_array_equal(*found)


def test_what_does_not_fit_is_refused_before_any_work(out: Path) -> None:
    with internvl_edge.load(out) as model, pytest.raises(UsageError, match="40 positions, 41 are"):
        model.generate(noise(0, 1), np.array([[1, 7, 9]]), max_new_tokens=34)
    with internvl_edge.load(out) as model:
        found = model.generate(noise(0, 1), np.array([[1, 7, 9]]), max_new_tokens=33, stop_ids=())
    assert found.shape == (1, 33)
    with pytest.raises(UsageError, match="--cache-capacity 5 or more"):
        positions_of(np.ones((1, 5), np.int64), 4, 4)


@pytest.mark.parametrize(
    ("capacity", "components", "message"),
    [
        (5, COMPONENTS, "expected 6 to 128 positions for this model, found 5"),
        (129, COMPONENTS, "6 to 128 positions"),
        (40, ("vision",), "expected a decoder among the components, found vision"),
    ],
)
def test_capacities_that_cannot_be(
    written: Path, tmp_path: Path, capacity: int, components: Any, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        exported(written, tmp_path / "out", components=components, cache_capacity=capacity)
    assert not (tmp_path / "out").exists()


def test_a_mask_that_looks_beyond_the_new_tokens_is_found(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def careless(mask: torch.Tensor, length: int, first: torch.Tensor) -> torch.Tensor:
        return mask.bool()[:, None, None, :].expand(-1, 1, length, -1)

    monkeypatch.setattr(qllama, "in_place_mask", careless)
    with pytest.raises(VerificationError, match="decoder, output"):
        exported(written, tmp_path / "out", cache_capacity=37)  # a trace that no other test uses


@pytest.mark.parametrize("first", [-1, ROOM - 1])
def test_positions_outside_of_the_cache_are_refused(out: Path, first: int) -> None:
    with open_session(out, "decoder") as session:
        feeds = seeded_feeds(open_artifact(out), "decoder", 1)
        feeds["write_indices"][:] = first
        with pytest.raises(FeedError, match="where 20 new positions fit into a cache of 40"):
            session.run(feeds)


def test_a_cache_that_is_too_long_is_refused() -> None:
    with pytest.raises(UsageError, match="--cache-capacity 5 or more"):
        placed(np.zeros((1, 2, 5, 4)), 4)


def test_feeds_and_outputs_of_a_growing_cache_are_translated(out: Path) -> None:
    with open_session(out, "decoder") as session:
        cache = {n.replace("present.", PAST): v for n, v in empty_cache(session, 2).items()}
        feeds = {
            "input_ids": np.full((2, 3), 4),
            "attention_mask": np.ones((2, 3), np.int64),
            "position_ids": np.tile(np.arange(3), (2, 1)),
            **cache,
        }
        found = grown(session.run(in_place(feeds, session.inputs)), 3)
    assert found["present.0.key"].shape == (2, 3, 3, 16)
    assert np.abs(found["present.1.value"]).min() > 0


def test_what_a_step_moves_is_the_cache_once(out: Path) -> None:
    """Read whole, and written where the new positions lie."""
    record = open_artifact(out).manifest.components["decoder"]
    sizes = {"batch": 1, "length": 2}
    shapes = {s.name: tuple(sizes.get(str(n), n) for n in s.shape) for s in record.inputs}
    found = read_workload(out / "decoder.onnx", shapes)  # type: ignore[arg-type]
    layers, row = 2 * TINY.qllama.num_hidden_layers, 4 * TINY.qllama.hidden_size
    integers = 8 * (2 + ROOM + 2 + 1)  # ids, mask, positions, write_indices
    logits = 4 * 2 * TINY.qllama.vocab_size
    assert found.io_nbytes == integers + layers * row * (ROOM + 2) + logits


def test_speed_is_measured_on_feeds_that_fit(out: Path) -> None:
    with open_session(out, "decoder") as session:
        feeds = seeded_feeds(open_artifact(out), "decoder", 1)
        assert np.isfinite(session.run(feeds)["logits"]).all()


# --- TensorRT ------------------------------------------------------------------------------------


@pytest.fixture(params=list(TARGETS))
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Bench:
    return Bench(tmp_path, request.param, IN_PLACE)


@pytest.mark.parametrize("num_beams", [1, 2, 3])
def test_an_engine_says_the_same_with_its_cache_on_the_gpu(bench: Bench, num_beams: int) -> None:
    """Beams change places, and 9 rows are more than the engine takes."""
    np.testing.assert_array_equal(*on_gpu_and_on_host(bench, num_beams))
    assert bench.cuda.num_live == 0


@pytest.mark.parametrize("target", TARGETS)
def test_an_engine_that_writes_its_cache_apart_says_the_same(tmp_path: Path, target: str) -> None:
    bench = Bench(tmp_path, target, replace(IN_PLACE, aliases={}))
    np.testing.assert_array_equal(*on_gpu_and_on_host(bench, 2))
    assert bench.cuda.num_live == 0


def test_steps_are_one_graph_and_allocate_nothing(bench: Bench) -> None:
    with bench.open() as session:
        decoding = start(session, empty_cache(session, rows=8))
        for past in range(CAPACITY):
            before, launches = len(bench.cuda.calls), bench.cuda.num_launches
            mask, positions = np.ones((8, past + 1), np.int64), np.full((8, 1), past)
            decoding.run(np.full((8, 1), past % 7), mask, positions)
            calls = bench.cuda.calls[before:]
            if past < 3:  # the prompt, a plain step, and the capture
                continue
            assert "cudaMalloc" not in calls
            assert calls.count("cudaMemcpyAsync") == 5  # ids, mask, positions, where; logits
            if bench.target == "tensorrt":
                assert bench.cuda.num_launches == launches + 1


def test_generations_share_a_slot(bench: Bench) -> None:
    with bench.open() as session:
        prompts = [Prompt(rows=[[i]]) for i in (3, 4)]
        how = Generation(max_new_tokens=12, stop_ids=())
        alone = [generate(start(session, empty_cache(session, 1)), p, how) for p in prompts]
        streams = [stream(start(session, empty_cache(session, 1)), p, how) for p in prompts]
        together = [list(tokens) for tokens in zip(*streams, strict=True)]
    np.testing.assert_array_equal(np.reshape(together, (12, 2)).T, np.concatenate(alone))


def one_step(rows: int = 2) -> dict[str, Array]:
    past = np.arange(rows * CAPACITY * 2, dtype=np.float16).reshape(rows, 1, CAPACITY, 2) / 8
    where = positions_of(np.ones((rows, 4), np.int64), 3, CAPACITY)
    ids = np.full((rows, 1), 5)
    return {"input_ids": ids, "position_ids": ids - 2, KEY: past, **where}


def test_an_input_of_the_callers_is_not_written(bench: Bench) -> None:
    """Handed over on the GPU, it is copied to where the engine may write."""
    feeds = one_step()
    with bench.open() as session:
        expected = session.run(feeds)
        shared = bench.on_gpu(feeds[KEY])
        found = session.run_device(feeds | {KEY: shared})
        for name, array in found.items():
            np.testing.assert_array_equal(array.numpy(), expected[name])
        with session.lease() as slot:
            views = slot.run_device(feeds | {KEY: shared})
            np.testing.assert_array_equal(views[PRESENT].numpy(), expected[PRESENT])
        np.testing.assert_array_equal(
            session.run(feeds | {KEY: shared})[PRESENT], expected[PRESENT]
        )


def test_a_target_may_be_the_input_itself(bench: Bench) -> None:
    feeds = one_step()
    with bench.open() as session:
        expected = session.run(feeds)[PRESENT]
        place = session.empty(KEY, (2, 1, CAPACITY, 2))
        bench.cuda.bytes_at(place.pointer, place.nbytes)[:] = feeds[KEY].view(np.uint8).ravel()
        with session.lease() as slot:
            found = slot.run_device(feeds | {KEY: place}, out={PRESENT: place})
            np.testing.assert_array_equal(found[PRESENT].numpy(), expected)
            inside = replace(place, shape=(2, 1, 7), dtype=np.dtype(np.float32))
            with pytest.raises(FeedError, match="is where this run writes"):
                slot.run_device(feeds | {KEY: place}, out={PRESENT: place, "logits": inside})


def test_no_memory_for_another_context_is_told(bench: Bench) -> None:
    """The prompt's shapes pass through a context of their own, before any other was bound."""
    feeds = one_step()
    with bench.open() as session:
        bench.trt.refuses["create_execution_context"] = "Error Code 2: OutOfMemory"
        with pytest.raises(ResourceError):
            session.run_device(feeds)
        bench.trt.refuses.clear()
        assert session.largest == {"batch": 8, "length": 16}
        found = session.run_device(feeds)
        np.testing.assert_array_equal(found[PRESENT].numpy(), session.run(feeds)[PRESENT])


def test_an_older_tensorrt_knows_no_aliases(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT before 10.15: nothing is in place, and such an engine could not have been built."""
    monkeypatch.delattr(Engine, "get_aliased_input_tensor")
    with bench.open() as session:
        assert session._spec.aliases == {}
