"""Comparison of a compiled component with the checkpoint's PyTorch model.

Every component and the float32 reference run on the same inputs, and each output is compared by
three figures over all its rows (the last axis is a row; an output of a few logits counts as a
single row, since the direction of two numbers says nothing):

    cosine    the worst row's cosine similarity
    sqnr_db   10 log₁₀ (Σ reference² / Σ (reference − actual)²)
    max_abs   the largest difference

Two questions are kept apart. Whether a graph is the model: it is compared with something that
should be equal but for float arithmetic, within ``BOUNDS`` (``compiler.oracle.checker``). What its
precision costs: that depends on the checkpoint, is measured and said, and refuses a component only
where the user set a bound, or where nothing is left of the signal (``FLOOR_DB``).

bfloat16 graphs, for which ONNX Runtime has no CPU kernels, run as their float32 twins
(``graph.bf16_twin``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from internvl_edge.artifact.components import COMPONENTS, IMAGE_QUERIES, VISION
from internvl_edge.errors import VerificationError
from internvl_edge.export.components import (
    build_component,
    cache_names,
    input_names,
    language_config,
    output_names,
)
from internvl_edge.export.config.checkpoint import CheckpointConfig, QLlamaConfig
from internvl_edge.export.config.language import LanguageConfig
from internvl_edge.export.models import Chat, InternViT, InternVL
from internvl_edge.export.models.chat import require_llama
from internvl_edge.export.towers.streams import embed_chats
from internvl_edge.runtime.feeds import MASK, POSITIONS
from internvl_edge.runtime.text.chat_tokenizer import PLACE
from internvl_edge.types import Array

Arrays = Mapping[str, Array]
PAST = "past_key_values"

NOISE_PAST = 12  # positions in a chat model's cache, and also the number of new ones
COMPARED_TOKENS = 12  # the last of a conversation
NARROW = 4  # outputs with fewer columns than this are one row as a whole
# What computes the same in other arithmetic: its type → smallest cosine of any row, SQNR in dB
BOUNDS: dict[str, tuple[float, float]] = {
    "fp32": (0.99999, 70.0),
    "fp16": (0.999, 40.0),
    "bf16": (0.99, 20.0),
}
FLOOR_DB = 10.0  # an error of a third of the signal: little is left that is of use
# Fewer digits cost that much on sound graphs too, of deep models whose weights follow no pattern:
# FP8 has three bits of mantissa, and with four bits only an error larger than the signal is refused
FLOORS_DB = {"fp8": 3.0, "int4-wo": 0.0}


def floor_db(precision: str) -> float:
    """Return the SQNR below which a component of a precision is refused."""
    return FLOORS_DB.get(precision, FLOOR_DB)


@dataclass(frozen=True, slots=True, kw_only=True)
class CostBounds:
    """What a component's precision may cost, as the user asked."""

    min_sqnr_db: float | None = None  # None: any
    max_drop: float | None = None  # 1 − the worst row's cosine; None: any

    def __bool__(self) -> bool:
        return self.min_sqnr_db is not None or self.max_drop is not None

    def to_json(self) -> dict[str, float]:
        values = {"min_sqnr_db": self.min_sqnr_db, "max_drop": self.max_drop}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """The agreement of one output with its reference."""

    cosine: float
    sqnr_db: float
    max_abs: float
    is_narrow: bool = False  # a few logits, of which figures are no statistics

    def to_json(self) -> dict[str, float]:
        return {"cosine": self.cosine, "sqnr_db": self.sqnr_db, "max_abs": self.max_abs}


