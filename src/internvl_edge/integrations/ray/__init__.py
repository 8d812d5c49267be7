"""Ray: bulk embedding on many machines, and the HTTP server as replicas.

    batches    ``EmbedImages``, ``EmbedTexts``: for ``Dataset.map_batches``; start here
    cluster    ``embed``: a source by actors, what ``internvl-edge embed --ray`` does
    serving    ``deployment``: the routes of ``internvl-edge serve``, for Ray Serve

Rows are those of ``integrations.bulk``, computed by the same code on a core each; Ray spreads them,
starts again what dies, and keeps checkpoints. OUT, and what a source or a result is in, have the
same path on every machine. Ray is imported where it is used.
"""

from __future__ import annotations

from internvl_edge.integrations.ray.batches import EmbedImages, EmbedTexts
from internvl_edge.integrations.ray.cluster import connected, embed
from internvl_edge.integrations.ray.serving import deployment

__all__ = ["EmbedImages", "EmbedTexts", "connected", "deployment", "embed"]
