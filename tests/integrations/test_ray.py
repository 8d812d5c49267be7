"""What Ray's actors compute, without Ray: batches of every form, and the rows of a source."""

from __future__ import annotations

import asyncio
import importlib.util
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import uvicorn
from support.runs.bulk import BROKEN, picture, write_folder
from uvicorn.lifespan.on import LifespanOn

import internvl_edge
from internvl_edge.errors import InternVLError, MissingDependency, UsageError
from internvl_edge.integrations import ray
from internvl_edge.integrations.bulk import run
from internvl_edge.integrations.bulk.job import How
from internvl_edge.integrations.bulk.rows import embedding_type
from internvl_edge.integrations.bulk.sources.opening import open_source
from internvl_edge.integrations.bulk.sources.source import Content, Source
from internvl_edge.integrations.bulk.staging import staging_of, with_recipe
from internvl_edge.integrations.ray import cluster
from internvl_edge.integrations.ray.batches import Rows
from internvl_edge.integrations.ray.serving import Served
from internvl_edge.runtime.model import Model

PICTURES = [picture(0), BROKEN, picture(1), picture(2)]


@pytest.fixture(scope="module")
def model(compiled: Path) -> Iterator[Model]:
    options = internvl_edge.OrtOptions(num_threads=1)
    with internvl_edge.load(compiled, options=options) as opened:
        yield opened


@pytest.fixture(scope="module")
def images(compiled: Path) -> ray.EmbedImages:
    return ray.EmbedImages(compiled, batch_size=2)


def numpy_batch() -> dict[str, Any]:
    data = np.empty(4, object)
    data[:] = PICTURES
    return {"id": np.arange(4), "bytes": data, "box": np.arange(8.0).reshape(4, 2)}


def test_a_batch_of_arrays_comes_back_with_embeddings(
    images: ray.EmbedImages, model: Model
) -> None:
    table = images(numpy_batch())
    assert table.column_names == ["id", "box", "embedding", "error"]
    expected = model.encode_image([PICTURES[0], PICTURES[2], PICTURES[3]])
    assert table.schema.field("embedding").type == embedding_type(expected.shape[1])
    rows = table.column("embedding").to_pylist()
    assert rows[1] is None
    np.testing.assert_allclose(np.array([rows[0], *rows[2:]]), expected, atol=1e-5)
    errors = table.column("error").to_pylist()
    assert [error is None for error in errors] == [True, False, True, True]
    assert table.column("id").to_pylist() == [0, 1, 2, 3]
    assert table.column("box").to_pylist() == [[0, 1], [2, 3], [4, 5], [6, 7]]


@pytest.mark.parametrize("old", [True, False], ids=["another recipe", "the same"])
def test_a_run_that_replaces_is_taken_up(
    compiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: bool
) -> None:
    source = open_source([write_folder(tmp_path / "pictures", 2)])
    dest = tmp_path / "a.parquet"
    written: list[
        int
    ] = []  # numbers of the rows that the next run writes before it is done or dies

    def ran(_: Source, folder: Path, arguments: dict[str, Any], *__: Any) -> None:
        for number in written:
            rows = pa.table({"path": [f"{number}"], "error": pa.array([None], pa.string())})
            (folder / cluster.ROWS).mkdir(exist_ok=True)
            rows = rows.cast(with_recipe(rows.schema, arguments["recipe"]))
            pq.write_table(rows, folder / cluster.ROWS / f"{number}.parquet")
        if written == [0]:
            raise InternVLError("killed")

    monkeypatch.setattr(cluster, "require", lambda _: None)
    monkeypatch.setattr(cluster, "_run", ran)
    written[:] = [0, 1]
    ray.embed(source, compiled, dest, How(normalize=old))
    written[:] = [0]
    with pytest.raises(InternVLError, match="killed"):
        ray.embed(source, compiled, dest, force=True)
    written[:] = [1]
    assert ray.embed(source, compiled, dest, resume=True).kept_rows == 1
    assert not staging_of(dest).exists()
    assert ray.embed(source, compiled, dest, resume=True).kept_rows == 2  # it is done


def test_every_form_of_a_batch_gives_the_same(images: ray.EmbedImages) -> None:
    expected = images(numpy_batch()).select(["embedding", "error"])
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    structs = pa.array([{"bytes": data, "path": "/etc/passwd"} for data in PICTURES], kind)
    forms: list[Any] = [
        {"bytes": PICTURES},
        pa.table({"bytes": pa.array(PICTURES, pa.binary())}),
        pa.table({"bytes": pa.chunked_array([PICTURES[:1], PICTURES[1:]], pa.large_binary())}),
        pa.table({"bytes": structs}),
    ]
    for form in forms:
        assert images(form).equals(expected)


