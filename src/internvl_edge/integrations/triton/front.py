"""The models in Python: a task of the table as a model's folder."""

from __future__ import annotations

import struct
from typing import Any

from internvl_edge.artifact.manifest import Manifest
from internvl_edge.artifact.open import Artifact
from internvl_edge.integrations.triton.config import Word, entries
from internvl_edge.integrations.triton.folder import (
    VERSION,
    WARMUP,
    ModelFolder,
    batching,
    instance_group,
)
from internvl_edge.integrations.triton.options import RepositoryOptions
from internvl_edge.integrations.triton.tasks import EMBEDDING, Task, Tensor, is_chat

__all__ = ["front_model"]

# The first request: a picture of one white pixel, as a PNG, and a word.
PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de"
    "0000000c49444154789c63f8ffff3f0005fe02fe0def46b80000000049454e44ae426082"
)
FIRST = {"image": PIXEL, "text": b"a", "labels": b"a"}
STRING = Word("TYPE_STRING")


def front_model(
    artifact: Artifact, options: RepositoryOptions, task: Task, component: ModelFolder | None
) -> ModelFolder:
    """Write down a model in Python.

    Args:
        artifact: the open directory.
        options: of the repository, with absolute paths.
        task: what the model does.
        component: the model that it asks for image embeddings; None: it computes them.
    """
    needed = task.needs(artifact.manifest, options.mode)
    asked = component if component is not None and component.name in needed else None
    rows = options.max_batch if asked is None else asked.max_batch
    # A first request cannot stream, nor ask a model that Triton opens meanwhile.
    is_warmed = not task.is_stream and asked is None
    first = [t for t in task.inputs if is_warmed and not t.is_optional]
    config: dict[str, Any] = {
        "name": task.name,
        "backend": "python",
        "max_batch_size": 0 if task.is_stream else rows,
        "input": [_tensor(artifact.manifest, task, tensor) for tensor in task.inputs],
        "output": [_tensor(artifact.manifest, task, tensor) for tensor in task.outputs],
        "instance_group": [instance_group(options, gpu=options.front_gpu)],
        "parameters": _parameters(options, task, asked),
    }
    if task.is_stream:
        config["model_transaction_policy"] = {"decoupled": True}
    else:
        config["dynamic_batching"] = batching(options)
    if first:
        inputs = {
            t.name: {"data_type": STRING, "dims": [1], "input_data_file": t.name} for t in first
        }
        config["model_warmup"] = [{"name": "one", "batch_size": 1, "inputs": entries(inputs)}]
    return ModelFolder(
        name=task.name,
        config=config,
        written={
            f"{VERSION}/model.py": _source(task).encode("ascii"),
            **{f"{WARMUP}/{t.name}": _counted(FIRST[t.name]) for t in first},
        },
        components=needed if options.self_contained else (),
    )


def _parameters(
    options: RepositoryOptions, task: Task, asked: ModelFolder | None
) -> list[dict[str, Any]]:
    """Write what ``models.Settings`` reads."""
    values = {} if options.self_contained else {"out": str(options.out)}
    values["threads"] = str(options.threads)
    if task.gives_embedding:
        values["normalize"] = "true"
    if task.takes_mode:
        values["mode"] = options.mode
    if asked is not None:
        values["image_model"] = asked.name
    return entries({key: {"string_value": value} for key, value in values.items()})


def _source(task: Task) -> str:
    return (
        f'"""{task.name}, as config.pbtxt describes it."""\n\n'
        f"from internvl_edge.integrations.triton import {task.model} as TritonPythonModel\n\n"
        '__all__ = ["TritonPythonModel"]\n'
    )


def _counted(data: bytes) -> bytes:
    """Write bytes as Triton reads them from a file: their number, little-endian, before them."""
    return struct.pack("<I", len(data)) + data


def _tensor(manifest: Manifest, task: Task, tensor: Tensor) -> dict[str, Any]:
    dims, is_optional = [*tensor.dims], tensor.is_optional
    if dims == [EMBEDDING]:
        dims = [_embedding_size(manifest)]
    if task.is_stream and tensor.name == "image" and not is_chat(manifest):
        dims, is_optional = [1], False
    field = {"name": tensor.name, "data_type": Word(f"TYPE_{tensor.data_type}"), "dims": dims}
    return field | ({"optional": True} if is_optional else {})


def _embedding_size(manifest: Manifest) -> int:
    (size,) = {
        spec.shape[-1]
        for record in manifest.components.values()
        for spec in record.outputs
        if spec.name in ("image_embeds", "text_embeds")
    }
    return int(size)
