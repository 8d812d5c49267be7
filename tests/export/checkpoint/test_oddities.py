"""What checkpoints are other than plain weights: each row of the tables is read, or named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from support.checkpoints import (
    CHAT,
    TINY,
    Written,
    write_chat,
    write_internvl,
    write_raw,
    write_vit,
)
from support.paths import ROOT

from internvl_edge.artifact.components import COMPONENTS
from internvl_edge.errors import CheckpointError
from internvl_edge.export.checkpoint.checkpoint import open_checkpoint
from internvl_edge.export.checkpoint.load import build_model, load_model
from internvl_edge.export.checkpoint.oddities.table import (
    CONTAINERS,
    ELSEWHERE,
    LEFT_OUT,
    QUANTIZATIONS,
    UNUSABLE,
    WRAPPERS,
    Oddity,
    Quantization,
)
from internvl_edge.export.components import build_component
from internvl_edge.export.config.checkpoint import CheckpointConfig
from internvl_edge.files.content import CONTENTS, TEXTS, Content
from internvl_edge.quantize.calibration.captions import CAPTION_KEYS, FILES, IMAGE_KEYS

LAYER = "language_model.model.layers.0.mlp.up_proj"
INT32 = np.zeros((8, 4), np.int32)


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return write_chat(tmp_path_factory.mktemp("chat") / "checkpoint")


@pytest.fixture
def copy(chat: Written, tmp_path: Path) -> Path:
    shutil.copytree(chat.path, tmp_path / "copy")
    return tmp_path / "copy"


def spoil(path: Path, *removed: str, **added: Any) -> None:
    """Take tensors out of a checkpoint and put others in; dots in names stand as ``__``."""
    file = path / "model.safetensors"
    tensors = {name: t for name, t in load_file(file).items() if name not in removed}
    save_file(tensors | {k.replace("__", "."): v for k, v in added.items()}, file)


def set_config(path: Path, **changes: Any) -> None:
    raw = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(raw | changes))


def refusal(path: Path, *arguments: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path, *arguments)
    return str(caught.value)


# --- quantized by others -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "marker"),
    [
        pytest.param(row, marker, id=f"{row.name}{marker}")
        for row in QUANTIZATIONS
        for marker in row.markers
    ],
)
def test_a_tensor_of_another_tool_names_it(copy: Path, row: Quantization, marker: str) -> None:
    tensor = f"{LAYER}{marker}" if marker.startswith(".") else f"{LAYER}.experts{marker}"
    file = copy / "model.safetensors"
    tensors = load_file(file)
    del tensors[f"{LAYER}.weight"]
    save_file(tensors | {tensor.strip("."): INT32}, file)
    said = refusal(copy)
    assert f"language_model is quantized by {row.name}" in said
    assert "--components chat_vision reads none of them" in said
    assert open_checkpoint(copy, ["chat_vision"]).is_partial


@pytest.mark.parametrize(
    ("method", "name"), [(method, row.name) for row in QUANTIZATIONS for method in row.methods]
)
@pytest.mark.parametrize("section", ["", "llm_config"])
def test_a_configuration_names_the_tool(copy: Path, method: str, name: str, section: str) -> None:
    method, _, bits = method.partition("_")[0], *method.rpartition("_")[1:]
    given = {"quant_method": "bitsandbytes", f"load_in_{bits}": True}
    if method != "bitsandbytes":
        given = {
            "quant_method": next(
                m
                for row in QUANTIZATIONS
                for m in row.methods
                if row.name == name and m.partition("_")[0] == method
            )
        }
    raw = json.loads((copy / "config.json").read_text())
    if section:
        set_config(copy, llm_config=raw["llm_config"] | {"quantization_config": given})
    else:
        set_config(copy, quantization_config=given)
    spoil(copy, f"{LAYER}.weight", language_model__model__layers__0__packed=INT32)
    assert f"is quantized by {name}" in refusal(copy)


def test_a_method_that_is_new_is_named_as_it_is(copy: Path) -> None:
    set_config(copy, quantization_config={"quant_method": "tomorrows"})
    spoil(copy, f"{LAYER}.weight", language_model__model__layers__0__packed=INT32)
    assert "is quantized by tomorrows" in refusal(copy)


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (np.uint32, "MLX"),
        (ml_dtypes.float8_e4m3fn, "FP8"),
        (ml_dtypes.float8_e5m2, "FP8"),
        (np.int8, "a tool that is not named"),
    ],
)
def test_a_type_names_the_tool(copy: Path, dtype: Any, name: str) -> None:
    weight = load_file(copy / "model.safetensors")[f"{LAYER}.weight"]
    state = {n: torch.from_numpy(t) for n, t in load_file(copy / "model.safetensors").items()}
    del state[f"{LAYER}.weight"]
    header, data = {}, b""
    for n, tensor in state.items():
        raw = tensor.numpy().tobytes()
        header[n] = {
            "dtype": "F32",
            "shape": list(tensor.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    code = {
        np.uint32: "U32",
        np.int8: "I8",
        ml_dtypes.float8_e4m3fn: "F8_E4M3",
        ml_dtypes.float8_e5m2: "F8_E5M2",
    }[dtype]
    raw = np.zeros(weight.shape, dtype).tobytes()
    header[f"{LAYER}.weight"] = {
        "dtype": code,
        "shape": list(weight.shape),
        "data_offsets": [len(data), len(data) + len(raw)],
    }
    text = json.dumps(header).encode()
    (copy / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data + raw)
    assert f"language_model is quantized by {name}" in refusal(copy)


def test_a_float_model_whose_configuration_speaks_of_quantization_is_read(copy: Path) -> None:
    set_config(copy, quantization_config={"quant_method": "awq"})
    assert not open_checkpoint(copy).is_partial


# --- no weights yet ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "marker"),
    [pytest.param(r, m, id=m) for r in UNUSABLE for m in r.markers],
)
def test_tensors_that_are_no_weights_are_named(copy: Path, row: Oddity, marker: str) -> None:
    file = copy / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {f"{LAYER}{marker}x": np.zeros(4, np.float32)}, file)
    said = refusal(copy)
    assert f"expected the weights of language_model, found {row.what}" in said
    assert row.remedy in said


# --- names ---------------------------------------------------------------------------------------


def wrapped(written: Written, path: Path, rename: Any) -> Path:
    state = {rename(name): tensor for name, tensor in written.state.items()}
    raw = json.loads((written.path / "config.json").read_text())
    return write_raw(path, raw, state).path


@pytest.mark.parametrize("part", WRAPPERS)
@pytest.mark.parametrize("place", ["front", "inside", "twice"])
def test_wrappers_are_left_out_and_said(
    chat: Written, tmp_path: Path, part: str, place: str, caplog: pytest.LogCaptureFixture
) -> None:
    def rename(name: str) -> str:
        if place == "front":
            return f"{part}.{name}"
        first, _, rest = name.partition(".")
        return f"{first}.{part}.{rest}" if place == "inside" else f"{part}.{part}.{name}"

    checkpoint = open_checkpoint(wrapped(chat, tmp_path / "wrapped", rename))
    assert set(checkpoint.tensors) == set(chat.state)
    for name, tensor in chat.state.items():
        np.testing.assert_array_equal(checkpoint.read(name), tensor.numpy())
    assert WRAPPERS[part] in caplog.text


@pytest.mark.parametrize("front", ["model.", "net.", "module.model.", "my.own.wrapper."])
@pytest.mark.parametrize("kind", ["vit", "chat", "internvl"])
def test_a_beginning_is_left_out(tmp_path: Path, front: str, kind: str) -> None:
    write = {"vit": write_vit, "chat": write_chat, "internvl": write_internvl}[kind]
    written = write(tmp_path / "plain")
    plain = open_checkpoint(written.path)
    other = open_checkpoint(wrapped(written, tmp_path / "wrapped", lambda name: front + name))
    assert list(other.tensors) == list(plain.tensors)
    name = list(plain.tensors)[-1]
    np.testing.assert_array_equal(other.read(name), plain.read(name))


def test_two_names_of_one_parameter_are_refused(tmp_path: Path) -> None:
    written = write_vit(tmp_path / "vit")
    file = written.path / "model.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))
    save_file(tensors | {f"module.{name}": tensors[name]}, file)
    assert "are the same parameter" in refusal(written.path)


def test_names_that_are_none_of_the_models_are_shown(tmp_path: Path) -> None:
    written = write_vit(tmp_path / "vit")
    said = refusal(wrapped(written, tmp_path / "other", lambda name: f"x.{hash(name)}"))
    assert "no tensor has a name that was expected" in said
    assert ": missing" in said
    assert "x." in said


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", LEFT_OUT, ids=lambda row: row.markers[0])
def test_files_next_to_the_weights_are_left_out_and_said(
    tmp_path: Path, row: Oddity, caplog: pytest.LogCaptureFixture
) -> None:
    written = write_vit(tmp_path / "vit")
    name = row.markers[0].replace("*", "") + ".safetensors"
    save_file({"x": np.zeros(2, np.float32)}, written.path / name)
    assert len(open_checkpoint(written.path).shards) == 1
    assert f"{name} is left out: {row.what}" in caplog.text
    (written.path / "model.safetensors").unlink()
    assert row.what in refusal(written.path)


@pytest.mark.parametrize("row", ELSEWHERE, ids=lambda row: row.markers[0])
def test_other_formats_are_named(tmp_path: Path, row: Oddity) -> None:
    written = write_vit(tmp_path / "vit")
    (written.path / "model.safetensors").unlink()
    for marker in row.markers:
        other = written.path / marker.replace("*", "1")
        other.mkdir()
        assert row.what in refusal(written.path), marker
        other.rmdir()


def beginnings() -> list[Any]:
    texts = [(text.encode(), content) for text, content in TEXTS.items()]
    magics = [(bytes(offset) + magic, content) for offset, magic, content in CONTENTS if offset]
    magics += [(magic, content) for offset, magic, content in CONTENTS if not offset]
    return [pytest.param(head, content, id=f"{head[-12:]!r}") for head, content in texts + magics]


@pytest.mark.parametrize(("head", "content"), beginnings())
@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_files_that_are_something_else_are_named(
    tmp_path: Path, head: bytes, content: Content, file: str
) -> None:
    if content.what == "a video":
        head += b"isom"
    written = write_vit(tmp_path / "vit")
    (written.path / file).write_bytes(head + bytes(300))
    said = refusal(written.path)
    assert content.what in said
    assert content.remedy in said


def test_a_pointer_says_how_large_the_file_is(tmp_path: Path) -> None:
    written = write_vit(tmp_path / "vit")
    pointer = (
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 9927986042\n"
    )
    (written.path / "model.safetensors").write_text(pointer)
    assert "a Git LFS pointer to a file of 9,927,986,042 bytes" in refusal(written.path)


def test_a_whole_file_is_taken_whatever_an_index_says(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole, other = write_vit(tmp_path / "a"), write_internvl(tmp_path / "b", shards=2)
    for file in other.path.glob("model*"):
        shutil.copy(file, whole.path)
    checkpoint = open_checkpoint(whole.path)
    assert [shard.name for shard in checkpoint.shards] == ["model.safetensors"]
    assert "model.safetensors is taken, as transformers does" in caplog.text
    for shard in whole.path.glob("model-*"):
        shard.unlink()
    assert open_checkpoint(whole.path).tensors.keys() == checkpoint.tensors.keys()


def test_an_index_of_the_whole_file_says_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    written = write_vit(tmp_path / "vit")
    names = dict.fromkeys(written.state, "model.safetensors")
    (written.path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    open_checkpoint(written.path)
    assert not caplog.text


def test_numbered_shards_without_an_index_have_to_be_complete(tmp_path: Path) -> None:
    written = write_internvl(tmp_path / "many", shards=3)
    (written.path / "model.safetensors.index.json").unlink()
    assert len(open_checkpoint(written.path).shards) == 3
    (written.path / "model-00002-of-00003.safetensors").unlink()
    assert "expected 3 shards, found 2; missing: 2" in refusal(written.path)


@pytest.mark.parametrize(
    "name", ["x" * 300 + ".safetensors", "\ud800.safetensors", "a\0.safetensors"]
)
def test_an_index_with_a_name_that_no_file_can_have(tmp_path: Path, name: str) -> None:
    written = write_internvl(tmp_path / "many", shards=2)
    file = written.path / "model.safetensors.index.json"
    file.write_text(json.dumps({"weight_map": {"a": name}}))
    assert len(refusal(written.path)) < 1000


def test_a_tensor_name_with_half_a_character(tmp_path: Path) -> None:
    written = write_vit(tmp_path / "vit")
    header = {"\ud800": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    raw = json.dumps(header).encode()
    file = written.path / "model.safetensors"
    file.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(4))
    refusal(written.path).encode()


@pytest.mark.parametrize("value", [5, "LlavaLlamaForCausalLM", {"a": 1}, [5], [None], True])
def test_architectures_of_any_type(tmp_path: Path, value: Any) -> None:
    written = write_vit(tmp_path / "vit")
    set_config(written.path, architectures=value)
    assert open_checkpoint(written.path).config.kind == "vit"


def test_a_shard_whose_name_is_no_text_is_refused(tmp_path: Path) -> None:
    written = write_vit(tmp_path / "vit")
    (written.path / "model.safetensors").unlink()
    (written.path / "w\udcff.safetensors").write_bytes(b"")
    assert "UTF-8" in refusal(written.path)


# --- what components read ------------------------------------------------------------------------


def test_the_parts_of_components_are_those_of_their_modules() -> None:
    chat = write_chat_config()
    configs = {"internvl": CheckpointConfig(kind="internvl", vision=TINY.vision, internvl=TINY)}
    configs["chat"] = chat
    for name, component in COMPONENTS.items():
        parts, kind = component.parts, component.kinds[0]
        if name == "chat_queries":
            continue
        with torch.device("meta"):
            module = build_component(component, build_model(configs[kind]))
        found = {key.partition(".")[0] for key in module.state_dict()}
        assert found <= set(parts), name
        assert {part for part in parts if part != "mm_projector"} <= found, name


def write_chat_config() -> CheckpointConfig:
    from internvl_edge.export.config.chat import ChatConfig

    config = ChatConfig(llama=CHAT.llama, language_width=CHAT.llama.hidden_size)
    return CheckpointConfig(kind="chat", vision=CHAT.vision, chat=config)


@pytest.mark.parametrize(
    ("components", "spoiled", "is_read"),
    [
        (["vision"], "qllama.model.norm.weight", False),
        (["vision", "image_embed"], "itm_head.weight", False),
        (["image_embed"], "clip_projector.norm1_q.weight", True),
        (["text_embed"], "vision_model.embeddings.class_embedding", False),
        (["text_embed"], "qllama.model.norm.weight", True),
        (["matcher"], "itm_head.weight", True),
        (["decoder"], "text_projection", False),
    ],
)
def test_only_what_components_read_is_checked(
    tmp_path: Path, components: list[str], spoiled: str, is_read: bool
) -> None:
    written = write_internvl(tmp_path / "checkpoint")
    file = written.path / "model.safetensors"
    tensors = load_file(file)
    tensors[spoiled] = tensors[spoiled].astype(np.int8)
    save_file(tensors | {f"{spoiled}.stranger": np.zeros(1, np.float32)}, file)
    if is_read:
        assert spoiled in refusal(written.path, components)
        return
    checkpoint = open_checkpoint(written.path, components)
    assert checkpoint.is_partial
    assert spoiled not in checkpoint.tensors
    load_model(checkpoint)
    assert spoiled in refusal(written.path)


# --- documents -----------------------------------------------------------------------------------


def test_the_tables_stand_in_the_documents() -> None:
    page = (ROOT / "docs/reference/checkpoints.md").read_text(encoding="utf-8")
    for row in (*QUANTIZATIONS, *UNUSABLE, *LEFT_OUT, *ELSEWHERE):
        name = row.name if isinstance(row, Quantization) else row.what
        assert f"{name} |" in page
        methods = row.methods if isinstance(row, Quantization) else ()
        for text in (*row.markers, *methods):
            assert f"`{text.strip('.')}`" in page or f"`{text}`" in page, text
    for text in (*WRAPPERS, *CONTAINERS, *FILES, *IMAGE_KEYS, *CAPTION_KEYS):
        assert f"`{text}`" in page or f"`{text}.`" in page, text
    for content in (*TEXTS.values(), *(row[2] for row in CONTENTS)):
        assert f"| {content.what} | {content.remedy} |" in page
