"""The experiments of ``gpu_plan``, each in a process of its own.

    python benchmarks/gpu_experiments.py products '{"layers": 4, …}' ANSWER.json

A product of PyTorch's is timed as a CUDA graph that goes round over more weights than the L2 cache
holds: a block of a tower finds its weights in memory, never in the cache. The time is that of the
best of three repetitions, since other work can only add to it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

Row = dict[str, Any]
Job = dict[str, Any]

WIDTH, MLP, HEADS, TOKENS = 3200, 12800, 25, 257  # of InternViT-6B at 224 px
PRODUCTS = {  # (outputs, inputs) of a block's four
    "qkv": (3 * WIDTH, WIDTH),
    "proj": (WIDTH, WIDTH),
    "fc1": (MLP, WIDTH),
    "fc2": (WIDTH, MLP),
}
# rows → what is measured: one image of 224 px, one of 448 px, batches of 8 and of 32 images
ROWS_OF_PRODUCTS = (257, 1025, 2056, 8224)
FORMATS = ("bf16", "bf16 [K,N]", "bf16 + bias", "fp8", "int8")
ROTATED_NBYTES = 400_000_000  # of weights that a graph goes round over
REPETITIONS = 3
OUTPUT_SHAPE = (TOKENS, WIDTH)  # of one image, float32


# --- ceilings, by PyTorch --------------------------------------------------------------------


def products(job: Job) -> list[Row]:
    """Time the four products of a block in each format, µs."""
    import torch

    rows = []
    for count in job.get("rows", ROWS_OF_PRODUCTS):
        for kind in FORMATS:
            try:
                parts = {n: _product_us(kind, count, *shape) for n, shape in PRODUCTS.items()}
            except (RuntimeError, ValueError) as error:  # a format that this GPU has not
                rows.append({"format": kind, "rows": count, "failed": str(error)[:200]})
                continue
            total = sum(parts.values())
            operations = 2 * count * sum(n * k for n, k in PRODUCTS.values())
            rows.append(
                {"format": kind, "rows": count, **{f"{n}_us": t for n, t in parts.items()}}
                | {"sum_us": total, "tflops": operations / total / 1e6}
            )
        torch.cuda.empty_cache()
    return rows


def _product_us(kind: str, rows: int, outputs: int, inputs: int) -> float:
    import torch
    from torch.nn import functional as F

    def normal(*shape: int) -> Any:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * 0.02

    def whole(*shape: int) -> Any:
        return torch.randint(-127, 127, shape, device="cuda", dtype=torch.int8)

    count = max(2, ROTATED_NBYTES // (2 * outputs * inputs))
    x = normal(rows, inputs)
    product: Callable[..., Any]
    if kind == "bf16":
        product, weights = F.linear, [normal(outputs, inputs) for _ in range(count)]
    elif kind == "bf16 [K,N]":
        product, weights = torch.matmul, [normal(inputs, outputs) for _ in range(count)]
    elif kind == "bf16 + bias":
        product = partial(F.linear, bias=normal(outputs))
        weights = [normal(outputs, inputs) for _ in range(count)]
    elif kind == "fp8":
        x, one = x.to(torch.float8_e4m3fn), torch.ones((), device="cuda")
        weights = [normal(outputs, inputs).to(x.dtype).t() for _ in range(count)]
        scaled = {"scale_a": one, "scale_b": one, "out_dtype": torch.bfloat16}
        product = partial(torch._scaled_mm, use_fast_accum=True, **scaled)
    else:
        x, product = whole(rows, inputs), torch._int_mm
        weights = [whole(outputs, inputs).t() for _ in range(count)]
    return _graph_us([partial(product, x, weight) for weight in weights])


def attention(job: Job) -> list[Row]:
    """Time one block's attention by each of PyTorch's kernels, µs."""
    import torch
    from torch.nn import functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kernels = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    rows = []
    for batch in job["batches"]:
        shape = (batch, HEADS, TOKENS, WIDTH // HEADS)
        q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        row: Row = {"batch": batch}
        for name, kernel in kernels.items():
            with sdpa_kernel(kernel):
                try:
                    call = partial(F.scaled_dot_product_attention, q, k, v)
                    row[f"{name}_us"] = _graph_us([call] * 10)
                except RuntimeError as error:
                    row[f"{name}_failed"] = str(error)[:200]
        rows.append(row)
    return rows


def copies(job: Job) -> list[Row]:
    """Time the copy of one image's tokens, float32, to the host, µs."""
    import torch

    source = torch.randn(OUTPUT_SHAPE, device="cuda")
    pinned, reused = torch.empty(OUTPUT_SHAPE, pin_memory=True), torch.empty(OUTPUT_SHAPE)

    def to_pinned() -> None:
        pinned.copy_(source, non_blocking=True)
        torch.cuda.synchronize()

    ways: dict[str, Callable[[], Any]] = {
        "new pages": source.cpu,
        "reused pages": lambda: reused.copy_(source),
        "pinned": to_pinned,
    }
    return [
        {"memory": name, "nbytes": source.nbytes, "us": 1e6 * _best_s(way, 30)}
        for name, way in ways.items()
    ]


# --- towers and decoders ---------------------------------------------------------------------


