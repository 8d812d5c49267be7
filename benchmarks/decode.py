"""Tokens per second of the decoder at weight-only precisions, and what the loop itself costs.

    python benchmarks/decode.py                 # QLLaMA-8B widths, 4 layers, and the demo
    python benchmarks/decode.py --layers 2 --work DIR

    fp32, int8-wo, int4-wo     the decoder on ONNX Runtime's CPU provider, batch 1
    pytorch eager fp32         the reference, with the same cache

    int4-wo, N in place        the same with a cache of N positions that is written where it lies

All read one token after the image's queries and a short prompt, and int4-wo also after longer
ones, with the same number of threads; weights are synthetic, speed does not depend on them. What a
greedy token through ``generate`` costs on the demo beyond the call that computes it, with a cache
that grows and with one in place:

    overhead_us    beyond ONNX Runtime's own call, binding included; target 100 µs
    loop_us        beyond the session's ``step``: the loop alone
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np

import internvl_edge
from internvl_edge import compiler
from internvl_edge.artifact.components import COMPONENTS, DECODER
from internvl_edge.benchmark.machine import environment
from internvl_edge.compiler.precision import recipe_of
from internvl_edge.export.synthetic import PRESETS, Synthesis, shrink, write_checkpoint
from internvl_edge.runtime.generation.batch import Batch, Generation, Prompt
from internvl_edge.runtime.generation.cache import start
from internvl_edge.runtime.generation.loop import generate
from internvl_edge.types import Array

RESULTS = Path(__file__).parent / "results" / "decode.json"
PRECISIONS = ("fp32", "int8-wo", "int4-wo")
PAST, PROMPT = 96, 8  # positions of the cache; tokens of the prompt
LONGER = (488, 1000)  # positions of other caches
ROUNDS = 5
TOKENS = 12  # that are timed, after three that are not
DEMO_TOKENS = 60
CALLS = ("run_with_iobinding", "run_with_ortvaluevector")  # ONNX Runtime's own, of a decoder


def export_decoder(checkpoint: Path, out: Path, precision: str, capacity: int | None = None) -> int:
    """Export the decoder alone; return the bytes of its weights."""
    recipe = recipe_of(precision)
    options = compiler.ExportOptions(
        checkpoint=checkpoint,
        out=out,
        precision=precision,
        components=("decoder",),
        verify="none",
        cache_capacity=capacity,
        # any scales are as fast as the best ones
        recipe=None if recipe is None else replace(recipe, num_samples=1, smooth=None),
    )
    return compiler.export(options).manifest.components["decoder"].nbytes


def prompt_of(vocabulary: int, past: int = PAST) -> Prompt:
    ids = np.random.default_rng(0).integers(3, vocabulary, (1, PROMPT))
    return Prompt(rows=ids.tolist(), past=past)


def cache_of(config: Any, past: int = PAST) -> dict[str, Array]:
    llama = config.internvl.qllama
    shape = 1, llama.num_attention_heads, past, llama.head_dim
    rng = np.random.default_rng(1)
    return {
        f"present.{i}.{part}": rng.standard_normal(shape).astype(np.float32)
        for i in range(llama.num_hidden_layers)
        for part in ("key", "value")
    }


def timed(read: Callable[[Array], Array]) -> dict[str, float]:
    """Compute tokens per second at the median of each token's seconds."""
    token, seconds = np.array([5]), []
    for _ in range(TOKENS + 3):
        begun = time.perf_counter()
        read(token)
        seconds.append(time.perf_counter() - begun)
    median = statistics.median(seconds[3:])
    return {"token_ms": 1e3 * median, "tokens_per_second": 1 / median}


def ours(out: Path, config: Any, past: int = PAST) -> dict[str, float]:
    with internvl_edge.open_session(out, "decoder") as session:
        prompt = prompt_of(config.internvl.qllama.vocab_size, past)
        batch = Batch(start(session, cache_of(config, past)), prompt, TOKENS + 3)
        batch.read_prompt()
        return timed(batch.read)


def eager(checkpoint: Path, config: Any) -> dict[str, float]:
    """Make calls of the reference in float32; its cache is that of its last call."""
    import torch

    from internvl_edge.export.checkpoint.load import load_reference
    from internvl_edge.export.components import build_component

    module = build_component(COMPONENTS[DECODER], load_reference(checkpoint))

    class Reference:
        def __init__(self) -> None:
            self.past = [torch.from_numpy(values) for values in cache_of(config).values()]

        def run(self, *feeds: Array) -> Array:
            with torch.inference_mode():
                logits, *self.past = module(*map(torch.from_numpy, feeds), *self.past)
            last: Array = logits[:, -1].numpy()
            return last

        def select(self, rows: Array) -> None:
            raise NotImplementedError

    prompt = prompt_of(config.internvl.qllama.vocab_size)
    batch = Batch(Reference(), prompt, TOKENS + 3)
    batch.read_prompt()
    return timed(batch.read)


