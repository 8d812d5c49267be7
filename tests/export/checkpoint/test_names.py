"""The names of both layouts, and what is packed in their files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.checkpoints.family import write_family

from internvl_edge.errors import CheckpointError
from internvl_edge.export.checkpoint.checkpoint import open_checkpoint
from internvl_edge.export.checkpoint.names import Joined, chat_entries
from internvl_edge.export.checkpoint.shards import TensorEntry
from internvl_edge.export.config.language import LanguageConfig

LAYER = "language_model.model.layers.0"
HEAD = "language_model.lm_head.weight"


def edit_weights(path: Path, **changes: torch.Tensor | None) -> None:
    """Replace tensors of a checkpoint of one file; None removes one."""
    file = path / "model.safetensors"
    state = load_file(file) | {name: t for name, t in changes.items() if t is not None}
    kept = {name: t for name, t in state.items() if changes.get(name, t) is not None}
    save_file(kept, file, metadata={"format": "pt"})


def test_packed_rows_that_lie_together_stay_in_the_file(tmp_path: Path) -> None:
    written = write_family(tmp_path, "phi3")
    tensors = open_checkpoint(written.path).tensors
    assert not any(isinstance(entry, Joined) for entry in tensors.values())
    data = (tmp_path / "model.safetensors").read_bytes()
    up = tensors[f"{LAYER}.mlp.up_proj.weight"]
    own = np.frombuffer(data, np.float32, up.nbytes // 4, up.offset).reshape(up.shape)
    packed = written.state[f"{LAYER}.mlp.gate_up_proj.weight"].numpy()
    np.testing.assert_array_equal(own, packed[len(packed) // 2 :])


def test_only_packed_attention_of_internlm2_is_joined(tmp_path: Path) -> None:
    tensors = open_checkpoint(write_family(tmp_path, "internlm2").path).tensors
    joined = {name.split(".")[-2] for name, e in tensors.items() if isinstance(e, Joined)}
    assert joined == {"q_proj", "k_proj", "v_proj"}


def test_one_key_head_needs_no_joining(tmp_path: Path) -> None:
    language = {"num_key_value_heads": 1}
    tensors = open_checkpoint(write_family(tmp_path, "internlm2", language=language).path).tensors
    assert not any(isinstance(entry, Joined) for entry in tensors.values())


def test_transformers_vision_tower_has_its_qkv_joined(tmp_path: Path) -> None:
    tensors = open_checkpoint(write_family(tmp_path, "qwen2", "hf").path).tensors
    joined = {name.partition("attn.")[2] for name, e in tensors.items() if isinstance(e, Joined)}
    assert joined == {"qkv.weight", "qkv.bias"}


@given(kv=st.integers(1, 4), queries=st.integers(1, 4), half=st.integers(1, 4))
def test_queries_keys_and_values_of_any_heads(kv: int, queries: int, half: int) -> None:
    size, width = 2 * half, 8
    rows = kv * (queries + 2) * size
    language = LanguageConfig(
        hidden_size=width,
        num_attention_heads=kv * queries,
        num_key_value_heads=kv,
        head_dim=size,
    )
    entry = TensorEntry(
        name="packed",
        dtype=np.dtype(np.float32),
        shape=(rows, width),
        file=Path("f"),
        offset=64,
        nbytes=4 * rows * width,
    )
    names = chat_entries({f"{LAYER}.attention.wqkv.weight": entry}, language)
    row_nbytes = 4 * width

    def rows_read(part: TensorEntry) -> list[int]:
        runs = part.parts if isinstance(part, Joined) else (part,)
        starts = [(run.offset - 64) // row_nbytes for run in runs]
        return [s + i for s, run in zip(starts, runs, strict=True) for i in range(run.shape[0])]

    grouped = np.arange(rows).reshape(kv, queries + 2, size)
    q, k, v = (names[f"{LAYER}.self_attn.{one}_proj.weight"] for one in "qkv")
    assert rows_read(q) == grouped[:, :queries].ravel().tolist()
    assert rows_read(k) == grouped[:, queries].ravel().tolist()
    assert rows_read(v) == grouped[:, queries + 1].ravel().tolist()


def test_a_packed_matrix_of_another_shape_is_refused_by_its_own_name(tmp_path: Path) -> None:
    written = write_family(tmp_path, "internlm2")
    name = f"{LAYER}.attention.wqkv.weight"
    edit_weights(tmp_path, **{name: torch.zeros(120, 64)})
    with pytest.raises(CheckpointError, match=rf"{name}: expected shape \(128, 64\), found"):
        open_checkpoint(written.path)


def test_a_third_of_the_vision_towers_qkv_is_missing(tmp_path: Path) -> None:
    written = write_family(tmp_path, "qwen3", "hf")
    edit_weights(tmp_path, **{"vision_tower.encoder.layer.1.attention.k_proj.weight": None})
    with pytest.raises(CheckpointError, match=r"encoder\.layers\.1\.attn\.qkv\.weight: missing"):
        open_checkpoint(written.path)


@pytest.mark.parametrize("layout", ["chat", "hf"])
@pytest.mark.parametrize("level", ["top", "nested"])
def test_an_output_layer_in_the_file_is_used(layout: str, level: str, tmp_path: Path) -> None:
    written = write_family(tmp_path, "qwen2", layout)
    raw = json.loads((tmp_path / "config.json").read_text())
    nested = raw["llm_config" if layout == "chat" else "text_config"]
    (raw if level == "top" else nested)["tie_word_embeddings"] = True
    (tmp_path / "config.json").write_text(json.dumps(raw))
    checkpoint = open_checkpoint(written.path)
    np.testing.assert_array_equal(checkpoint.read(HEAD), written.state[HEAD].numpy())
    chat = checkpoint.config.chat
    assert chat is not None and chat.llama is not None and not chat.llama.tie_word_embeddings


@pytest.mark.parametrize("layout", ["chat", "hf"])
def test_without_one_the_flag_decides(layout: str, tmp_path: Path) -> None:
    language = {"tie_word_embeddings": True}
    tied = write_family(tmp_path / "tied", "qwen2", layout, language=language)
    assert HEAD not in open_checkpoint(tied.path).tensors
    bare = write_family(tmp_path / "bare", "qwen2", layout)
    edit_weights(bare.path, **{HEAD: None})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: missing"):
        open_checkpoint(bare.path)
