"""The parts of a manifest that others than its own classes define: what is read of them.

``model``, ``source``, ``verification`` and ``recipe`` are objects of the compiler's, which writes
more than a runtime reads. Here is every key that is read, with its kind; a directory whose keys
are missing or of another kind is refused when it is opened, and not in the middle of a caption.
A text that is one of a few, such as the name of a transform, is compared with those.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from internvl_edge.artifact.components import COMPONENTS
from internvl_edge.artifact.manifest import Manifest
from internvl_edge.errors import ArtifactError

__all__ = ["check_schema"]

Kind = Callable[[Any], bool]
MOST = 2**31  # of anything that is counted
MOST_TILES = 1024
# Texts that others define, each a closed set; "" is a chat template that nobody knows.
MODELS = tuple(dict.fromkeys(kind for known in COMPONENTS.values() for kind in known.kinds))
TEMPLATES = (
    *("Hermes-2", "internlm2-chat", "internvl2_5", "internvl-hf"),
    *("phi3-chat", "internvl_zh", "vicuna_v1", ""),
)
TRANSFORMS = ("retrieval", "classification", "clip")
TRANSFERS = ("reflink", "hard link", "copy")
TARGETS = ("tensorrt-rtx", "tensorrt")
FLOATS = ("fp32", "fp16", "bf16")
SAMPLES = ("calibration", "noise")


def _whole(value: Any) -> bool:
    return type(value) is int and -MOST < value < MOST


def _natural(value: Any) -> bool:
    return type(value) is int and 0 <= value < MOST


def _positive(value: Any) -> bool:
    return type(value) is int and 0 < value < MOST


def _tiles(value: Any) -> bool:
    return type(value) is int and 0 < value <= MOST_TILES


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _text(value: Any) -> bool:
    return type(value) is str


def _flag(value: Any) -> bool:
    return type(value) is bool


def _ids(value: Any) -> bool:
    return type(value) is list and all(map(_natural, value))


def _size(value: Any) -> bool:
    return type(value) is int and value >= 0


def _triple(value: Any) -> bool:
    return type(value) is list and len(value) == 3 and all(map(_number, value))


def _one_of(names: Sequence[str]) -> Kind:
    """Make the check of a text that is one of a few, and its words."""

    def is_one(value: Any) -> bool:
        return type(value) is str and value in names

    WORDS[is_one] = f"one of {', '.join(map(repr, names))}"
    return is_one


WORDS: dict[Kind, str] = {
    _whole: "a whole number",
    _natural: "a whole number from 0",
    _size: "a whole number from 0",
    _positive: "a whole number from 1",
    _tiles: f"a whole number from 1 to {MOST_TILES}",
    _number: "a finite number",
    _text: "a text",
    _flag: "true or false",
    _ids: "a list of token ids",
    _triple: "a list of three numbers",
}
VISION: dict[str, Kind] = {"num_hidden_layers": _positive}
LANGUAGE: dict[str, Kind] = {
    "vocab_size": _positive,
    "max_position_embeddings": _positive,
    "num_hidden_layers": _positive,
}
LANGUAGE_OPTIONAL: dict[str, Kind] = {
    "num_attention_heads": _positive,
    "eos_token_id": _whole,
    "pad_token_id": _whole,
    "more_eos_ids": _ids,
}
CHAT: dict[str, Kind] = {
    "template": _text,
    "pad2square": _flag,
    "dynamic_image_size": _flag,
    "use_thumbnail": _flag,
    "min_dynamic_patch": _tiles,
    "max_dynamic_patch": _tiles,
    "num_queries": _natural,
}
# Of a language model of no known family, the template may be one of its own.
TALKS: dict[str, Kind] = {"template": _one_of(TEMPLATES)}
CHAT_OPTIONAL: dict[str, Kind] = {
    "image_token_id": _whole,
    "padding_id": _whole,
    "system": _text,
}
FIGURES: dict[str, Kind] = {"cosine": _number, "sqnr_db": _number, "max_abs": _number}
FIGURES_OPTIONAL: dict[str, Kind] = {
    "against": _text,
    "samples": _natural,
    "inputs": _one_of(SAMPLES),
}
LAYER: dict[str, Kind] = {"layer": _text, "input_sqnr_db": _number, "weight_sqnr_db": _number}
RECIPE: dict[str, Kind] = {
    "engine_base": _one_of(FLOATS[1:]),
    "base": _one_of(FLOATS),
    "name": _text,
}
PREPROCESSING: dict[str, Kind] = {"size": _positive}
PREPROCESSING_OPTIONAL: dict[str, Kind] = {
    "mean": _triple,
    "std": _triple,
    "transform": _one_of(TRANSFORMS),
}


def check_schema(manifest: Manifest) -> None:
    """Check the objects of a manifest: every key that is read of them.

    Raises:
        ArtifactError: names the key, what was expected and what was found.
    """
    _check_model(manifest.model)
    _check_source(manifest.source)
    if manifest.recipe is not None:
        _optional(manifest.recipe, RECIPE, "recipe")
    _keys(manifest.preprocessing, PREPROCESSING, "preprocessing")
    _optional(manifest.preprocessing, PREPROCESSING_OPTIONAL, "preprocessing")
    for i, engine in enumerate(manifest.engines):
        if engine.target not in TARGETS:
            raise _wrong(f"engines[{i}].target", f"one of {', '.join(TARGETS)}", engine.target)
    for name, record in manifest.components.items():
        _check_verification(record.verification, f"components[{name!r}].verification")


def _check_model(model: Mapping[str, Any]) -> None:
    _keys(model, {"kind": _one_of(MODELS)}, "model")
    _keys(_object(model, "vision", "model"), VISION, "model.vision")
    internvl = _object(model, "internvl", "model", optional=True)
    if internvl is not None:
        _keys(internvl, {"num_query_token": _positive}, "model.internvl")
        _language(_object(internvl, "qllama", "model.internvl"), "model.internvl.qllama")
    chat = _object(model, "chat", "model", optional=True)
    if chat is not None:
        _keys(chat, CHAT, "model.chat")
        _optional(chat, CHAT_OPTIONAL, "model.chat")
        language = _object(chat, "llama", "model.chat", optional=True)
        if language is not None:
            _keys(chat, TALKS, "model.chat")
            _language(language, "model.chat.llama")


def _language(language: Mapping[str, Any], where: str) -> None:
    _keys(language, LANGUAGE, where)
    _optional(language, LANGUAGE_OPTIONAL, where)


def _check_source(source: Mapping[str, Any]) -> None:
    _keys(source, {"checkpoint": _text}, "source")
    files = _object(source, "files", "source")
    for name in files:
        where = f"source.files[{name!r}]"
        _keys(
            _object(files, name, "source.files"), {"nbytes": _size, "header_sha256": _text}, where
        )
    weights = _object(source, "weights", "source", optional=True) or {}
    _keys(weights, dict.fromkeys(weights, _one_of(TRANSFERS)), "source.weights")


def _check_verification(figures: Mapping[str, Any] | None, where: str) -> None:
    if figures is None:
        return
    _optional(figures, {"skipped": _text}, where)
    if "cosine" in figures:
        _keys(figures, FIGURES, where)
        _optional(figures, FIGURES_OPTIONAL, where)
    _optional(figures, {"simulated_sqnr_db": _number}, where)
    for key in ("blocks", "costly_layers"):
        if figures.get(key) is not None and type(figures[key]) is not list:
            raise _wrong(f"{where}.{key}", "a list", figures[key])
    for i, layer in enumerate(figures.get("costly_layers") or ()):
        place = f"{where}.costly_layers[{i}]"
        if type(layer) is not dict:
            raise _wrong(place, "an object", layer)
        _keys(layer, LAYER, place)
    bounds = _object(figures, "bounds", where, optional=True) or {}
    _keys(bounds, dict.fromkeys(bounds, _number), f"{where}.bounds")
    other = _object(figures, "engine_graph", where, optional=True)
    _check_verification(other, f"{where}.engine_graph")


def _object(parent: Mapping[str, Any], key: str, where: str, *, optional: bool = False) -> Any:
    value = parent.get(key)
    if value is None and optional:
        return None
    if type(value) is not dict:
        raise _wrong(f"{where}.{key}", "an object", value)
    return value


def _keys(given: Mapping[str, Any], kinds: Mapping[str, Kind], where: str) -> None:
    for key, is_kind in kinds.items():
        if key not in given:
            raise ArtifactError(f"{where}: has no {key}, expected {WORDS[is_kind]}; export again")
        if not is_kind(given[key]):
            raise _wrong(f"{where}.{key}", WORDS[is_kind], given[key])


def _optional(given: Mapping[str, Any], kinds: Mapping[str, Kind], where: str) -> None:
    _keys(given, {k: kind for k, kind in kinds.items() if given.get(k) is not None}, where)


def _wrong(where: str, expected: str, found: Any) -> ArtifactError:
    return ArtifactError(f"{where}: expected {expected}, found {found!r:.80}; export again")