def in_turns(checkpoint: Path, work: Path, config: Any) -> dict[str, Any]:
    """Time a token at int4-wo after caches of several lengths: one that grows, one in place.

    Its capacity is the next multiple of 128 that holds everything.
    """
    result = {}
    for past in (PAST, *LONGER):
        capacity = -(-(past + PROMPT + TOKENS + 3) // 128) * 128
        out = work / f"in place {capacity}"
        export_decoder(checkpoint, out, "int4-wo", capacity)
        rounds = [
            (ours(work / "int4-wo", config, past), ours(out, config, past)) for _ in range(ROUNDS)
        ]
        grows, in_place = (
            statistics.median(run["token_ms"] for run in each) for each in zip(*rounds, strict=True)
        )
        result[str(past + PROMPT)] = {
            "capacity": capacity,
            "grows_token_ms": grows,
            "in_place_token_ms": in_place,
        }
        print(past + PROMPT, result[str(past + PROMPT)], flush=True)
        shutil.rmtree(out)
    return result


def overhead(out: Path, capacity: int | None = None) -> dict[str, float]:
    """Measure the microseconds a token of ``generate`` itself, on the demo."""
    parts = ("vision", "image_queries", "decoder")
    options = compiler.ExportOptions(
        out=out, components=parts, verify="none", cache_capacity=capacity
    )
    compiler.export(options)
    with internvl_edge.load(out) as model, internvl_edge.open_session(out, "decoder") as opened:
        session: Any = opened
        cache = model.see(np.zeros((1, 3, 48, 48), np.float32)).cache
        prompt = Prompt(rows=[[1, 5, 6]], past=next(iter(cache.values())).shape[2])
        how = Generation(max_new_tokens=DEMO_TOKENS, stop_ids=())

        def beyond(watched: Watched) -> float:
            begun, watched.seconds = time.perf_counter(), 0.0
            generate(start(session, cache), prompt, how)
            return 1e6 * (time.perf_counter() - begun - watched.seconds) / DEMO_TOKENS

        with Watched(session, ("run_device", "step")) as steps:
            loop = [beyond(steps) for _ in range(20)]
        with Watched(session._session, CALLS) as calls:
            overhead = [beyond(calls) for _ in range(20)]
        return {
            "overhead_us": statistics.median(overhead),
            "loop_us": statistics.median(loop),
            "target_us": 100.0,
        }


class Watched:
    """The time that some of an object's calls take, added up until the block ends."""

    def __init__(self, watched: Any, names: tuple[str, ...]) -> None:
        self._watched, self._names, self.seconds = watched, names, 0.0

    def __enter__(self) -> Self:
        for name in self._names:
            setattr(self._watched, name, partial(self._timed, getattr(self._watched, name)))
        return self

    def __exit__(self, *exc: object) -> None:
        for name in self._names:
            delattr(self._watched, name)

    def _timed(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        begun = time.perf_counter()
        result = call(*args, **kwargs)
        self.seconds += time.perf_counter() - begun
        return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--work", type=Path, help="keep checkpoint and directories here")
    parser.add_argument("--json", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    config = shrink(PRESETS["qllama-8b"], chosen.layers)
    result: dict[str, Any] = {"layers": chosen.layers, "past": PAST + PROMPT, "batch": 1}
    with tempfile.TemporaryDirectory() as folder:
        work = chosen.work or Path(folder)
        checkpoint = work / "checkpoint"
        if not checkpoint.exists():
            write_checkpoint(Synthesis(config=config), checkpoint)
        result["loop"] = overhead(work / "demo")
        result["loop_in_place"] = overhead(work / "demo in place", 128)
        for precision in PRECISIONS:
            nbytes = export_decoder(checkpoint, work / precision, precision)
            result[precision] = ours(work / precision, config) | {"weights_nbytes": nbytes}
            print(precision, result[precision], flush=True)
        result["int4-wo_by_positions"] = in_turns(checkpoint, work, config)
        result["pytorch"] = eager(checkpoint, config)
        print("pytorch", result["pytorch"], result["loop"], result["loop_in_place"])
    result["environment"] = environment()
    chosen.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
