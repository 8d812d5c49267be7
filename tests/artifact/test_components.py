"""One table of components: adding one touches the table and its module, and no other table is."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from support.checkpoints import write_internvl
from torch import Tensor, nn

from internvl_edge import compiler, open_session
from internvl_edge.artifact import components as table
from internvl_edge.artifact.components import (
    COMPONENTS,
    VISION_PREFIX,
    Component,
    components_of,
    embedder_of,
    find_component,
    streams_of,
)
from internvl_edge.artifact.open import open_artifact
from internvl_edge.compiler import ExportOptions
from internvl_edge.export.checkpoint.load import load_reference
from internvl_edge.export.components import MODULES
from internvl_edge.export.precision import precision_of

ROOT = Path(__file__).resolve().parents[2]
MADE_UP = Component(
    name="vision_mean",
    inputs=("pixel_values",),
    outputs=("mean_state",),
    tower=VISION_PREFIX,
    stream="image",
    kinds=("internvl", "vit"),
)
TABLE, TABLE_OF_MODULES = "artifact/components.py", "export/components.py"
# The vision tower's section of a checkpoint's configuration, which is no component.
SECTIONS = {
    (place, "vision")
    for place in (
        "export/config/checkpoint.py",
        "compiler/steps/graph_files.py",
        "artifact/schema.py",
        "runtime/tasks/chat_images.py",
    )
} | {
    ("runtime/text/bpe_pieces.py", "decoder"),  # a key of tokenizer.json
    ("compiler/steps/publish/fast_tokenizer.py", "decoder"),  # the same
    ("benchmark/chat.py", "vision"),  # a stage of an answer
    ("compiler/report/report.py", "vision"),  # the same
}


class VisionMean(nn.Module):
    """The mean of the vision tower's tokens."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.vision_model = model.vision_model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.vision_model(pixel_values).mean(dim=1).float()


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16", "vision_mean=int8"])
def test_a_new_component_is_a_row_and_a_module(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """It is forecast, traced, quantized, verified, opened and run, next to another or alone."""
    monkeypatch.setitem(COMPONENTS, MADE_UP.name, MADE_UP)
    monkeypatch.setitem(MODULES, MADE_UP.name, VisionMean)
    checkpoint = write_internvl(tmp_path / "checkpoint").path
    options = ExportOptions(
        checkpoint=checkpoint,
        out=tmp_path / "out",
        precision=precision,
        components=(MADE_UP.name, "vision"),
        calibration=pictures if "int8" in precision else None,
        verify="full",
    )
    assert compiler.forecast(options).steps
    compiler.export(options)

    manifest = open_artifact(options.out).manifest
    assert [*manifest.components] == ["vision", MADE_UP.name]
    record = manifest.components[MADE_UP.name]
    assert record.verification is not None
    assert record.verification["cosine"] > 0.9
    pixels = np.random.default_rng(0).standard_normal((3, *record.inputs[0].shape[1:]), np.float32)
    with torch.inference_mode():
        expected = load_reference(checkpoint).vision_model(torch.from_numpy(pixels)).mean(dim=1)
    with open_session(options.out, MADE_UP.name) as session:
        actual = session.run({"pixel_values": pixels})["mean_state"]
    bound = 0.1 if "int8" in precision else 0.01
    assert np.linalg.norm(actual - expected.numpy()) < bound * np.linalg.norm(expected)


def test_a_name_that_the_table_does_not_have() -> None:
    """A manifest of another version may have it: nothing is known of it, nothing is refused."""
    unknown = find_component("not_yet")
    assert unknown.tower is None and unknown.stream is None
    assert not unknown.is_language and not unknown.is_vision and not unknown.takes_cache
    assert streams_of(["not_yet"]) == set()
    assert precision_of("vision=int8,decoder=fp8", "not_yet") == "fp8"
    assert embedder_of(["not_yet"]) is None


def test_every_row_has_a_module() -> None:
    assert list(MODULES) == list(COMPONENTS)
    assert {name for name, value in COMPONENTS.items() if value.name != name} == set()


def test_components_of_each_kind_of_checkpoint() -> None:
    assert components_of("vit") == ("vision",)
    assert components_of("chat") == ("chat_vision",)
    assert components_of("chat", ["llama"]) == ("chat_vision", "chat_decoder")
    of_chat = components_of("chat", ["llama", "num_queries"])
    assert {*components_of("internvl"), *of_chat} == {*COMPONENTS}
    assert not {*components_of("internvl")} & {*of_chat}


@pytest.mark.slow
def test_there_is_no_other_table() -> None:
    """No other module of the product lists two components, by their names or by constants."""
    tables = {
        place for place, tree in product() for node in ast.walk(tree) if len(listed(node)) > 1
    }
    assert tables == {TABLE, TABLE_OF_MODULES}


@pytest.mark.slow
def test_names_are_written_in_the_table_alone() -> None:
    written = {
        (place, node.value)
        for place, tree in product()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and node.value in list(COMPONENTS)
    }
    assert {place for place, _ in written - SECTIONS} == {TABLE}


def product() -> Iterator[tuple[str, ast.Module]]:
    """Every module of the product by its path in the package, parsed."""
    package = ROOT / "src" / "internvl_edge"
    for folder in (package, *(ROOT / name for name in ("export", "quantize", "runtime", "demo"))):
        for path in folder.rglob("*.py"):  # which does not follow the package's links
            if not any(parent.is_symlink() for parent in path.parents):
                place = path.relative_to(package if folder == package else ROOT).as_posix()
                yield place, ast.parse(path.read_text())


def listed(node: ast.AST) -> set[str]:
    """The components that a collection names."""
    if isinstance(node, ast.Dict):
        elements = [key for key in node.keys if key is not None]
    elif isinstance(node, ast.Tuple | ast.List | ast.Set):
        elements = node.elts
    else:
        return set()
    return {name for element in elements if (name := named(element)) in list(COMPONENTS)}


def named(node: ast.expr) -> str:
    """The text of a literal, or of one of the table's constants; else nothing."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    name = node.id if isinstance(node, ast.Name) else ""
    name = node.attr if isinstance(node, ast.Attribute) else name
    return str(vars(table).get(name, ""))
