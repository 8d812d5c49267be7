"""A decoder's cache on the GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.gpu.fake_cuda import MEMORY
from support.gpu.fake_engine import DECODER, GraphStrategy, KernelStrategy
from support.gpu.trt_bench import TARGETS, Bench, on_gpu_and_on_host

from internvl_edge.errors import ResourceError
from internvl_edge.runtime.generation.batch import Generation, Prompt
from internvl_edge.runtime.generation.cache import empty_cache, start
from internvl_edge.runtime.generation.loop import generate, stream


@pytest.fixture(params=list(TARGETS))
def decoder(request: pytest.FixtureRequest, tmp_path: Path) -> Bench:
    return Bench(tmp_path, request.param, DECODER)


@pytest.mark.parametrize("num_beams", [1, 2, 3])
def test_a_decoder_says_the_same_with_its_cache_on_the_gpu(decoder: Bench, num_beams: int) -> None:
    """Rows end at different tokens, beams change places, and 9 are more than the engine takes."""
    found, expected = on_gpu_and_on_host(decoder, num_beams)
    np.testing.assert_array_equal(found, expected)
    assert len(set(map(len, (row[row > 0] for row in found)))) > 1  # of different lengths
    assert decoder.cuda.num_live == 0


def test_the_cache_never_crosses_to_the_host(decoder: Bench) -> None:
    with decoder.open() as session:
        decoding = start(session, empty_cache(session, rows=8))
        decoding.run(np.ones((8, 1), np.int64), np.ones((8, 1), np.int64), np.zeros((8, 1), int))
        allocated = []
        for past in range(1, 48):
            before = list(decoder.cuda.calls)
            mask, positions = np.ones((8, past + 1), np.int64), np.full((8, 1), past)
            decoding.run(np.full((8, 1), past % 7), mask, positions)
            calls = decoder.cuda.calls[len(before) :]
            assert calls.count("cudaMemcpyAsync") == 4  # ids, mask, positions; logits
            assert "cudaMemcpy" not in calls
            allocated.append(calls.count("cudaMalloc"))
        assert 4 <= sum(allocated) < 20  # blocks take turns
    contexts = [context for context in decoder.trt.contexts if context.shapes]
    assert len(contexts) <= 2  # shapes change at every step and pile nothing up
    assert decoder.cuda.num_launches == 0
    if decoder.target == "tensorrt-rtx":
        passing = contexts[-1].config
        assert passing.cuda_graph_strategy is GraphStrategy.DISABLED
        assert passing.dynamic_shapes_kernel_specialization_strategy is KernelStrategy.NONE
        first = decoder.trt.contexts[0].config
        assert first.dynamic_shapes_kernel_specialization_strategy is KernelStrategy.LAZY


def test_generations_share_a_slot(decoder: Bench) -> None:
    """Step by step in turns, in one thread: none holds the slot between its steps."""
    with decoder.open() as session:
        prompts = [Prompt(rows=[[i]]) for i in (3, 4)]
        how = Generation(max_new_tokens=12, stop_ids=())
        alone = [generate(start(session, empty_cache(session, 1)), p, how) for p in prompts]
        streams = [stream(start(session, empty_cache(session, 1)), p, how) for p in prompts]
        together = [list(tokens) for tokens in zip(*streams, strict=True)]
    np.testing.assert_array_equal(np.reshape(together, (12, 2)).T, np.concatenate(alone))


def test_a_step_without_memory_leaves_the_cache(decoder: Bench) -> None:
    def step(past: int) -> Any:
        mask, positions = np.ones((8, past + 1), np.int64), np.full((8, 1), past)
        return decoding.run(np.full((8, 1), past % 7), mask, positions)

    with decoder.open() as session:
        decoding = start(session, empty_cache(session, rows=8))
        found = [step(past) for past in range(3)]
        decoder.cuda.fail["cudaMalloc"] = 0, MEMORY
        past = 3
        with pytest.raises(ResourceError):
            for past in range(3, 48):
                found.append(step(past))
        decoder.cuda.fail.clear()
        found += [step(past) for past in range(past, 48)]
        decoding = start(session, empty_cache(session, rows=8))
        np.testing.assert_array_equal(found, [step(past) for past in range(48)])
