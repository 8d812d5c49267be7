from __future__ import annotations

import json
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from support.web.serving import Served, inside

from internvl_edge.serve.routes import page
from internvl_edge.serve.service import Service


def test_models_are_listed_with_what_they_are(served: Served) -> None:
    listed = served.ask("/v1/models").json
    (one,) = listed["data"]
    assert one["id"] == "tiny"
    assert one["internvl_edge"]["embedding_size"] == 16
    assert one["internvl_edge"]["image_size"] == 28
    assert "image_embed" in one["internvl_edge"]["components"]
    assert served.ask("/v1/models/tiny").json == one
    assert served.ask("/v1/models/other").error == (404, "model_not_found", "model")


def test_several_models_are_told_apart(compiled: Path, compiled_chat: Path) -> None:
    with inside({"a": compiled, "talk": compiled_chat}) as served:
        assert [one["id"] for one in served.ask("/v1/models").json["data"]] == ["a", "talk"]
        assert served.ask("/v1/embeddings", {"input": "x"}).error == (400, "invalid_value", "model")
        wrong = {"input": "x", "model": "talk"}
        assert served.ask("/v1/embeddings", wrong).error == (400, "missing_component", "model")
        found = served.ask("/v1/embeddings", {"input": "x", "model": "a"})
        assert (found.status, found.json["model"]) == (200, "a")


def test_health(served: Served) -> None:
    assert served.ask("/health").json == {"status": "ready"}
    assert served.ask("/live").status == 200


@pytest.mark.parametrize(
    ("state", "code", "answers"),
    [
        ("opening", "opening", False),
        ("draining", "draining", True),
        ("ending", "draining", True),
        ("dead", "session_dead", False),
    ],
)
def test_what_is_not_ready_says_so(served: Served, state: str, code: str, answers: bool) -> None:
    """What was sent is answered to the end; only /health sends others away."""
    service: Service = served.service
    service.state = state  # type: ignore[assignment]
    try:
        assert served.ask("/health").error == (503, code, None)
        assert served.ask("/live").status == 200
        reply = served.ask("/v1/embeddings", {"input": "a"})
        if answers:
            assert reply.status == 200
            assert (reply.headers.get("connection") == "close") == (state == "ending")
        else:
            assert reply.error == (503, code, None)
    finally:
        service.state = "ready"


def test_metrics_are_prometheus_and_have_no_word_of_a_client(served: Served) -> None:
    served.ask("/v1/embeddings", {"input": "a", "model": 'evil"}\n# TYPE'})
    served.ask("/nowhere/secret")
    served.ask("/v1/models/secret")
    served.ask("/v1/embeddings", {"input": ["a", "b c d"]})
    text = served.ask("/metrics").body.decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert {
        "internvl_edge_requests",
        "internvl_edge_request_seconds",
        "internvl_edge_stage_seconds",
        "internvl_edge_batch_rows",
        "internvl_edge_queue_length",
        "internvl_edge_streams",
        "internvl_edge_tokens",
        "internvl_edge_ready",
        "internvl_edge_info",
    } <= families.keys()
    assert "evil" not in text
    assert "secret" not in text
    requests = families["internvl_edge_requests"].samples
    routes = {sample.labels["route"] for sample in requests}
    assert {"/v1/models/{id}", "unknown", "/v1/embeddings"} <= routes
    (ready,) = families["internvl_edge_ready"].samples
    assert ready.value == 1
    (info,) = families["internvl_edge_info"].samples
    assert info.labels["precision"] == "fp32"


def test_the_description_names_every_route(served: Served) -> None:
    described = json.loads(served.ask("/openapi.json").body)
    ours = set(described["paths"]) | set(page.FILES)
    for path, methods in described["paths"].items():
        reply = served.ask(path.replace("{id}", "tiny"), method="OPTIONS")
        assert reply.error[:2] == (405, "method_not_allowed"), path
        allowed = {name.strip().lower() for name in reply.headers["allow"].split(",")}
        assert allowed - {"head"} == set(methods)
    families = text_string_to_metric_families(served.ask("/metrics").body.decode())
    counted = next(family for family in families if family.name == "internvl_edge_requests")
    assert {sample.labels["route"] for sample in counted.samples} <= ours | {"unknown"}


def test_without_the_page(compiled: Path) -> None:
    with inside({"tiny": compiled}, page=False) as served:
        assert served.ask("/").error == (404, "not_found", None)
        assert served.ask("/openapi.json").status == 200
