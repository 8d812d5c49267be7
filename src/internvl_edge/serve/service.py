"""The models that are served, and what every request shares: threads, bodies, metrics, state.

The state goes one way: ``opening``, ``ready``, ``draining``, ``ending``, or ``dead``. ``/health``
says whether new requests should be sent here; one that was sent is answered also while the server
ends, on a connection that is closed after it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

from internvl_edge.errors import SessionDead
from internvl_edge.files.cores import usable_cores
from internvl_edge.serve.http.body import Bodies
from internvl_edge.serve.http.meters import Meters
from internvl_edge.serve.http.problems import Problem, as_problem, shown
from internvl_edge.serve.models.gallery import Gallery, pictures_in
from internvl_edge.serve.models.served import ServedModel
from internvl_edge.serve.options import ServeOptions

__all__ = ["Service", "State"]

logger = logging.getLogger(__name__)

State = Literal["opening", "ready", "draining", "ending", "dead"]
NOT_READY = {  # code and text
    "opening": ("opening", "the models are being opened; try again later"),
    "draining": ("draining", "the server ends; ask another"),
    "ending": ("draining", "the server ends; ask another"),
    "dead": ("session_dead", "the device failed, and the server ends; ask another"),
}

BODIES = 8  # of the largest size, in memory together
MOST_DECODERS = 4  # threads


class Service:
    """What the routes serve.

    Args:
        places: name → compiled directory; each is checked here and opened by ``open``.
        options: of the server.

    Raises:
        InternVLError: a directory that cannot be served.
    """

    def __init__(self, places: Mapping[str, Path], options: ServeOptions) -> None:
        self.options, self.meters = options, Meters()
        self.state: State = "opening"
        self.gallery = Gallery()
        self._pictures = [] if options.gallery is None else pictures_in(options.gallery)
        self.bodies = Bodies(options.max_body, BODIES * options.max_body)
        self.pool = ThreadPoolExecutor(min(usable_cores(), MOST_DECODERS), "internvl-edge-decode")
        self.models = {
            name: ServedModel(name, out, options, self.pool) for name, out in places.items()
        }
        self.died: Callable[[], None] = lambda: None  # is told of a device that failed for good
        self.meters.ready.set_function(lambda: self.state == "ready")
        # It quotes what it cuts, and what a client sends stays out of the log.
        logging.getLogger("internvl_edge.runtime.text.tokenizer").setLevel(logging.ERROR)

    def open(self) -> None:
        """Open every model; a while."""
        for served in self.models.values():
            served.open(self.meters)
        if self._pictures:
            named = [(name, served.components) for name, served in self.models.items()]
            self.gallery.fill(self._pictures, named, self.pool)

    def close(self) -> None:
        """Compute what is queued, then close every model."""
        for served in self.models.values():
            served.close()
        self.pool.shutdown(cancel_futures=True)

    def die(self) -> None:
        """Take no more requests: only a new process can."""
        self.state = "dead"
        self.died()

    def require_open(self) -> None:
        """Refuse a request that cannot be answered.

        Raises:
            Problem: the models are not open yet, or their device failed.
        """
        if self.state in ("opening", "dead"):
            self.require_ready()

    def require_ready(self) -> None:
        """Refuse where new requests should not be sent here.

        Raises:
            Problem: why not.
        """
        if self.state != "ready":
            code, text = NOT_READY[self.state]
            raise Problem(503, code, text, headers={"Retry-After": "1"})

    def told(self, error: Exception, request: str, route: str) -> Problem:
        """Make what a client is told of an error; what is ours is logged under the request's id."""
        problem = as_problem(error)
        if isinstance(error, SessionDead):
            self.die()
        if problem.status >= 500 and not isinstance(error, Problem):
            logger.error("request %s, %s: %s", request, route, error, exc_info=error)
        return problem

    def find(self, name: object) -> ServedModel:
        """Find a model by the name that a request gives; None is the only one.

        Raises:
            Problem: there is none of that name, or the name is missing among several.
        """
        names = ", ".join(self.models)
        if name is None and len(self.models) == 1:
            return next(iter(self.models.values()))
        if name is None:
            text = f"model: expected one of {names}, found none"
            raise Problem(400, "invalid_value", text, "model")
        served = self.models.get(name) if isinstance(name, str) else None
        if served is None:
            text = f"model: expected one of {names}, found {shown(name)}"
            raise Problem(404, "model_not_found", text, "model")
        return served
