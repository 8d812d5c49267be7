"""What can be read without computing anything: models, health, metrics."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from internvl_edge.serve.http.exchange import json_response
from internvl_edge.serve.models.served import ServedModel
from internvl_edge.serve.service import Service

__all__ = ["health", "live", "metrics", "model", "models"]

CREATED = 0  # OpenAI's list has a time of each model; a directory has none that means anything


def described(served: ServedModel) -> dict[str, Any]:
    """Describe a model as OpenAI's list does, and say what it is."""
    manifest = served.components.artifact.manifest
    return {
        "id": served.name,
        "object": "model",
        "created": CREATED,
        "owned_by": "internvl-edge",
        "internvl_edge": {
            "precision": manifest.precision,
            "components": list(manifest.components),
            "embedding_size": served.embedding_size,
            "image_size": manifest.image_size,
            "chat": served.is_chat,
        },
    }


def models(service: Service, _: Request) -> Response:
    """List the models."""
    data = [described(served) for served in service.models.values()]
    return json_response({"object": "list", "data": data})


def model(service: Service, request: Request) -> Response:
    """Describe one model."""
    return json_response(described(service.find(request.path_params["id"])))


def health(service: Service, _: Request) -> Response:
    """Say whether new requests should be sent here."""
    service.require_ready()
    return json_response({"status": "ready"})


def live(_: Service, __: Request) -> Response:
    """Say that the process runs."""
    return json_response({"status": "live"})


def metrics(service: Service, _: Request) -> Response:
    """Give Prometheus its text."""
    kind = "text/plain; version=0.0.4; charset=utf-8"
    return Response(service.meters.text(), media_type=kind)
