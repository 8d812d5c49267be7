"""Errors as clients see them: ``{"error": {"message", "type", "param", "code"}}``.

    status  type                   code
    400     invalid_request_error  invalid_json, invalid_value, invalid_image_url, invalid_base64,
                                   invalid_image, unsupported_parameter, context_length_exceeded,
                                   missing_component
    401     authentication_error   invalid_api_key
    404     not_found_error        model_not_found, not_found
    405     not_found_error        method_not_allowed
    408     timeout_error          request_timeout: the body did not come in time
    413     invalid_request_error  request_too_large
    415     invalid_request_error  unsupported_media_type
    421     invalid_request_error  host_not_allowed
    429     overloaded_error       queue_full
    500     server_error           internal_error
    503     server_error           opening, draining, session_dead
    504     timeout_error          timeout

Errors of the runtime are mapped by their class; what is ours stays in the log.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from internvl_edge.errors import (
    ContextLengthError,
    InputError,
    ResourceError,
    SessionDead,
    UsageError,
)

__all__ = ["ClientGone", "Problem", "as_problem", "bad_request", "blamed", "overloaded", "shown"]

LONGEST_SHOWN = 60  # characters of what a client sent, in a message
KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "not_found_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    421: "invalid_request_error",
    429: "overloaded_error",
    500: "server_error",
    503: "server_error",
    504: "timeout_error",
}


class ClientGone(Exception):
    """The client closed its connection; nobody waits for an answer."""


class Problem(Exception):
    """An error that a client is told."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.param = status, code, message, param
        self.headers = dict(headers or {})

    @property
    def content(self) -> dict[str, dict[str, str | None]]:
        """The JSON of the answer."""
        error = {
            "message": self.message,
            "type": KINDS[self.status],
            "param": self.param,
            "code": self.code,
        }
        return {"error": error}

    @property
    def body(self) -> bytes:
        """The answer: ASCII, whatever a message quotes."""
        return json.dumps(self.content).encode("ascii")


def bad_request(code: str, message: str, param: str | None = None) -> Problem:
    """Make the error of a request that cannot be as it is."""
    return Problem(400, code, message, param)


def overloaded(message: str) -> Problem:
    """Make the error of a request that came at a bad time."""
    return Problem(429, "queue_full", message, headers={"Retry-After": "1"})


def shown(value: object) -> str:
    """Quote what a client sent, shortened and without control characters."""
    if isinstance(value, str):
        text = ascii(value[: LONGEST_SHOWN + 1])
    elif isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    else:
        text = ascii(value)
    return text if len(text) <= LONGEST_SHOWN + 2 else f"{text[:LONGEST_SHOWN]}..."


def as_problem(error: BaseException) -> Problem:
    """Turn an error of the runtime into what its caller is told."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, ContextLengthError):
        return bad_request("context_length_exceeded", str(error))
    if isinstance(error, (InputError, UsageError)):
        return bad_request("invalid_value", str(error))
    if isinstance(error, (ResourceError, MemoryError)):
        return overloaded("there is not enough memory for this now; try again later")
    if isinstance(error, SessionDead):
        return Problem(503, "session_dead", "the device failed, and the server ends")
    message = "the server failed; its log says why, under the x-request-id of this answer"
    return Problem(500, "internal_error", message, headers={"x-should-retry": "false"})


@contextmanager
def blamed(param: str | None, code: str) -> Iterator[None]:
    """Give what the caller did wrong the name of its parameter and a code.

    Raises:
        Problem: in place of an ``InputError`` or a ``UsageError``.
    """
    try:
        yield
    except (InputError, UsageError) as error:
        if isinstance(error, ContextLengthError):
            code = "context_length_exceeded"
        raise bad_request(code, str(error), param) from error
