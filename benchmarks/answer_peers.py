"""One contender of ``answers.py`` in a process of its own, which does one thing at a time.

    python benchmarks/answer_peers.py NAME WORK THREADS

opens a contender, prints ``{}``, and answers each line it reads with the seconds of what it did:

    vision          an image of 448 px through tower and projector
    prompt N        N tokens from an empty cache on, to the logits of the last one
    tokens N        N tokens more, one after the other
    memory          nothing: the most bytes this process ever had resident

So nobody's threads wait for work on the cores that another one computes on, and the memory is of
one contender alone.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from internvl_edge.files.memory import peak_rss_nbytes
from internvl_edge.types import Array

CAPACITY = 2048  # positions, of those that are told before
MOST_TOKENS = 64  # after a prompt
TILE_TOKENS, TEXT_TOKENS = 256, 64
PROMPTS = tuple(tiles * TILE_TOKENS + TEXT_TOKENS for tiles in (1, 7))
ROOMS = (PROMPTS[0] + MOST_TOKENS, CAPACITY)  # of caches whose size is told before, for PROMPTS
SIDE = 448
SEED = 0


class Contender(Protocol):
    """A chat model, opened by somebody; a part that is not there is None."""

    vision: Callable[[], object] | None  # runs an image
    prompt: Callable[[int], object] | None  # reads so many tokens from an empty cache on
    token: Callable[[], object] | None  # reads one more


def pixels() -> Array:
    rng = np.random.default_rng(SEED)
    return rng.standard_normal((1, 3, SIDE, SIDE)).astype(np.float32)


def ids_of(count: int, vocabulary: int) -> list[int]:
    ids: list[int] = np.random.default_rng(SEED).integers(3, vocabulary, count).tolist()
    return ids


class Ours:
    """Compiled directories; one of them may have the tower alone, the other the decoder."""

    def __init__(
        self, vision: Path | None, decoder: Path | None, threads: int, tower: str = "onnxruntime"
    ) -> None:
        import internvl_edge
        from internvl_edge.runtime.ort.options import OrtOptions
        from internvl_edge.runtime.session import options_for
        from internvl_edge.runtime.text.embeddings import Embedding

        options = OrtOptions(num_threads=threads)
        self.vision = self.prompt = self.token = None
        if vision is not None:
            image, how = pixels(), options_for(tower, threads)
            session = internvl_edge.open_session(vision, "chat_vision", tower, options=how)
            self.vision = lambda: session.run({"pixel_values": image})
        if decoder is not None:
            model = internvl_edge.load(decoder, options=options)
            self._session = model.components.session("chat_decoder")
            table = model.components.token_table
            self._embed = Embedding(table, np.zeros((0, table.shape[1]), np.float32))
            self._vocabulary = table.shape[0]
            self.prompt, self.token = self._prompt, self._token

    def _prompt(self, count: int) -> None:
        from internvl_edge.runtime.generation.batch import Batch, Prompt
        from internvl_edge.runtime.generation.cache import empty_cache, start

        decoding = start(self._session, empty_cache(self._session, 1), self._embed)
        prompt = Prompt(rows=[ids_of(count, self._vocabulary)])
        self._batch = Batch(decoding, prompt, MOST_TOKENS + 1)
        self._next = self._batch.read_prompt().argmax(axis=1)

    def _token(self) -> None:
        self._next = self._batch.read(self._next).argmax(axis=1)


class PyTorch:
    """The reference in bfloat16: eager with a cache that grows, or compiled with one in place."""

    def __init__(self, checkpoint: Path, threads: int, *, compiled: bool) -> None:
        import torch

        from internvl_edge.export.checkpoint.load import load_reference

        torch.set_num_threads(threads)
        model: Any = load_reference(checkpoint, torch.bfloat16)
        self._llama, self._torch = model.language_model, torch
        self._tower, self._step = model.encode_image, self._read_step
        self._image = torch.from_numpy(pixels()).to(torch.bfloat16)
        self._is_compiled = compiled
        self.vision, self.prompt, self.token = self._vision, self._prompt, self._token
        if compiled:
            # weights as constants, packed for their products: 40 % off a token, a copy a graph
            torch._inductor.config.freezing = True
            self._tower, self._step = (
                torch.compile(call, dynamic=False, fullgraph=True)
                for call in (self._tower, self._step)
            )
            self.vision()
            for count in PROMPTS:
                self.prompt(count)
                self.token()

    def _vision(self) -> None:
        with self._torch.inference_mode():
            self._tower(self._image)

    def _prompt(self, count: int) -> None:
        llama, config = self._llama, self._llama.config
        room = 0
        if self._is_compiled:
            room = next(size for size in ROOMS if size >= count + MOST_TOKENS)
        shape = (1, config.num_key_value_heads, room, config.head_dim)
        like = llama.model.embed_tokens.weight
        self._cache = [(like.new_zeros(shape), like.new_zeros(shape)) for _ in llama.model.layers]
        self._used = 0
        self._read(ids_of(count, config.vocab_size))

    def _token(self) -> None:
        self._read([self._next])

    def _read(self, ids: list[int]) -> None:
        first = self._torch.tensor([self._used])
        self._used += len(ids)
        with self._torch.inference_mode():
            scores, grown = self._step(self._torch.tensor([ids]), first, self._cache)
        self._cache = grown or self._cache
        self._next = int(scores.argmax())

    def _read_step(self, ids: Any, first: Any, cache: list[Any]) -> tuple[Any, list[Any]]:
        """Read tokens (1, T) from a position on; logits of the last one, and a cache that grew."""
        from internvl_edge.export.models.qllama import mask_on

        torch, llama, count = self._torch, self._llama, ids.shape[1]
        held = [(*pair, first) for pair in cache] if self._is_compiled else cache
        seen = cache[0][0].shape[2] + (0 if self._is_compiled else count)
        mask = mask_on(held, torch.ones((1, seen), dtype=torch.long), count)
        rope = llama.rope(first[:, None] + torch.arange(count))
        x, presents = llama.model.embed_tokens(ids), []
        for layer, past in zip(llama.model.layers, held, strict=True):
            x, present = layer(x, rope, mask, past)
            presents.append(present)
        scores = torch.nn.functional.linear(llama.model.norm(x)[:, -1], llama.lm_head.weight)
        if not self._is_compiled:
            return scores, presents
        for places, values in zip(cache, presents, strict=True):
            for place, value in zip(places, values, strict=True):
                place.copy_(value)
        return scores, []


class LlamaCpp:
    """llama.cpp by its Python package, and its multimodal part for the tower."""

    def __init__(self, language: Path, vision: Path | None, threads: int) -> None:
        import llama_cpp

        self._api: Any = llama_cpp
        self._quiet = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._quiet, None)
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(
            str(language).encode(), llama_cpp.llama_model_default_params()
        )
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_threads, params.n_threads_batch = CAPACITY, threads, threads
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if self._context is None:
            raise RuntimeError(f"llama.cpp refuses {language}")
        vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(vocabulary)
        self.prompt, self.token = self._prompt, self._token
        self.vision: Callable[[], object] | None = None
        if vision is not None:
            self._open_tower(vision, threads)

    def _prompt(self, count: int) -> None:
        api = self._api
        api.llama_memory_clear(api.llama_get_memory(self._context), True)
        self._read(ids_of(count, self._vocabulary))

    def _token(self) -> None:
        self._read([self._next])

    def _read(self, ids: list[int]) -> None:
        api = self._api
        tokens = (api.llama_token * len(ids))(*ids)
        if api.llama_decode(self._context, api.llama_batch_get_one(tokens, len(ids))):
            raise RuntimeError("llama_decode failed")
        logits = api.llama_get_logits_ith(self._context, -1)
        row = np.ctypeslib.as_array(logits, shape=(self._vocabulary,))
        self._next = int(row.argmax())

    def _open_tower(self, vision: Path, threads: int) -> None:
        from llama_cpp import mtmd_cpp as mtmd

        mtmd.mtmd_log_set(self._quiet, None)
        params = mtmd.mtmd_context_params_default()
        params.use_gpu, params.n_threads, params.warmup = False, threads, False
        context = mtmd.mtmd_init_from_file(str(vision).encode(), self._model, params)
        if context is None:
            raise RuntimeError(f"llama.cpp refuses {vision}")
        levels = np.random.default_rng(SEED).integers(0, 256, SIDE * SIDE * 3, np.uint8)
        data = (ctypes.c_uint8 * levels.size)(*levels.tolist())
        bitmap = mtmd.mtmd_bitmap_init(SIDE, SIDE, data)
        chunks = mtmd.mtmd_input_chunks_init()
        marker = mtmd.mtmd_default_marker()
        text = mtmd.mtmd_input_text(marker, len(marker), False, True)
        bitmaps = (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap)
        if mtmd.mtmd_tokenize(context, chunks, ctypes.byref(text), bitmaps, 1):
            raise RuntimeError("mtmd_tokenize failed")
        every = [
            mtmd.mtmd_input_chunks_get(chunks, i)
            for i in range(mtmd.mtmd_input_chunks_size(chunks))
        ]
        image = next(
            chunk
            for chunk in every
            if mtmd.mtmd_input_chunk_get_type(chunk) == mtmd.MTMD_INPUT_CHUNK_TYPE_IMAGE
        )

        def run() -> None:
            if mtmd.mtmd_encode_chunk(context, image):
                raise RuntimeError("mtmd_encode_chunk failed")

        self.vision, self.tile_tokens = run, mtmd.mtmd_input_chunk_get_n_tokens(image)


class OpenVino:
    """OpenVINO with a cache of its own, as its generative pipelines have it."""

    def __init__(self, vision: Path, decoder: Path, checkpoint: Path, threads: int) -> None:
        import openvino

        from internvl_edge.export.checkpoint.checkpoint import open_checkpoint
        from internvl_edge.runtime.text.embeddings import Embedding, TokenTable

        core: Any = openvino.Core()
        options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
        tower = core.compile_model(str(vision), "CPU", options).create_infer_request()
        image = pixels()
        self.vision: Callable[[], object] = lambda: tower.infer({"pixel_values": image})
        self._request = core.compile_model(str(decoder), "CPU", options).create_infer_request()
        stored = open_checkpoint(checkpoint).read("language_model.model.embed_tokens.weight")
        rows = TokenTable(stored.view(np.uint16))  # bfloat16
        self._embed = Embedding(rows, np.zeros((0, rows.shape[1]), np.float32))
        self._vocabulary = rows.shape[0]
        self.prompt, self.token = self._prompt, self._token

    def _prompt(self, count: int) -> None:
        self._request.reset_state()
        self._used = 0
        self._read(ids_of(count, self._vocabulary))

    def _token(self) -> None:
        self._read([self._next])

    def _read(self, ids: list[int]) -> None:
        first, self._used = self._used, self._used + len(ids)
        feeds = {
            "inputs_embeds": self._embed(np.array([ids])),
            "attention_mask": np.ones((1, self._used), np.int64),
            "position_ids": np.arange(first, self._used)[None],
        }
        logits = self._request.infer(feeds, share_inputs=True, share_outputs=True)["logits"]
        self._next = int(logits[0, -1].argmax())


def serve(contender: Any) -> None:
    """Do what each line says, and print the seconds it took."""
    sys.stdout.write("{}\n")
    sys.stdout.flush()
    for line in sys.stdin:
        what, _, count = line.strip().partition(" ")
        if what == "memory":
            answer: Any = peak_rss_nbytes()
        elif getattr(contender, {"tokens": "token"}.get(what, what)) is None:
            answer = None
        elif what == "vision":
            answer = seconds_of(contender.vision)
        elif what == "prompt":
            answer = seconds_of(partial(contender.prompt, int(count)))
        else:
            answer = [seconds_of(contender.token) for _ in range(int(count))]
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def seconds_of(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun
