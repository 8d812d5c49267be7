"""Opening checkpoints: what is accepted, and one test per rule that refuses."""

from __future__ import annotations

import contextlib
import json
import os
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from support.checkpoints import (
    CHAT,
    TINY,
    Written,
    write_internvl,
    write_llava_queries,
    write_vit,
)

from internvl_edge.errors import CheckpointError
from internvl_edge.export.checkpoint.checkpoint import open_checkpoint
from internvl_edge.export.checkpoint.load import build_model, load_reference
from internvl_edge.export.checkpoint.parameters import expected_shapes
from internvl_edge.export.checkpoint.shards import read_header
from internvl_edge.export.config.chat import ChatConfig
from internvl_edge.export.config.checkpoint import CheckpointConfig, VisionConfig, load_config


@pytest.fixture
def tiny(tmp_path: Path) -> Written:
    return write_internvl(tmp_path / "checkpoint")


def edit_config(path: Path, **changes: Any) -> None:
    file = path / "config.json"
    raw = json.loads(file.read_text())
    raw.update(changes)
    file.write_text(json.dumps({k: v for k, v in raw.items() if v is not ...}))


def edit_tensors(path: Path, change: Any) -> None:
    file = path / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def test_reads_what_safetensors_wrote(tiny: Written) -> None:
    checkpoint = open_checkpoint(tiny.path)
    assert checkpoint.config.internvl == TINY
    for name, tensor in tiny.state.items():
        np.testing.assert_array_equal(checkpoint.read(name), tensor.numpy())


def assert_same_parameters(config: CheckpointConfig) -> None:
    with torch.device("meta"):
        state = build_model(config).state_dict()
    prefix = "vision_model." if config.kind == "vit" else ""
    expected = [(prefix + name, tuple(values.shape)) for name, values in state.items()]
    assert list(expected_shapes(config).items()) == expected


def folded(vision: VisionConfig) -> VisionConfig:
    return replace(vision, has_layer_scale=False, is_rotated=True, has_shift=True)


@pytest.mark.parametrize(
    "vision",
    [
        TINY.vision,
        replace(TINY.vision, norm_type="layer_norm", qkv_bias=True, qk_normalization=False),
        folded(TINY.vision),
    ],
)
def test_parameters_are_those_of_the_model(vision: VisionConfig) -> None:
    """By name, shape and order: what is opened without PyTorch is what PyTorch would load."""
    assert_same_parameters(CheckpointConfig(kind="vit", vision=vision))
    llama = replace(TINY.qllama, num_hidden_layers=4, is_rotated=vision.is_rotated)
    internvl = replace(TINY, vision=vision, qllama=llama, cross_attention_frequency=3)
    assert_same_parameters(CheckpointConfig(kind="internvl", vision=vision, internvl=internvl))


@pytest.mark.parametrize("layout", ["internvl_chat", "llava"])
@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("is_rotated", [False, True])
def test_parameters_of_a_chat_model(layout: Any, is_tied: bool, is_rotated: bool) -> None:
    llama = replace(CHAT.llama, tie_word_embeddings=is_tied, is_rotated=is_rotated)
    chat = ChatConfig(llama=llama, language_width=llama.hidden_size, layout=layout)
    vision = folded(CHAT.vision) if is_rotated else CHAT.vision
    assert_same_parameters(CheckpointConfig(kind="chat", vision=vision, chat=chat))
    vision_side = replace(chat, llama=None)
    assert_same_parameters(CheckpointConfig(kind="chat", vision=vision, chat=vision_side))


def test_parameters_of_a_chat_model_with_queries(tmp_path: Path) -> None:
    config = load_config(write_llava_queries(tmp_path / "chat").path)
    assert config.queries is not None
    assert_same_parameters(config)


@pytest.mark.parametrize("shards", [2, 3])
def test_shards_equal_a_single_file(tmp_path: Path, shards: int) -> None:
    one = open_checkpoint(write_internvl(tmp_path / "one").path)
    many = open_checkpoint(write_internvl(tmp_path / "many", shards=shards).path)
    assert len(many.shards) == shards
    for name in one.tensors:
        np.testing.assert_array_equal(one.read(name), many.read(name))


def test_bfloat16_is_kept(tmp_path: Path) -> None:
    written = write_internvl(tmp_path / "half", dtype=torch.bfloat16)
    checkpoint = open_checkpoint(written.path)
    values = checkpoint.read("text_projection")
    assert values.dtype == ml_dtypes.bfloat16
    expected = written.state["text_projection"].float().numpy()
    np.testing.assert_array_equal(values.astype(np.float32), expected)


def test_a_bare_vit_gets_canonical_names(tmp_path: Path) -> None:
    written = write_vit(tmp_path / "vit")
    checkpoint = open_checkpoint(written.path)
    assert set(checkpoint.tensors) == {f"vision_model.{name}" for name in written.state}


def test_embeddings_are_never_tied(tmp_path: Path) -> None:
    written = write_internvl(tmp_path / "checkpoint")
    edit_config(written.path, tie_word_embeddings=True)  # the trap of the published configs
    model = load_reference(written.path)
    embed, head = "qllama.model.embed_tokens.weight", "qllama.lm_head.weight"
    assert torch.equal(model.state_dict()[embed], written.state[embed])
    assert torch.equal(model.state_dict()[head], written.state[head])
    assert not torch.equal(written.state[embed], written.state[head])


def test_rotary_frequencies_of_older_files_are_ignored(tiny: Written) -> None:
    name = "qllama.model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(tiny.path, lambda t: t.update({name: np.ones(8, np.float32)}))
    assert name not in open_checkpoint(tiny.path).tensors


def test_a_cache_snapshot_of_symlinks_is_read(tiny: Written, tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in tiny.path.iterdir():
        (snapshot / file.name).symlink_to(file)
    assert open_checkpoint(snapshot).tensors.keys() == tiny.state.keys()


def test_all_wrong_tensors_are_named_at_once(tiny: Written) -> None:
    def spoil(tensors: dict[str, np.ndarray]) -> None:
        del tensors["text_projection"]
        tensors["stranger"] = np.zeros(3, np.float32)
        tensors["query_tokens"] = np.zeros((1, 4, 48), np.float32)
        tensors["logit_scale"] = np.array(4, np.int64)

    edit_tensors(tiny.path, spoil)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tiny.path)
    message = str(caught.value)
    assert "4 problem(s)" in message
    for part in (
        "text_projection: missing",
        "stranger: unexpected",
        "query_tokens: expected shape (1, 5, 48), found (1, 4, 48)",
        "logit_scale: expected a float type, found int64",
    ):
        assert part in message


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_weights_are_named(tiny: Written, dtype: Any, value: float) -> None:
    def spoil(tensors: dict[str, np.ndarray]) -> None:
        for name in ("itm_head.weight", "query_tokens"):
            tensors[name] = tensors[name].astype(dtype)
            tensors[name].reshape(-1)[7] = value

    edit_tensors(tiny.path, spoil)
    checkpoint = open_checkpoint(tiny.path)
    with pytest.raises(CheckpointError, match="NaN or infinity") as caught:
        checkpoint.content_sha256()
    assert "itm_head.weight" in str(caught.value)
    assert "query_tokens" in str(caught.value)


def test_absent_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        open_checkpoint(tmp_path / "nowhere")


def test_a_file_instead_of_a_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="is a file"):
        open_checkpoint(tmp_path / "file")


def test_empty_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: not found"):
        open_checkpoint(tmp_path)


def test_config_without_weights(tiny: Written) -> None:
    (tiny.path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no \\*\\.safetensors"):
        open_checkpoint(tiny.path)


def test_pickle_is_refused_and_convert_is_named(tiny: Written) -> None:
    (tiny.path / "model.safetensors").rename(tiny.path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="internvl-edge convert"):
        open_checkpoint(tiny.path)


def test_pickle_under_a_safetensors_name(tiny: Written) -> None:
    torch.save({"a": torch.ones(2)}, tiny.path / "model.safetensors")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        open_checkpoint(tiny.path)


def test_fifo_does_not_hang(tiny: Written) -> None:
    (tiny.path / "model.safetensors").unlink()
    os.mkfifo(tiny.path / "model.safetensors")
    with pytest.raises(CheckpointError, match="expected a regular file, found a pipe; download"):
        open_checkpoint(tiny.path)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
def test_truncated_file(tiny: Written, keep: int) -> None:
    file = tiny.path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"truncated|malformed"):
        open_checkpoint(tiny.path)


def test_a_shard_that_has_gone(tiny: Written) -> None:
    checkpoint = open_checkpoint(tiny.path)
    (tiny.path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="not found; download"):
        checkpoint.read("text_projection")


def test_a_shard_that_is_a_folder(tiny: Written) -> None:
    (tiny.path / "model.safetensors").unlink()
    (tiny.path / "model.safetensors").mkdir()
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors: expected a regular file, found a folder"
    ):
        open_checkpoint(tiny.path)


def test_an_index_that_leads_nowhere(tiny: Written) -> None:
    (tiny.path / "model.safetensors").unlink()
    (tiny.path / "model.safetensors.index.json").symlink_to(tiny.path / "gone")
    with pytest.raises(CheckpointError, match=r"the link leads nowhere .*gone\); download"):
        open_checkpoint(tiny.path)


def test_file_truncated_after_opening(tiny: Written) -> None:
    checkpoint = open_checkpoint(tiny.path)
    os.truncate(tiny.path / "model.safetensors", 20_000)
    with pytest.raises(CheckpointError, match="was it changed"):
        checkpoint.content_sha256()


def header_file(path: Path, header: Any, data: bytes = b"") -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def tensor(begin: int, end: int, shape: list[Any], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "data"),
    [
        pytest.param({"a": tensor(0, 8, [1])}, bytes(8), id="more bytes than the shape"),
        pytest.param({"a": tensor(4, 8, [1])}, bytes(8), id="hole at the start"),
        pytest.param({"a": tensor(0, 8, [2]), "b": tensor(4, 12, [2])}, bytes(12), id="overlap"),
        pytest.param({"a": tensor(0, 4, [1])}, bytes(8), id="bytes after the last tensor"),
        pytest.param({"a": tensor(0, 4, [1])}, b"", id="no data"),
        pytest.param({"a": tensor(-4, 0, [1])}, bytes(4), id="negative offset"),
        pytest.param({"a": tensor(0, 4, [-1])}, bytes(4), id="negative dimension"),
        pytest.param({"a": tensor(0, 4, [True])}, bytes(4), id="boolean dimension"),
        pytest.param({"a": tensor(0, 4, [1], "F7")}, bytes(4), id="unknown dtype"),
        pytest.param({"a": {"dtype": "F32"}}, b"", id="no shape"),
        pytest.param({"a": 3}, b"", id="not an object"),
        pytest.param(b" {}", b"", id="leading space"),
        pytest.param(b"[1]", b"", id="a list"),
        pytest.param(b'{"a": 1, "a": 2}', b"", id="a name twice"),
        pytest.param(b"\xff\xfe", b"", id="not UTF-8"),
        pytest.param(b"[" * 100_000, b"", id="deep nesting"),
        pytest.param({"a": tensor(0, 2**62, [2**60])}, bytes(8), id="huge"),
    ],
)
def test_malformed_headers(tmp_path: Path, header: Any, data: bytes) -> None:
    with pytest.raises(CheckpointError):
        read_header(header_file(tmp_path / "x.safetensors", header, data))


@settings(max_examples=200, deadline=None)
@given(raw=st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(raw: bytes, tmp_path_factory: Any) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    path.write_bytes(raw)
    with contextlib.suppress(CheckpointError):
        assert isinstance(read_header(path), dict)


def test_index_names_a_missing_shard(tmp_path: Path) -> None:
    written = write_internvl(tmp_path / "many", shards=2)
    (written.path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="which is missing"):
        open_checkpoint(written.path)


def test_index_places_a_tensor_in_the_wrong_shard(tmp_path: Path) -> None:
    written = write_internvl(tmp_path / "many", shards=2)
    file = written.path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["ghost"] = "model-00001-of-00002.safetensors"
    file.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="ghost: the index places it"):
        open_checkpoint(written.path)


def test_index_leaves_out_a_tensor(tmp_path: Path) -> None:
    written = write_internvl(tmp_path / "many", shards=2)
    file = written.path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    shard = index["weight_map"].pop("text_projection")
    file.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=f"text_projection: {shard} holds it"):
        open_checkpoint(written.path)


