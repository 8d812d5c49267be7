"""What is read of a manifest's objects: missing, or of another kind, it is refused at opening."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
from support.artifacts import contents, manifest_of, write_artifact

from internvl_edge.artifact import schema
from internvl_edge.artifact.components import components_of
from internvl_edge.artifact.manifest import Manifest
from internvl_edge.artifact.open import open_artifact
from internvl_edge.artifact.schema import check_schema
from internvl_edge.compiler.plan import TARGETS
from internvl_edge.errors import ArtifactError
from internvl_edge.export.weights.link import How
from internvl_edge.quantize.recipe import Base, EngineBase
from internvl_edge.runtime.images.transform import TRANSFORMS
from internvl_edge.runtime.text.templates import TEMPLATES

LANGUAGE = {
    "vocab_size": 480,
    "max_position_embeddings": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "eos_token_id": 2,
    "pad_token_id": -1,
    "more_eos_ids": [3],
}
MODEL = {
    "kind": "internvl",
    "vision": {"num_hidden_layers": 6, "hidden_size": 128},
    "internvl": {"qllama": LANGUAGE, "num_query_token": 8},
    "chat": {
        "llama": LANGUAGE,
        "template": "Hermes-2",
        "image_token_id": -200,
        "padding_id": 0,
        "system": "You answer.",
        "pad2square": False,
        "dynamic_image_size": True,
        "use_thumbnail": True,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 12,
        "num_queries": 0,
    },
}
SOURCE = {
    "checkpoint": "tiny",
    "files": {"model.safetensors": {"nbytes": 5, "header_sha256": "a" * 64}},
    "weights": {"model.safetensors": "copy"},
}
FIGURES = {
    "cosine": 1.0,
    "sqnr_db": 90,
    "max_abs": 0.0,
    "against": "PyTorch float32",
    "samples": 4,
    "inputs": "calibration",
    "simulated_sqnr_db": 40.0,
    "costly_layers": [{"layer": "blocks.0", "input_sqnr_db": 30.0, "weight_sqnr_db": 40.0}],
    "bounds": {"min_sqnr_db": 20.0},
    "blocks": [1],
    "engine_graph": {"cosine": 1.0, "sqnr_db": 90.0, "max_abs": 0.0},
}
# Keys that may be left out.
OPTIONAL = {"eos_token_id", "pad_token_id", "more_eos_ids", "image_token_id", "hidden_size"}
OPTIONAL |= {"internvl", "chat", "weights", "against", "samples", "blocks", "engine_graph"}
OPTIONAL |= {"llama", "skipped", "cosine"}
OPTIONAL |= {"padding_id", "system", "num_attention_heads"}
UNREAD = {"hidden_size"}
TEXTS = {"system"}


def manifest(**changed: Any) -> Manifest:
    made = manifest_of(contents(), model=MODEL, source=SOURCE, recipe={"engine_base": "fp16"})
    return replace(made, **changed)


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in an object, but names of files."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield (*path, key)
            yield from paths(inner, (*path, key))


def changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    value = copy.deepcopy(value)
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    if new is ...:
        del parent[path[-1]]
    else:
        parent[path[-1]] = new
    return value


def test_a_sound_manifest_passes() -> None:
    check_schema(manifest())
    chatless = {**MODEL, "chat": None, "internvl": None}
    check_schema(manifest(model=chatless))


@pytest.mark.parametrize("path", list(paths(MODEL)), ids=lambda path: ".".join(path))
def test_a_wrong_kind_in_the_model_is_refused(path: tuple[str, ...]) -> None:
    if path[-1] in UNREAD:
        return
    for wrong in ({"a": 1}, 5.5 if path[-1] in TEXTS else "text", [None], 1.5, 10**60):
        if isinstance(wrong, dict) and path[-1] in MODEL:
            continue  # an object without its keys is refused as well, under another key
        with pytest.raises(ArtifactError, match=r"model\..*expected"):
            check_schema(manifest(model=changed(MODEL, path, wrong)))


@pytest.mark.parametrize("path", list(paths(MODEL)), ids=lambda path: ".".join(path))
def test_a_key_that_is_read_must_be_there(path: tuple[str, ...]) -> None:
    without = manifest(model=changed(MODEL, path, ...))
    if path[-1] in OPTIONAL:
        check_schema(without)
    else:
        with pytest.raises(ArtifactError, match="expected"):
            check_schema(without)


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        (("checkpoint",), 5),
        (("checkpoint",), ...),
        (("files",), []),
        (("files", "model.safetensors"), 3),
        (("files", "model.safetensors", "nbytes"), -1),
        (("files", "model.safetensors", "header_sha256"), None),
        (("weights",), "copy"),
        (("weights", "model.safetensors"), 1),
        (("weights", "model.safetensors"), "symbolic link"),
    ],
)
def test_a_wrong_source_is_refused(path: tuple[str, ...], wrong: Any) -> None:
    with pytest.raises(ArtifactError, match="source"):
        check_schema(manifest(source=changed(SOURCE, path, wrong)))


@pytest.mark.parametrize(
    ("key", "wrong"),
    [
        ("cosine", "1.0"),
        ("cosine", None),
        ("sqnr_db", ...),
        ("max_abs", float("inf")),
        ("against", 4),
        ("samples", "four"),
        ("inputs", "guesses"),
        ("blocks", 3),
        ("engine_graph", {"cosine": []}),
        ("engine_graph", True),
        ("engine_graph", [1]),
        ("simulated_sqnr_db", "high"),
        ("costly_layers", {}),
        ("costly_layers", [1]),
        ("costly_layers", [{}]),
        ("costly_layers", [{"layer": 1, "input_sqnr_db": 30.0, "weight_sqnr_db": 40.0}]),
        ("costly_layers", [{"layer": "a", "input_sqnr_db": "", "weight_sqnr_db": 40.0}]),
        ("bounds", [20.0]),
        ("bounds", {"min_sqnr_db": "20"}),
        ("skipped", []),
    ],
)
def test_wrong_figures_are_refused(key: str, wrong: Any) -> None:
    files = contents()
    record = manifest_of(files).components["vision"]
    bad = replace(record, verification=changed(FIGURES, (key,), wrong))
    good = replace(record, verification=FIGURES)
    check_schema(manifest(components={"vision": good}))
    with pytest.raises(ArtifactError, match=r"components\['vision'\]\.verification"):
        check_schema(manifest(components={"vision": bad}))


@pytest.mark.parametrize("wrong", [16, "fp32", "bfloat16", ""])
def test_a_recipe_of_another_kind_is_refused(wrong: Any) -> None:
    with pytest.raises(ArtifactError, match=r"recipe\.engine_base: expected one of 'fp16', 'bf16'"):
        check_schema(manifest(recipe={"engine_base": wrong}))


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        (("model", "kind"), "VIT"),
        (("model", "kind"), "internvl-c"),
        (("model", "chat", "template"), "internvl2-5"),
        (("preprocessing", "transform"), "Retrieval"),
        (("preprocessing", "transform"), ["retrieval"]),
        (("preprocessing", "size"), 0),
        (("preprocessing", "size"), ...),
        (("preprocessing", "mean"), [0.5, 0.5]),
        (("preprocessing", "std"), 0.5),
        (("preprocessing", "std"), [0.5, "0.5", 0.5]),
        (("engines", 0, "target"), "onnxruntime"),
        (("engines", 0, "target"), "TensorRT"),
    ],
)
def test_a_text_of_a_closed_set_is_one_of_it(path: tuple[Any, ...], wrong: Any) -> None:
    raw = manifest_of(contents(engine=b"plan"), model=MODEL, source=SOURCE).to_json()
    check_schema(Manifest.from_json(raw))
    shown = re.escape(f"{path[0]}[0].target" if path[0] == "engines" else ".".join(path[:-1]))
    with pytest.raises(ArtifactError, match=f"{shown}.*expected"):
        check_schema(Manifest.from_json(changed(raw, path, wrong)))


def test_a_language_model_of_no_known_family_has_any_template() -> None:
    model = changed(MODEL, ("chat", "template"), "internvl3_5_gpt_oss")
    with pytest.raises(ArtifactError, match=r"model\.chat\.template: expected one of"):
        check_schema(manifest(model=model))
    check_schema(manifest(model=changed(model, ("chat", "llama"), None)))


def test_the_sets_are_those_of_the_modules_that_read_them() -> None:
    assert set(schema.TEMPLATES) == {*TEMPLATES, ""}
    assert schema.TRANSFORMS == TRANSFORMS
    assert set(schema.TRANSFERS) == set(get_args(How))
    assert {"onnx", *schema.TARGETS} == set(TARGETS)
    assert get_args(Base) == schema.FLOATS and schema.FLOATS[1:] == get_args(EngineBase)
    assert all(components_of(kind) for kind in schema.MODELS if kind != "chat")


def test_opening_a_directory_checks_it(tmp_path: Path) -> None:
    out = write_artifact(tmp_path / "out", contents(), model={"kind": "vit", "vision": 5})
    with pytest.raises(ArtifactError, match=r"manifest\.json: model\.vision: expected an object"):
        open_artifact(out)


def test_names_that_stand_twice_are_found_at_once(tmp_path: Path) -> None:
    """Linear: 200,000 names took minutes when each was counted."""
    out = write_artifact(tmp_path / "out", contents())
    text = json.dumps(json.loads((out / "manifest.json").read_text()))
    many = ", ".join(f'"k{i}": 1' for i in range(200_000))
    (out / "manifest.json").write_text(text.replace('"model": {', f'"model": {{"k0": 1, {many}, '))
    with pytest.raises(ArtifactError, match=r"1 name\(s\) stand twice: 'k0'"):
        open_artifact(out)
