"""A compiled directory as a model of sentence-transformers, and so of MTEB and of vector stores.

    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(modules=[InternVLEdge(OUT)])
    model.similarity(model.encode([picture]), model.encode(["a red seven"]))

Embeddings are those of ``Model.encode_image`` and ``encode_text``. They have no unit length, which
the cosine, the default similarity there, does not mind.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

try:
    import torch
    from sentence_transformers.base.modality import infer_batch_modality
    from sentence_transformers.base.modules import InputModule
except ImportError as error:
    from internvl_edge.errors import MissingDependency

    raise MissingDependency.of("sentence-transformers", "sentence-transformers") from error

from internvl_edge.artifact.components import TEXT_EMBED
from internvl_edge.errors import UsageError
from internvl_edge.runtime import load
from internvl_edge.runtime.images.transform import Transform
from internvl_edge.runtime.tasks.embed import image_embedder

__all__ = ["InternVLEdge"]

TEXT, IMAGE = "text", "image"
EMBEDDING = "sentence_embedding"


class InternVLEdge(InputModule):
    """The only module that a ``SentenceTransformer`` needs: pictures or texts to embeddings.

    sentence-transformers tells pictures (PIL images, arrays uint8 [H, W, 3], paths of files) from
    texts, and refuses both in one batch. A prompt of its own goes in front of a text, and the
    prefix that the text tower wants in front of that.

    Saving writes down where ``out`` is, and copies nothing of it.

    Args:
        out: a compiled directory.
        mode: ``"c"`` (InternVL-C) or ``"g"`` (InternVL-G), for pictures.
        transform: how pictures become squares, see ``Model.encode_image``; None: the directory's.
        options: ``backend``, ``device`` and more of ``internvl_edge.load``. They decide where it
            computes, and the device of the ``SentenceTransformer`` does not.

    Raises:
        ArtifactError: ``out`` is not what its manifest says.
        UsageError: it embeds neither pictures in that mode nor texts.
    """

    config_keys = ["out", "mode", "transform"]  # noqa: RUF012, as declared there

    def __init__(
        self,
        out: str | os.PathLike[str],
        mode: str = "c",
        transform: Transform | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.out, self.mode, self.transform = os.path.abspath(out), mode, transform
        self.model = load(out, **options)
        components = self.model.components
        self._modalities = [TEXT] if components.has(TEXT_EMBED) else []
        try:
            image_embedder(components, mode)
            self._modalities.append(IMAGE)
        except UsageError:
            if not self._modalities or mode not in ("c", "g"):
                raise

    @property
    def modalities(self) -> list[str]:
        """What it embeds: ``"text"``, ``"image"`` or both."""
        return self._modalities

    def get_embedding_dimension(self) -> int:
        """Count the numbers of an embedding, E."""
        size = self.model.components.embedding_size
        assert size is not None
        return size

    def preprocess(
        self, inputs: Sequence[Any], prompt: str | None = None, **ignored: Any
    ) -> dict[str, Any]:
        """Tell what the inputs are; the runtime decodes and tokenises them where it computes.

        Raises:
            UsageError: they are neither all texts nor all pictures.
        """
        kind = infer_batch_modality(inputs, supported_modalities=self.modalities)
        if kind not in self.modalities:
            raise UsageError(
                f"{self.out}: expected a batch of {' or of '.join(self.modalities)}, found {kind}"
            )
        plain = [one[kind] if isinstance(one, Mapping) else one for one in inputs]
        return {kind: [prompt + text for text in plain] if prompt and kind == TEXT else plain}

    def forward(self, features: dict[str, Any], **ignored: Any) -> dict[str, Any]:
        """Embed a batch: ``sentence_embedding``, float32 [B,E].

        Raises:
            MediaError: a picture or a text cannot be read.
        """
        if TEXT in features:
            embeds = self.model.encode_text(features[TEXT], batch_size=len(features[TEXT]))
        else:
            embeds = self.model.encode_image(
                features[IMAGE],
                self.mode,
                batch_size=len(features[IMAGE]),
                transform=self.transform,
            )
        return {**features, EMBEDDING: torch.from_numpy(embeds)}

    def save(self, output_path: str, *args: Any, **ignored: Any) -> None:
        """Write which directory it is, and how it is used."""
        self.save_config(output_path)