def agreement(reference: Array, actual: Array) -> Agreement:
    """Compare two arrays of one shape in float64; a non-finite value is total disagreement."""
    if reference.shape != actual.shape:
        raise VerificationError(f"expected shape {reference.shape}, found {actual.shape}")
    is_narrow = reference.shape[-1] < NARROW
    width = reference.size if is_narrow else reference.shape[-1]
    r = reference.astype(np.float64).reshape(-1, width)
    a = actual.astype(np.float64).reshape(r.shape)
    if not (np.isfinite(a).all() and np.isfinite(r).all()):
        return Agreement(cosine=-1.0, sqnr_db=-np.inf, max_abs=np.inf, is_narrow=is_narrow)
    error = r - a
    norms = np.linalg.norm(r, axis=1) * np.linalg.norm(a, axis=1)
    cosines = np.where(norms > 0, (r * a).sum(axis=1) / np.where(norms > 0, norms, 1), 0.0)
    cosines = np.where((r == a).all(axis=1), 1.0, cosines)  # rows of zeros agree with themselves
    signal, noise = float((r**2).sum()), float((error**2).sum())
    return Agreement(
        cosine=float(cosines.min()),
        sqnr_db=float(10 * np.log10(signal / noise)) if noise > 0 and signal > 0 else 200.0,
        max_abs=float(np.abs(error).max()),
        is_narrow=is_narrow,
    )


