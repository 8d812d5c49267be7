"""Names of arguments that other libraries have for what is called differently here.

They are not taken: one name for one thing. Whoever types one is told ours.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import ParamSpec, TypeVar

from internvl_edge.errors import UsageError, did_you_mean, shortened

__all__ = ["named", "unknown_keyword"]

P = ParamSpec("P")
T = TypeVar("T")

OURS = {
    "candidate_labels": "labels",
    "classes": "labels",
    "class_names": "labels",
    "hypothesis_template": "templates",
    "template": "templates",
    "normalize_embeddings": "normalize",
    "normalise": "normalize",
    "pixel_values": "images",
    "image": "images",
    "img": "images",
    "sentences": "texts",
    "text": "texts",
    "captions": "texts",
    "video": "frames",
    "n_frames": "num_frames",
    "nframes": "num_frames",
    "prompts": "prompt",
    "prompt": "prompts",
    "system_message": "system",
    "system_prompt": "system",
    "truncation": "on_long",
    "top": "top_k",
    "k": "top_k",
    "max_length": "max_new_tokens",
    "max_tokens": "max_new_tokens",
    "min_length": "min_new_tokens",
    "beams": "num_beams",
    "beam_size": "num_beams",
    "eos_token_id": "stop_ids",
    "pad_token_id": "pad_id",
    "generator": "seed",
    "providers": "device",
    "provider": "device",
    "device_map": "device",
    "session_options": "options",
}


def unknown_keyword(name: str, known: Iterable[str], what: str) -> UsageError:
    """Make the error for an argument that nothing has, with the name that was meant."""
    names = list(known)
    ours = OURS.get(name)
    hint = f"; it is called {ours!r} here" if ours in names else did_you_mean(name, names)
    shown = shortened(name, quoted=False)
    return UsageError(f"{what} {shown!r}: expected some of {', '.join(names)}{hint}")


def named(function: Callable[P, T]) -> Callable[P, T]:
    """Refuse unknown keyword arguments by an error of ours that says which one was meant."""
    parameters = inspect.signature(function).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        raise TypeError(f"{function.__name__} takes any keyword")
    known = [name for name in parameters if name != "self"]

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        for name in kwargs:
            if name not in parameters:
                raise unknown_keyword(name, known, f"{function.__name__}: argument")
        return function(*args, **kwargs)

    return wrapped
