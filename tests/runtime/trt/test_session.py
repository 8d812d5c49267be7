"""What an engine computes through a session, on a stand-in GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.gpu import fake_engine
from support.gpu.fake_engine import INPUTS, OUTPUTS, expected
from support.gpu.trt_bench import TARGETS, Arrays, Bench, assert_same, feeds_of

from internvl_edge.artifact.open import Artifact
from internvl_edge.errors import FeedError, UsageError
from internvl_edge.runtime import session as session_module
from internvl_edge.runtime.ort.options import OrtOptions
from internvl_edge.runtime.trt.options import TrtOptions
from internvl_edge.runtime.trt.session import open_component


def test_it_computes_what_the_engine_does(bench: Bench) -> None:
    with bench.open() as session:
        assert list(session.inputs) == ["x", "ids"]
        assert list(session.outputs) == ["y", "part"]
        for seed, (batch, length) in enumerate([(1, 1), (8, 6), (1, 1), (3, 2), (4, 1), (5, 1)]):
            feeds = feeds_of(batch, length, seed)
            assert_same(session.run(feeds), feeds)
    assert bench.cuda.num_live == 0
    assert not bench.trt.runtimes[0].engine_host_code_allowed


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    calls=st.lists(st.tuples(st.integers(1, 8), st.integers(1, 6)), min_size=1, max_size=12),
    buckets=st.sets(st.sampled_from([1, 2, 3, 4, 8])),
    graphs=st.booleans(),
    target=st.sampled_from(list(TARGETS)),
)
def test_any_calls_in_any_order(
    tmp_path_factory: pytest.TempPathFactory,
    calls: list[tuple[int, int]],
    buckets: set[int],
    graphs: bool,
    target: str,
) -> None:
    bench = Bench(tmp_path_factory.mktemp("out"), target)
    with bench.open(graphs=graphs, batch_buckets=tuple(buckets)) as session:
        for seed, (batch, length) in enumerate(calls * 3):
            feeds = feeds_of(batch, length, seed)
            assert_same(session.run(feeds), feeds)
    assert bench.cuda.num_live == 0


def test_a_strided_array_is_as_good(bench: Bench) -> None:
    feeds = feeds_of(3, 4)
    strided = {"x": np.asfortranarray(feeds["x"]), "ids": feeds["ids"][:, ::-1][:, ::-1]}
    with bench.open() as session:
        assert_same(session.run(strided), feeds)


@pytest.mark.parametrize("batch", [9, 16, 21])
def test_a_larger_batch_runs_in_several_calls(bench: Bench, batch: int) -> None:
    feeds = feeds_of(batch, 3)
    with bench.open() as session:
        assert_same(session.run(feeds), feeds)
        with pytest.raises(FeedError, match="batch"):
            session.run(feeds | {"x": feeds["x"][:-1]})
        with session.lease() as slot, pytest.raises(FeedError, match=r"x \[.*the engine takes"):
            slot.run(feeds)


def test_only_the_wanted_outputs_are_copied(bench: Bench) -> None:
    feeds = feeds_of(2, 3)
    with bench.open() as session:
        bench.cuda.calls.clear()
        found = session.run(feeds, outputs=["part"])
        assert bench.cuda.calls.count("cudaMemcpyAsync") == 3
        np.testing.assert_array_equal(found["part"], expected(feeds)["part"])
        assert list(found) == ["part"]


def test_outputs_outlive_the_next_run(bench: Bench) -> None:
    first, second = feeds_of(2, 3, 1), feeds_of(2, 3, 2)
    with bench.open() as session:
        found = session.run(first)
        session.run(second)
        assert_same(found, first)


def test_views_are_of_the_slot_until_its_next_run(bench: Bench) -> None:
    first, second = feeds_of(2, 3, 1), feeds_of(2, 3, 2)
    with bench.open() as session, session.lease() as slot:
        views = slot.run(first)
        assert_same(views, first)
        slot.run(second)
        assert_same(views, second)


def test_rows_of_other_requests_are_not_in_the_filled_up_batch(bench: Bench) -> None:
    """A canary in a large batch, then a small one in the same bucket: the engine sees zeros."""
    seen = []
    compute = fake_engine.expected

    def spy(feeds: Arrays) -> Arrays:
        seen.append({name: array.copy() for name, array in feeds.items()})
        return compute(feeds)

    canary = {"x": np.full((8, 4), 1e6, np.float32), "ids": np.full((8, 2), 777, np.int64)}
    with pytest.MonkeyPatch.context() as patch, bench.open(batch_buckets=(8,)) as session:
        patch.setattr(fake_engine, "expected", spy)
        session.run(canary)
        small = feeds_of(3, 2)
        assert_same(session.run(small), small)
    assert [len(feeds["x"]) for feeds in seen] == [8, 8]
    assert all((array[3:] == 0).all() for array in seen[1].values())


def test_a_first_dimension_of_another_name_is_never_filled_up(bench: Bench) -> None:
    renamed = {
        field: tuple(replace(spec, shape=("rows", *spec.shape[1:])) for spec in specs)
        for field, specs in (("inputs", INPUTS), ("outputs", OUTPUTS))
    }
    record = replace(bench.manifest.components["vision"], **renamed)
    bench.manifest = replace(bench.manifest, components={"vision": record})
    feeds = feeds_of(3, 2)
    with bench.open(batch_buckets=(8,)) as session:
        assert_same(session.run(feeds), feeds)
        with pytest.raises(FeedError, match="the engine takes"):
            session.run(feeds_of(9, 2))


def test_the_narrowest_profile_is_chosen(bench: Bench) -> None:
    with bench.open() as session:
        for batch, length, profile in [(4, 1, 1), (5, 1, 0), (4, 2, 0), (1, 1, 1)]:
            session.run(feeds_of(batch, length))
            ran = [
                context for context in bench.trt.contexts if context.shapes.get("x") == (batch, 4)
            ]
            assert ran[-1].active_optimization_profile == profile


# --- the door -------------------------------------------------------------------------------------


def test_open_session_leads_here(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "require_backend", lambda backend: backend)
    artifact = Artifact(path=bench.path, manifest=bench.manifest)
    opened = []
    monkeypatch.setattr(
        "internvl_edge.runtime.trt.session.open_component",
        lambda *args, **options: opened.append((args, options)),
    )
    session_module.open_component(artifact, "vision", bench.target)
    options = TrtOptions(slots=2)
    session_module.open_component(artifact, "vision", bench.target, options=options)
    args = artifact, "vision", "auto", bench.target
    assert opened == [(args, {}), (args, {"options": options})]


def test_options_of_another_backend(bench: Bench) -> None:
    artifact = Artifact(path=bench.path, manifest=bench.manifest)
    options: Any = OrtOptions()
    with pytest.raises(UsageError, match="expected TrtOptions, found OrtOptions"):
        open_component(artifact, "vision", "cuda", bench.target, options=options)