def sample_feeds(
    config: CheckpointConfig,
    image_size: int,
    seed: int = 0,
    batch: int = 2,
    length: int = 12,
    pixel_values: Array | None = None,
    input_ids: Array | None = None,
) -> dict[str, Array]:
    """Make inputs to compare on: the given samples, or noise and random right-padded ids."""
    rng = np.random.default_rng(seed)
    shape = (batch, config.vision.num_channels, image_size, image_size)
    feeds: dict[str, Array] = {
        "pixel_values": rng.standard_normal(shape).astype(np.float32)
        if pixel_values is None
        else pixel_values
    }
    if config.internvl is not None:
        if input_ids is None:
            llama = config.internvl.qllama
            input_ids = rng.integers(3, llama.vocab_size, (len(feeds["pixel_values"]), length))
            input_ids[:, 0], input_ids[0, -1] = llama.bos_token_id, llama.eos_token_id
            input_ids[1:, length // 2 :] = 0  # shorter texts together with a full one
        feeds["input_ids"] = input_ids.astype(np.int64)
        feeds["attention_mask"] = (feeds["input_ids"] > 0).astype(np.int64)
    return feeds


def component_feeds(
    component: str, feeds: Arrays, config: CheckpointConfig, capacity: int | None = None
) -> dict[str, Array]:
    """Select the feeds that a component takes.

    A decoder continues the cache among them with captions, if there are any, or else with the same
    texts, cut to one length: calibration has not seen a decoder's results on padding. ``capacity``
    is the maximum number of positions in all.
    """
    chosen = COMPONENTS[component]
    if chosen.takes_cache and chosen.takes_ids:
        first = feeds[f"{PAST}.0.key"]  # (B, heads, P, d)
        ids = feeds.get("caption_ids", feeds["input_ids"])
        feeds = {**feeds, **_decoding(ids, first.shape[2])}
    taken = {name: feeds[name] for name in input_names(chosen, config)}
    return taken if capacity is None or not chosen.takes_cache else _within(taken, capacity)


def _within(feeds: Arrays, capacity: int) -> dict[str, Array]:
    """Shorten the tokens and the cache before them to fit into ``capacity`` positions."""
    kept = dict(feeds)
    batch, length = feeds["position_ids"].shape
    past = feeds["attention_mask"].shape[1] - length
    length = min(length, max(capacity - past, 1))
    past = min(past, capacity - length)
    for name in ("input_ids", "inputs_embeds"):
        if name in kept:
            kept[name] = kept[name][:, :length]
    caches = {n: values[:, :, :past] for n, values in kept.items() if n.startswith(f"{PAST}.")}
    return kept | caches | _mask_and_positions(batch, past, length)


def _decoding(ids: Array, past: int) -> dict[str, Array]:
    """Make feeds of right-padded ids (B, T) as a prompt after ``past`` positions."""
    length = int(np.count_nonzero(ids, axis=1).min())
    return {"input_ids": ids[:, :length], **_mask_and_positions(len(ids), past, length)}


def _mask_and_positions(batch: int, past: int, length: int) -> dict[str, Array]:
    """Make mask and positions of tokens after ``past`` others, without padding."""
    mask = np.ones((batch, past + length), np.int64)
    return {"attention_mask": mask, "position_ids": mask.cumsum(axis=1)[:, past:] - 1}


def reference_outputs(
    module: nn.Module, component: str, feeds: Arrays, config: CheckpointConfig
) -> dict[str, Array]:
    """Run a component's PyTorch module; its outputs are named as for ``config``."""
    with torch.inference_mode():
        names = input_names(COMPONENTS[component], config)
        tensors = [torch.from_numpy(feeds[name]) for name in names]
        outputs = module(*tensors)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    names = output_names(COMPONENTS[component], config)
    return {n: t.float().numpy() for n, t in zip(names, outputs, strict=True)}


def agreements(expected: Arrays, actual: Arrays) -> dict[str, Agreement]:
    """Compare each output with the expected one."""
    return {name: agreement(expected[name], np.asarray(actual[name])) for name in expected}


def agrees(figures: Mapping[str, Agreement], bound: str) -> bool:
    """Tell whether every output is within one of ``BOUNDS``."""
    cosine, sqnr = BOUNDS[bound]
    return all(f.cosine >= cosine and f.sqnr_db >= sqnr for f in figures.values())


def require_agreement(
    figures: Mapping[str, Agreement], component: str, bound: str, reference: str = "PyTorch"
) -> None:
    """Check every output against one of ``BOUNDS``.

    Raises:
        VerificationError: an output is outside the bound.
    """
    cosine, sqnr = BOUNDS[bound]
    for name, figure in figures.items():
        if not agrees({name: figure}, bound):
            raise VerificationError(
                f"{component}, output {name!r}: expected cosine ≥ {cosine} and SQNR ≥ {sqnr} dB "
                f"compared with {reference} ({bound}), found {figure.cosine:.5f} and "
                f"{figure.sqnr_db:.1f} dB: the graph is not the model"
            )


def require_cost(
    figures: Mapping[str, Agreement],
    component: str,
    bounds: CostBounds,
    least_db: float,
    advice: str,
) -> None:
    """Check what a precision costs against the user's bounds, and that a signal is left.

    Raises:
        VerificationError: an output costs more; says how much, and what would help.
    """
    for name, figure in figures.items():
        where = f"{component}, output {name!r}"
        found = f"found {figure.sqnr_db:.1f} dB compared with PyTorch; {advice}"
        if not np.isfinite(figure.sqnr_db):
            raise VerificationError(f"{where}: expected numbers, found NaN or infinity; {advice}")
        if bounds.min_sqnr_db is not None and figure.sqnr_db < bounds.min_sqnr_db:
            wanted = f"{bounds.min_sqnr_db:g} dB (--min-sqnr)"
            raise VerificationError(f"{where}: expected at least {wanted}, {found}")
        drop = 1.0 - figure.cosine
        if bounds.max_drop is not None and drop > bounds.max_drop:
            raise VerificationError(
                f"{where}: expected the worst cosine to drop by at most {bounds.max_drop:g} "
                f"(--max-drop), found {drop:.2g}; {advice}"
            )
        if figure.sqnr_db < least_db and not figure.is_narrow:
            raise VerificationError(
                f"{where}: expected at least {least_db:g} dB, below which the output is of no "
                f"use, {found}"
            )


def summary(figures: Mapping[str, Agreement], samples: int) -> dict[str, Any]:
    """Return the figures for a manifest: the worst over the outputs."""
    return {
        "against": "PyTorch float32",
        "samples": samples,
        "cosine": min(f.cosine for f in figures.values()),
        "sqnr_db": min(f.sqnr_db for f in figures.values()),
        "max_abs": max(f.max_abs for f in figures.values()),
    }


def with_hidden_state(
    model: InternVL | Chat | InternViT,
    feeds: dict[str, Array],
    config: CheckpointConfig,
) -> dict[str, Array]:
    """Add the reference's vision tokens to the feeds, and its queries' key/value cache."""
    if isinstance(model, Chat):
        if model.config.num_queries:
            with torch.inference_mode():
                hidden = model.vision_model(torch.from_numpy(feeds["pixel_values"]))
            feeds = {**feeds, "hidden_state": hidden.numpy()}
        return feeds if model.language_model is None else feeds | _chat_feeds(model, feeds)
    vision = build_component(COMPONENTS[VISION], model)
    feeds = {**feeds, **reference_outputs(vision, VISION, feeds, config)}
    if isinstance(model, InternViT):
        return feeds
    queries = build_component(COMPONENTS[IMAGE_QUERIES], model)
    outputs = reference_outputs(queries, IMAGE_QUERIES, feeds, config)
    return feeds | {
        name.replace("present", PAST, 1): values
        for name, values in outputs.items()
        if name.startswith("present.")
    }


@torch.inference_mode()
def _chat_feeds(model: Chat, feeds: Arrays) -> dict[str, Array]:
    """Make the feeds of a conversation's last tokens, with the cache of all before them.

    Conversations are those that calibration saw, cut to one length, or random ids after an image.
    """
    llama = require_llama(model)
    images = model.encode_image(torch.from_numpy(feeds["pixel_values"]))
    if "chat_ids" in feeds:
        ids = torch.from_numpy(feeds["chat_ids"])
        ids = ids[_until(ids == PLACE, len(images))]
        images = images[-int((ids == PLACE).sum()) :]
    else:
        ids = torch.from_numpy(np.insert(_random_ids(llama.config, len(images)), 0, PLACE, axis=1))
    embeds, is_known = embed_chats(llama.model.embed_tokens, ids, iter(images))
    batch, length = len(ids), int(is_known.sum(dim=1).min())
    count = max(length - COMPARED_TOKENS, 0)
    prompt = {n: torch.from_numpy(v) for n, v in _mask_and_positions(batch, 0, count).items()}
    _, cache = llama(embeds[:, :count], *prompt.values(), llama.empty_cache(batch))
    flat = [tensor.numpy() for pair in cache for tensor in pair]
    past = dict(zip(cache_names(model.checkpoint_config, PAST), flat, strict=True))
    last = embeds[:, count:length].numpy()
    return {"inputs_embeds": last, **_mask_and_positions(batch, count, length - count), **past}


def _until(is_image: Tensor, images: int) -> slice:
    """Select the last rows (B, T) that are about so many images at most."""
    counts = is_image.sum(dim=1).flip(0).cumsum(0)
    return slice(len(counts) - int((counts <= images).sum()), None)


def _random_ids(
    llama: QLlamaConfig | LanguageConfig, batch: int, length: int = 12, seed: int = 2
) -> Array:
    rng = np.random.default_rng(seed)
    return rng.integers(min(3, llama.vocab_size - 1), llama.vocab_size, (batch, length))


def one_row(feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Take the first row of a decoder's feeds, as if nothing in it were padding."""
    row = {name: values[:1] for name, values in feeds.items()}
    total, length = row[MASK].shape[1], row[POSITIONS].shape[1]
    places = np.arange(total - length, total)[None]
    return {**row, MASK: np.ones((1, total), np.int64), POSITIONS: places}


def with_noise(
    feeds: dict[str, Array], config: CheckpointConfig, image_size: int
) -> dict[str, Array]:
    """Add noise where :func:`with_hidden_state` runs a model; all layers share one array."""
    rng, vision, batch = np.random.default_rng(1), config.vision, len(feeds["pixel_values"])
    shape = batch, vision.num_tokens(image_size), vision.hidden_size
    states = rng.standard_normal(shape, np.float32)
    feeds = {**feeds, "last_hidden_state": states, "hidden_state": states}
    llama = language_config(config)
    if llama is None:
        return feeds
    past = NOISE_PAST if config.internvl is None else config.internvl.num_query_token
    cached = batch, llama.num_key_value_heads, past, llama.head_dim
    noise = rng.standard_normal(cached, np.float32)
    if config.chat is not None:
        embeds = rng.standard_normal((batch, NOISE_PAST, llama.hidden_size), np.float32)
        feeds |= {"inputs_embeds": embeds, **_mask_and_positions(batch, past, NOISE_PAST)}
    return feeds | dict.fromkeys(cache_names(config, PAST), noise)
