"""Model configurations, read by Triton's own description of them: a typo is an error."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pool, json_format, message_factory, text_format
from support.paths import TESTS

DESCRIPTION = TESTS / "golden" / "triton" / "model_config.binpb"


@cache
def _config_class() -> Any:
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(DESCRIPTION.read_bytes())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("inference.ModelConfig"))


def parsed(text: str) -> Any:
    """The message; ``text_format.ParseError`` where it is none."""
    return text_format.Parse(text, _config_class()())


def config_of(model: Path) -> Any:
    """The configuration in a model's folder."""
    return parsed((model / "config.pbtxt").read_text(encoding="utf-8"))


def as_json(config: Any) -> str:
    """What Triton hands to a model in Python as ``model_config``."""
    return str(json_format.MessageToJson(config, preserving_proto_field_name=True))
