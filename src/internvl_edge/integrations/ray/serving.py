"""The HTTP server as replicas of Ray Serve."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from internvl_edge.artifact.open import open_artifact
from internvl_edge.errors import SessionDead
from internvl_edge.files.packages import require

__all__ = ["Served", "deployment"]


def deployment(
    out: str | os.PathLike[str],
    *,
    name: str | None = None,
    serving: Mapping[str, Any] | None = None,
    **options: Any,
) -> Any:
    """Make a deployment of Ray Serve that answers every route of ``internvl-edge serve``.

    Each replica opens OUT and joins requests to batches by itself. ``serve.run(deployment(OUT)
    .bind())`` runs it. A key in ``INTERNVL_EDGE_API_KEY`` of the replicas is asked for. When a
    replica dies, its requests under way are answered 500: clients try again.

    Args:
        out: the compiled directory, at this path on every machine.
        name: that clients call the model by; None: the folder's.
        serving: fields of ``serve.options.ServeOptions``, such as ``max_batch``.
        options: of ``ray.serve.deployment``: ``num_replicas``, ``max_ongoing_requests``,
            ``max_queued_requests``, ``graceful_shutdown_timeout_s``, ``ray_actor_options``.

    Raises:
        InternVLError: a directory or an option that cannot be.
    """
    require("ray", "starlette", "uvicorn", "prometheus-client")
    from ray import serve

    from internvl_edge.serve.options import ServeOptions, read_keys

    place = os.path.abspath(out)
    given = {"num_threads": 1, "page": False, **(serving or {})}
    keys = read_keys(None, _environment(options))
    ServeOptions(keys=keys, **given)  # refused here, not on a replica
    open_artifact(place, hash_files=False)
    named = name or Path(place).name

    @serve.deployment(**{"name": "internvl-edge", **options})
    @serve.ingress()
    class Replica:
        def __init__(self) -> None:
            self._served = Served(named, place, given)

        def __serve_build_asgi_app__(self) -> Any:
            return self._served

        def check_health(self) -> None:
            self._served.check_health()

    return Replica


def _environment(options: Mapping[str, Any]) -> dict[str, str]:
    """Return the variables that replicas will have, as far as their deployment says so."""
    actors = options.get("ray_actor_options") or {}
    own = (actors.get("runtime_env") or {}).get("env_vars") or {}
    return {**os.environ, **own}


class Served:
    """A model that a replica serves, as an ASGI application.

    Args:
        name: that clients call the model by.
        out: the compiled directory.
        options: fields of ``ServeOptions``.
    """

    def __init__(self, name: str, out: str, options: Mapping[str, Any]) -> None:
        from internvl_edge.serve.app import make_app
        from internvl_edge.serve.options import ServeOptions, read_keys
        from internvl_edge.serve.service import Service

        keys = read_keys(None, os.environ)
        self._service = Service({name: Path(out)}, ServeOptions(keys=keys, **options))
        self._service.open()
        self._service.state = "ready"
        self._app = make_app(self._service)

    def check_health(self) -> None:
        """Raise where only a new process can go on.

        Raises:
            SessionDead: the device failed for good.
        """
        if self._service.state == "dead":
            raise SessionDead("the device failed; a new replica has to take over")

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request; Ray Serve also says when it begins and ends."""
        if scope["type"] != "lifespan":
            await self._app(scope, receive, send)
            return
        while True:
            message = await receive()
            if message["type"] == "lifespan.shutdown":
                await asyncio.to_thread(self._service.close)
            await send({"type": f"{message['type']}.complete"})
            if message["type"] == "lifespan.shutdown":
                return