@pytest.mark.parametrize("shard", [1, 2])
def test_index_names_a_tensor_twice(tmp_path: Path, shard: int) -> None:
    written = write_internvl(tmp_path / "many", shards=2)
    file = written.path / "model.safetensors.index.json"
    again = f'"text_projection": "model-{shard:05}-of-00002.safetensors"'
    file.write_text(file.read_text().replace('"weight_map": {', f'"weight_map": {{{again}, '))
    with pytest.raises(
        CheckpointError, match=r"JSON: 1 name\(s\) stand twice: 'text_projection'; download"
    ):
        open_checkpoint(written.path)


def test_unchanged(tmp_path: Path) -> None:
    """Reading, and links that come and go, are no change; what changes one is in test_bring."""
    written = write_internvl(tmp_path / "many", shards=2)
    checkpoint = open_checkpoint(written.path)
    os.link(checkpoint.shards[0], tmp_path / "link")
    checkpoint.read("text_projection")
    checkpoint.require_unchanged()


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "x.bin"])
def test_index_points_elsewhere(tmp_path: Path, name: str) -> None:
    written = write_internvl(tmp_path / "many", shards=2)
    file = written.path / "model.safetensors.index.json"
    file.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match="plain"):
        open_checkpoint(written.path)


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    written = write_internvl(tmp_path / "many", shards=2)
    first, second = sorted(written.path.glob("*.safetensors"))
    tensors = load_file(second)
    tensors[next(iter(load_file(first)))] = np.zeros(1, np.float32)
    save_file(tensors, second)
    with pytest.raises(CheckpointError, match="in two shards"):
        open_checkpoint(written.path)


# --- configuration -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"auto_map": {"AutoModel": "evil.Model"}}, "does not re-implement"),
        ({"auto_map": {"AutoModel": "someone/repo--backdoor.Model"}}, "does not re-implement"),
        ({"trust_remote_code": True}, "never run"),
        ({"num_query_token": "96"}, "must be int"),
        ({"num_query_token": 0}, "must be positive"),
        ({"attn_pool_num_heads": 7}, "not a multiple"),
        ({"qllama_config": 3}, "expected an InternViT"),
    ],
)
def test_configs_that_are_refused(tiny: Written, changes: dict[str, Any], message: str) -> None:
    edit_config(tiny.path, **changes)
    with pytest.raises(CheckpointError, match=message):
        load_config(tiny.path)


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("vision_config", "hidden_act", "relu", "hidden_act must be one of gelu"),
        ("vision_config", "norm_type", "batch_norm", "norm_type must be one of"),
        ("vision_config", "image_size", 30, "multiple of patch_size"),
        ("vision_config", "num_hidden_layers", 10**9, "num_hidden_layers is implausible"),
        ("vision_config", "layer_norm_eps", float("nan"), "layer_norm_eps must be finite"),
        ("qllama_config", "hidden_size", 47, "width 47 is not a multiple"),
        ("qllama_config", "num_attention_heads", 48, "even head size"),
    ],
)
def test_sections_that_are_refused(
    tiny: Written, section: str, key: str, value: Any, message: str
) -> None:
    raw = json.loads((tiny.path / "config.json").read_text())
    edit_config(tiny.path, **{section: {**raw[section], key: value}})
    with pytest.raises(CheckpointError, match=message):
        load_config(tiny.path)


def test_published_remote_code_names_are_ours(tiny: Written) -> None:
    edit_config(
        tiny.path,
        auto_map={
            "AutoConfig": "configuration_internvl.InternVLConfig",
            "AutoModel": "OpenGVLab/InternVL-14B-224px--modeling_internvl.InternVLModel",
        },
    )
    assert load_config(tiny.path).internvl == TINY


def test_unknown_architecture(tiny: Written) -> None:
    (tiny.path / "config.json").write_text('{"model_type": "resnet", "architectures": ["R"]}')
    with pytest.raises(CheckpointError, match="resnet"):
        load_config(tiny.path)


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"\xff", b"[" * 100_000])
def test_config_that_is_not_json(tiny: Written, raw: bytes) -> None:
    (tiny.path / "config.json").write_bytes(raw)
    with pytest.raises(CheckpointError):
        load_config(tiny.path)


def test_config_round_trip(tiny: Written) -> None:
    config = load_config(tiny.path)
    assert type(config).from_json(json.loads(json.dumps(config.to_json()))) == config
