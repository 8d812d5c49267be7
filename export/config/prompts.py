"""What a chat checkpoint says of its prompts, besides the template that its config names.

    system_message     of ``config.json``: a sentence in place of the template's; null: none
    pad_token          of the tokenizer's files, and the id that they give it
    chat template      of the ``*-hf`` layout: a program in Jinja, which is never executed

A chat template is known or not: ``NATIVE`` is the one that the published ``*-hf`` models have, with
``<image>`` for ``<IMG_CONTEXT>`` in the first of them. A checkpoint with another one compiles, and
its conversations ask for ``template=``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from internvl_edge.errors import ArtifactError, CheckpointError
from internvl_edge.export.config.fields import read_json, typed
from internvl_edge.files.reading import is_there, read_file
from internvl_edge.runtime.text.templates import NATIVE
from internvl_edge.runtime.text.token_files import (
    ADDED_TOKENS,
    CONFIG,
    FAST,
    SENTENCEPIECE,
    SPECIAL_TOKENS,
    read_json_file,
)
from internvl_edge.runtime.text.tokenizer import Tokenizer

__all__ = ["find_pad_id", "find_system", "find_template_name", "find_token_id"]

JINJA = "chat_template.jinja"
JINJA_IN_JSON = ("chat_template.json", "processor_config.json", CONFIG)  # transformers before 4.50
MAX_TEMPLATE_NBYTES = 1 << 20
KNOWN = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n'}}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "{{ '<IMG_CONTEXT>\\n' }}{% elif content['type'] == 'video' %}{{ '<video>\\n' }}"
    "{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{'<|im_end|>\\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{'<|im_start|>assistant\\n' }}{% endif %}"
)


def find_token_id(directory: Path, token: str) -> int | None:
    """Find the id of a token in a checkpoint's tokenizer files; None if it is not there.

    Raises:
        CheckpointError: a file that is not what its name says.
    """
    for name in (ADDED_TOKENS, CONFIG, FAST):
        path = directory / name
        if not is_there(path):
            continue
        try:
            raw = read_json(path) if name != FAST else read_json_file(path)
            decoder = raw.get("added_tokens_decoder") or {}
            ids = {entry["content"]: int(i) for i, entry in decoder.items()}
            if name == FAST:
                ids = dict((raw.get("model") or {}).get("vocab") or {})
                ids |= {entry["content"]: entry["id"] for entry in raw.get("added_tokens") or ()}
            elif name == ADDED_TOKENS:
                ids = raw
        except ArtifactError as error:
            raise CheckpointError(str(error)) from error
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise CheckpointError(f"{path}: not a list of added tokens: {error}") from error
        if ids.get(token) is not None:
            return typed(ids[token], int, path, token)  # type: ignore[no-any-return]
    return None


def find_pad_id(directory: Path) -> int | None:
    """Find the id of the token that a checkpoint's tokenizer pads with; None: it names none.

    Raises:
        CheckpointError: a file that is not what its name says.
    """
    for name in (CONFIG, SPECIAL_TOKENS):
        path = directory / name
        given = read_json(path).get("pad_token") if is_there(path) else None
        token = given.get("content") if isinstance(given, dict) else given
        if not isinstance(token, str):
            continue
        found = find_token_id(directory, token)
        if found is None and is_there(directory / SENTENCEPIECE):
            try:
                return Tokenizer(directory / SENTENCEPIECE).id_of(token)
            except ArtifactError as error:
                raise CheckpointError(str(error)) from error
        return found
    return None


def find_system(raw: dict[str, Any], path: Path) -> str | None:
    """Read a config's own system sentence; None: it has none."""
    given = raw.get("system_message")
    return None if given is None else str(typed(given, str, path, "system_message"))


def find_template_name(directory: Path) -> str:
    """Name the template of ours that spells a checkpoint's chat template; "": none, or unknown.

    Raises:
        CheckpointError: a file that is not what its name says.
    """
    known = _normal(KNOWN)
    return NATIVE if any(_normal(one) == known for one in _chat_templates(directory)) else ""


def _chat_templates(directory: Path) -> list[str]:
    """Read the chat template, from the first place that has one."""
    path = directory / JINJA
    if is_there(path):
        data = read_file(path, MAX_TEMPLATE_NBYTES, CheckpointError)
        return [data.decode("utf-8", "replace")]
    for name in JINJA_IN_JSON:
        path = directory / name
        given = read_json(path).get("chat_template") if is_there(path) else None
        if isinstance(given, str):
            return [given]
    return []


def _normal(template: str) -> str:
    """Spell a template so that two which write the same are the same.

    Outside of quotes white space says nothing, between tags there is none, and a line break in
    quotes is one whichever way it is written.
    """
    template = (
        template.replace("<image>", "<IMG_CONTEXT>").replace("{%-", "{%").replace("-%}", "%}")
    )
    parts = re.split(r"('[^']*'|\"[^\"]*\")", template)
    return "".join(
        f"'{part[1:-1]}'".replace("\n", "\\n") if at % 2 else re.sub(r"\s+", "", part)
        for at, part in enumerate(parts)
    )
