"""The table of what is served: a model of Triton for each task that a directory can do.

    embed_image  image BYTES [1]                             → embedding FP32 [E]
    embed_text   text BYTES [1]                              → embedding FP32 [E]
    classify     image [1], labels [K], templates, all BYTES → label BYTES [K], score FP32 [K]
    generate     image, prompt, both BYTES; INT32 max_new_tokens, BOOL stream
                                                             → text BYTES [1], a piece at a time

Dimensions are those of one row: but for ``generate``, requests have a batch in front of them, and
Triton joins requests. An image is the bytes of a file, or of a ``data:`` URL, as JSON has no bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from internvl_edge.artifact.components import TEXT_EMBED, to_answer, to_embed_images
from internvl_edge.artifact.manifest import Manifest

__all__ = ["EMBEDDING", "TASKS", "Task", "Tensor", "is_chat"]

EMBEDDING = -2  # in place of a dimension: the length of an embedding, which a directory says
ANY = -1  # in place of a dimension: as many as a request has


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """An input or output of a model; dimensions are without the batch."""

    name: str
    data_type: str  # Triton's name, without TYPE_
    dims: tuple[int, ...] = (1,)
    is_optional: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A model of Triton that is written in Python."""

    name: str  # of the model and its folder
    model: str  # the class
    needs: Callable[[Manifest, str], tuple[str, ...]]  # components, by manifest and mode
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    is_stream: bool = False  # many responses to a request, and no batches

    @property
    def gives_embedding(self) -> bool:
        """True where the answer is a vector."""
        return any(tensor.dims == (EMBEDDING,) for tensor in self.outputs)

    @property
    def takes_mode(self) -> bool:
        """True where pictures are embedded, in one of two modes."""
        return not self.is_stream and any(tensor.name == "image" for tensor in self.inputs)


def is_chat(manifest: Manifest) -> bool:
    """Tell whether a directory is of an InternVL-Chat."""
    return bool(manifest.model.get("chat"))


def _image(manifest: Manifest, mode: str) -> tuple[str, ...]:
    return to_embed_images(manifest.components, mode)


def _text(manifest: Manifest, mode: str) -> tuple[str, ...]:
    return (TEXT_EMBED,)


def _generate(manifest: Manifest, mode: str) -> tuple[str, ...]:
    return to_answer(manifest.model.get("chat"))


IMAGE, TEXT = Tensor(name="image", data_type="STRING"), Tensor(name="text", data_type="STRING")
EMBEDDED = Tensor(name="embedding", data_type="FP32", dims=(EMBEDDING,))

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="embed_image",
            model="EmbedImage",
            needs=_image,
            inputs=(IMAGE,),
            outputs=(EMBEDDED,),
        ),
        Task(
            name="embed_text", model="EmbedText", needs=_text, inputs=(TEXT,), outputs=(EMBEDDED,)
        ),
        Task(
            name="classify",
            model="Classify",
            needs=lambda manifest, mode: (*_image(manifest, mode), *_text(manifest, mode)),
            inputs=(
                IMAGE,
                Tensor(name="labels", data_type="STRING", dims=(ANY,)),
                Tensor(name="templates", data_type="STRING", dims=(ANY,), is_optional=True),
            ),
            outputs=(
                Tensor(name="label", data_type="STRING", dims=(ANY,)),
                Tensor(name="score", data_type="FP32", dims=(ANY,)),
            ),
        ),
        Task(
            name="generate",
            model="Generate",
            needs=_generate,
            inputs=(
                # An InternVL-Chat takes any number of pictures, an InternVL-G one.
                Tensor(name="image", data_type="STRING", dims=(ANY,), is_optional=True),
                Tensor(name="prompt", data_type="STRING"),
                Tensor(name="max_new_tokens", data_type="INT32", is_optional=True),
                Tensor(name="stream", data_type="BOOL", is_optional=True),
            ),
            outputs=(TEXT,),
            is_stream=True,
        ),
    )
}
