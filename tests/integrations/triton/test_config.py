"""``config.pbtxt`` as Protocol Buffers read it."""

from __future__ import annotations

import pytest
from google.protobuf import text_format
from hypothesis import given
from hypothesis import strategies as st
from support.web.triton.configs import parsed

from internvl_edge.integrations.triton.config import Word, entries, text_of

TEXTS = st.text(st.characters(exclude_categories=["Cs"]))


def test_every_kind_of_value() -> None:
    text = text_of(
        {
            "name": "m",
            "max_batch_size": 8,
            "input": [{"name": "x", "data_type": Word("TYPE_STRING"), "dims": [-1, 3]}],
            "dynamic_batching": {},
            "model_transaction_policy": {"decoupled": True},
            "parameters": entries({"a": {"string_value": "b"}}),
        }
    )
    config = parsed(text)
    assert (config.name, config.max_batch_size, config.input[0].dims) == ("m", 8, [-1, 3])
    assert config.HasField("dynamic_batching")
    assert config.model_transaction_policy.decoupled
    assert config.parameters["a"].string_value == "b"
    assert 'input [\n  { name: "x" data_type: TYPE_STRING dims: [ -1, 3 ] }\n]\n' in text


@given(TEXTS, st.dictionaries(TEXTS, TEXTS, max_size=3))
def test_any_text_comes_back(name: str, parameters: dict[str, str]) -> None:
    values = {key: {"string_value": value} for key, value in parameters.items()}
    config = parsed(text_of({"name": name, "parameters": entries(values)}))
    assert config.name == name
    assert {k: v.string_value for k, v in config.parameters.items()} == parameters


def test_long_messages_are_broken_into_lines() -> None:
    text = text_of({"parameters": entries({"a": {"string_value": "b" * 200}})})
    assert parsed(text).parameters["a"].string_value == "b" * 200
    assert len(text.splitlines()) > 3


@pytest.mark.parametrize("text", ['nam: "x"', "max_batch_size: true", "backend: python"])
def test_the_reader_refuses_what_is_wrong(text: str) -> None:
    with pytest.raises(text_format.ParseError):
        parsed(text)