def test_a_batch_without_rows(images: ray.EmbedImages) -> None:
    table = images(pa.table({"bytes": pa.array([], pa.binary()), "id": pa.array([], pa.int64())}))
    assert table.schema.equals(images({"bytes": PICTURES[:1], "id": [1]}).schema)
    assert len(table) == 0


def test_texts(compiled: Path, model: Model) -> None:
    texts = ray.EmbedTexts(compiled, column="caption", normalize=True)
    table = texts({"caption": np.array(["a red zero", "  ", "a blue one"])})
    rows = table.column("embedding").to_pylist()
    expected = model.encode_text(["a red zero", "a blue one"], normalize=True)
    np.testing.assert_allclose(np.array([rows[0], rows[2]]), expected, atol=1e-5)
    assert rows[1] is None
    assert table.column_names == ["embedding", "error"]


def test_what_is_refused(compiled: Path, images: ray.EmbedImages) -> None:
    with pytest.raises(UsageError, match="did you mean 'bytes'"):
        ray.EmbedImages(compiled, column="byte")({"bytes": PICTURES})
    with pytest.raises(UsageError, match="rename it"):
        images({"bytes": PICTURES, "error": [""] * 4})
    with pytest.raises(UsageError, match="expected a batch of columns"):
        images(PICTURES)
    with pytest.raises(UsageError, match="mode"):
        ray.EmbedImages(compiled, mode="x")
    with pytest.raises(InternVLError):
        ray.EmbedImages(compiled / "nothing")


def test_an_actor_gives_the_rows_of_one_process(
    compiled: Path, model: Model, tmp_path: Path
) -> None:
    """Bit for bit: pieces are cut into the same batches."""
    source = open_source([write_folder(tmp_path / "pictures", 21, broken=(4,))])
    how = How(batch_size=4)
    run.embed(source, model, tmp_path / "a.parquet", how, threads=1)
    rows = Rows(str(compiled), Content.FILES, how, 1, "cpu", recipe={"a": 1})
    (piece,) = source.pieces
    blocks = cluster._blocks(pickle.loads(pickle.dumps(piece)))
    found = pa.concat_tables([rows(block) for block in blocks])
    assert found.schema.metadata == {b"internvl_edge.recipe": b'{"a": 1}'}
    expected = pq.read_table(tmp_path / "a.parquet")
    assert found.equals(expected)
    assert found.schema.remove_metadata() == expected.schema.remove_metadata()


def test_rows_that_are_missing_or_there_twice_are_found(tmp_path: Path) -> None:
    table = pa.table({"path": ["a", "b"], "error": pa.array([None, "no"], pa.string())})
    pq.write_table(table, tmp_path / "1.parquet")
    assert cluster._checked(tmp_path, 2) == (2, 1)
    with pytest.raises(InternVLError, match="3 rows are missing"):
        cluster._checked(tmp_path, 5)
    pq.write_table(table.slice(1), tmp_path / "2.parquet")
    with pytest.raises(InternVLError, match="1 rows are there twice"):
        cluster._checked(tmp_path, 2)
    assert cluster._checked(tmp_path / "nothing", None) == (0, 0)


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="Ray is installed")
def test_without_ray_it_says_what_to_install(compiled: Path, tmp_path: Path) -> None:
    source = open_source([write_folder(tmp_path / "pictures", 1)])
    for call in (
        lambda: ray.embed(source, compiled, tmp_path / "a.parquet"),
        lambda: ray.deployment(compiled),
        lambda: ray.connected().__enter__(),
    ):
        with pytest.raises(MissingDependency, match=r"internvl-edge\[ray\]"):
            call()


# --- a replica of Ray Serve, as the application that it is ----------------------------------------


async def _asked(served: Served) -> list[dict[str, Any]]:
    """Begin, ask for the models, and end, with what Ray Serve begins and ends an application by."""
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async def nothing() -> dict[str, Any]:
        return {"type": "http.request", "body": b""}

    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "GET",
        "path": "/v1/models",
        "query_string": b"",
        "headers": [(b"host", b"127.0.0.1")],
    }
    life = LifespanOn(uvicorn.Config(served, lifespan="on", log_config=None, access_log=False))
    await life.startup()
    assert not life.should_exit
    await served(scope, nothing, send)
    await life.shutdown()
    assert not life.should_exit
    return sent


@pytest.mark.slow
def test_a_replica_answers_and_ends(compiled: Path) -> None:
    served = Served("tiny", str(compiled), {"num_threads": 1})
    served.check_health()
    head, body = asyncio.run(_asked(served))
    assert head["status"] == 200
    assert b'"tiny"' in body["body"]
    served._service.state = "dead"
    with pytest.raises(InternVLError, match="a new replica"):
        served.check_health()
