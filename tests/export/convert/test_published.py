"""The tensors of each layout's files, put together from a checkpoint's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.checkpoints.family import KINDS, write_family

from internvl_edge.export.checkpoint.checkpoint import open_checkpoint
from internvl_edge.export.config.chat import Layout
from internvl_edge.export.convert.published import published_tensors


@pytest.mark.parametrize(("layout", "name"), [("internvl_chat", "chat"), ("internvl_hf", "hf")])
@pytest.mark.parametrize("kind", KINDS)
def test_they_are_those_that_were_read(
    kind: str, layout: Layout, name: str, tmp_path: Path
) -> None:
    written = write_family(tmp_path, kind, name, language={"num_key_value_heads": 2})
    checkpoint = open_checkpoint(written.path)
    architecture = KINDS[kind].architecture
    if layout == "internvl_hf" and kind == "internlm2":
        architecture = "LlamaForCausalLM"  # its twin is not packed
    tensors = published_tensors(checkpoint.config, layout, architecture)
    assert set(tensors) == set(written.state)
    for own, tensor in tensors.items():
        values = tensor.read(checkpoint.read)
        assert values.shape == tensor.shape, own
        np.testing.assert_array_equal(values, written.state[own].numpy(), err_msg=own)