def torch_tower(job: Job) -> list[Row]:
    """Time the tower by ``torch.compile``, tensors on the GPU: ms, and µs per block."""
    import torch

    from internvl_edge.artifact import open_artifact
    from internvl_edge.artifact.components import COMPONENTS
    from internvl_edge.export.checkpoint.load import build_model
    from internvl_edge.export.components import build_component
    from internvl_edge.export.config.checkpoint import CheckpointConfig

    described = open_artifact(Path(job["tower"])).manifest.model
    with torch.device("cuda"):
        model = build_model(CheckpointConfig.from_json(described)).to(torch.bfloat16).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    module = torch.compile(build_component(COMPONENTS["vision"], model), mode="reduce-overhead")
    rows = []
    with torch.inference_mode():
        for batch in job["batches"]:
            x = torch.randn(batch, 3, 224, 224, device="cuda", dtype=torch.bfloat16)

            def call(pixels: Any = x) -> None:
                module(pixels)
                torch.cuda.synchronize()

            rows.append({"runs": "torch.compile", "batch": batch} | _per_block(call, batch, job))
    return rows


def tower(job: Job) -> list[Row]:
    """Time the compiled tower on ONNX Runtime, inputs and outputs on the GPU: µs per block."""
    from internvl_edge.artifact import open_artifact
    from internvl_edge.benchmark.inputs import as_taken, seeded_feeds
    from internvl_edge.runtime.ort.options import OrtOptions
    from internvl_edge.runtime.session import open_component

    artifact = open_artifact(Path(job["tower"]))
    rows, first = [], {}
    for contrib in (False, True):
        for graphs in (False, True):
            options = OrtOptions(graphs=graphs, contrib=contrib)
            begun = time.perf_counter()
            with open_component(artifact, "vision", "onnxruntime", "cuda", options=options) as s:
                opened_s = time.perf_counter() - begun
                for batch in job["batches"]:
                    feeds = as_taken(seeded_feeds(artifact, "vision", batch), s.inputs)
                    tokens = next(iter(s.run(feeds).values()))
                    first.setdefault(batch, tokens.astype(np.float64))
                    error = np.abs(tokens - first[batch]).max() / np.abs(first[batch]).max()
                    row = {
                        "runs": "X.cuda.onnx" if contrib else "X.onnx",
                        "graphs": graphs,
                        "batch": batch,
                        "opened_s": opened_s,
                        "largest_difference": float(error),
                    }
                    row |= _per_block(_on_device(s, feeds), batch, job)
                    rows.append(row | {"to_host_ms": 1e3 * _best_s(partial(s.run, feeds), 10)})
    return rows


def _on_device(session: Any, feeds: Any) -> Callable[[], Any]:
    """Make a call whose inputs lie on the GPU and whose outputs stay there."""
    from internvl_edge.runtime.ort.values import value_of

    there = {name: value_of(array, ("cuda", 0)) for name, array in feeds.items()}
    return lambda: session.run_device(there, check=False)


def decoder(job: Job) -> list[Row]:
    """Time one token of a decoder whose cache is written in place: µs."""
    from internvl_edge import open_session
    from internvl_edge.artifact import open_artifact
    from internvl_edge.runtime.generation.batch import Batch, Prompt
    from internvl_edge.runtime.generation.cache import start
    from internvl_edge.runtime.ort.options import OrtOptions

    llama = open_artifact(Path(job["decoder"])).manifest.language_model
    assert llama is not None
    heads, past = llama["num_attention_heads"], 96
    rng, shape = np.random.default_rng(0), (1, heads, past, llama["hidden_size"] // heads)
    cache = {
        f"present.{i}.{part}": rng.standard_normal(shape).astype(np.float32)
        for i in range(llama["num_hidden_layers"])
        for part in ("key", "value")
    }
    prompt = Prompt(rows=rng.integers(3, llama["vocab_size"], (1, 8)).tolist(), past=past)
    rows, first = [], []
    for contrib in (False, True):
        for graphs in (False, True):
            options = OrtOptions(graphs=graphs, contrib=contrib)
            with open_session(job["decoder"], "decoder", device="cuda", options=options) as s:
                batch = Batch(start(s, cache), prompt, 200)
                batch.read_prompt()
                logits = [batch.read(np.array([5])).copy() for _ in range(8)]
                first = first or logits
                error = max(
                    float(np.abs(got - right).max() / np.abs(right).max())
                    for got, right in zip(logits, first, strict=True)
                )
                token_s = _best_s(partial(batch.read, np.array([5])), 40)
                rows.append(
                    {"runs": "X.cuda.onnx" if contrib else "X.onnx", "graphs": graphs}
                    | {"token_us": 1e6 * token_s, "largest_difference": error}
                )
    return rows


# --- time ------------------------------------------------------------------------------------


def _graph_us(calls: Sequence[Callable[[], Any]], replays: int = 8) -> float:
    """Time calls captured into one CUDA graph: µs of each."""
    import torch

    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    best_ms = float("inf")
    for _ in range(REPETITIONS):
        begin.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        best_ms = min(best_ms, begin.elapsed_time(end))
    return 1e3 * best_ms / replays / len(calls)


def _best_s(call: Callable[[], Any], count: int) -> float:
    """Time a call that ends when its work has: seconds."""
    for _ in range(3):
        call()
    best = float("inf")
    for _ in range(REPETITIONS):
        begun = time.perf_counter()
        for _ in range(count):
            call()
        best = min(best, (time.perf_counter() - begun) / count)
    return best


def _per_block(call: Callable[[], Any], batch: int, job: Job) -> Row:
    seconds = _best_s(call, 20 if batch < 8 else 6)
    return {"ms": 1e3 * seconds, "block_us": 1e6 * seconds / job["layers"]}


EXPERIMENTS = {
    "products": products,
    "attention": attention,
    "copies": copies,
    "torch": torch_tower,
    "tower": tower,
    "decoder": decoder,
}


def main() -> None:
    """Run one experiment and write its rows."""
    rows = EXPERIMENTS[sys.argv[1]](json.loads(sys.argv[2]))
    Path(sys.argv[3]).write_text(json.dumps(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
