"""What Ray's actors compute, without Ray: batches of every form, and the rows of a source."""

from __future__ import annotations

import asyncio
import importlib.util
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
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
from internvl_edge.integrations.bulk.rows import Embedder, embedding_type
from internvl_edge.integrations.bulk.sources.opening import open_source
from internvl_edge.integrations.bulk.sources.source import Content, Source
from internvl_edge.integrations.bulk.staging import staging_of, with_recipe
from internvl_edge.integrations.ray import cluster
from internvl_edge.integrations.ray.batches import Rows
from internvl_edge.integrations.ray.serving import Served
from internvl_edge.runtime.model import Model
from internvl_edge.serve.options import KEY_VARIABLE

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
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    ids = pa.chunked_array([], pa.int64())
    expected = images({"bytes": PICTURES[:1], "id": [1]}).schema
    for column in (pa.array([], pa.binary()), pa.chunked_array([], kind), pa.array([], "double")):
        table = images(pa.table({"bytes": column, "id": ids}))
        assert table.schema.equals(expected)
        assert len(table) == 0


def test_rows_that_are_missing(images: ray.EmbedImages) -> None:
    for column in ([None, None], pa.nulls(2, pa.string())):
        table = images(
            {"bytes": column} if isinstance(column, list) else pa.table([column], ["bytes"])
        )
        assert table.column("error").to_pylist() == ["expected a picture, found none"] * 2


def test_texts(compiled: Path, model: Model) -> None:
    texts = ray.EmbedTexts(compiled, column="caption", normalize=True)
    table = texts({"caption": np.array(["a red zero", "  ", "a blue one"])})
    rows = table.column("embedding").to_pylist()
    expected = model.encode_text(["a red zero", "a blue one"], normalize=True)
    np.testing.assert_allclose(np.array([rows[0], rows[2]]), expected, atol=1e-5)
    assert rows[1] is None
    assert table.column_names == ["embedding", "error"]


def frame(names: list[str]) -> Any:
    """A stand-in for a frame of pandas: what is looked at before pandas converts it."""
    return SimpleNamespace(columns=names, iloc=None)


def test_what_is_refused(compiled: Path, images: ray.EmbedImages) -> None:
    with pytest.raises(UsageError, match="did you mean 'bytes'"):
        ray.EmbedImages(compiled, column="byte")({"bytes": PICTURES})
    for name in ("error", "embedding", "__content__", "__problem__"):
        with pytest.raises(UsageError, match=f"{name} of its own.*rename it"):
            images({"bytes": PICTURES, name: [""] * 4})
    for twice in (["id", "bytes", "id"], ["bytes", "bytes", "id"]):
        columns = [pa.array(PICTURES)] * 3
        for batch in (pa.table(columns, twice), frame(twice)):
            with pytest.raises(UsageError, match=r"more than one column (id|bytes); rename"):
                images(batch)
    with pytest.raises(UsageError, match="expected a batch of columns"):
        images(PICTURES)
    with pytest.raises(UsageError, match="mode"):
        ray.EmbedImages(compiled, mode="x")
    with pytest.raises(InternVLError):
        ray.EmbedImages(compiled / "nothing")


@pytest.mark.parametrize(
    "column",
    [
        pa.array(["/etc/hostname"]),
        pa.array(["data:image/png;base64,aGk="]),
        pa.array([{"path": "/etc/hostname"}]),
        pa.array([{"path": "/etc/hostname", "other": b"a"}]),
        pa.array([1]),
    ],
    ids=lambda column: str(column.type),
)
def test_only_bytes_are_pictures(images: ray.EmbedImages, column: Any) -> None:
    """A string of a dataset opens no file of the machine."""
    with pytest.raises(UsageError, match="column bytes: expected bytes"):
        images(pa.table({"bytes": column}))


def test_only_texts_are_texts(compiled: Path) -> None:
    texts = ray.EmbedTexts(compiled)
    with pytest.raises(UsageError, match="column text: expected texts, found binary"):
        texts({"text": [b"a"]})
    coded = pa.table({"text": pa.array(["a", "a"]).dictionary_encode()})
    assert texts(coded).column("error").null_count == 2


def test_an_embedder_opens_only_files_of_a_source(model: Model, tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(PICTURES[0])
    of_tables = Embedder(model.components, Content.PICTURES, How())
    _, errors = of_tables([PICTURES[0], str(file), file])
    assert [error is None for error in errors] == [True, False, False]
    assert str(errors[1]).endswith("found str")
    of_files = Embedder(model.components, Content.FILES, How())
    _, errors = of_files([file, str(file), PICTURES[0]])
    assert [error is None for error in errors] == [True, False, False]


def test_an_actor_is_told_to_allow_what_is_slow(
    compiled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}
    load = internvl_edge.load

    def noted(out: str, **how: Any) -> Model:
        seen.update(how)
        return load(out, **how)

    monkeypatch.setattr(internvl_edge, "load", noted)
    Rows(str(compiled), Content.FILES, How(), 1, "cpu", allow_slow=True)
    assert seen["options"].allow_slow
    for embed in (ray.EmbedImages, ray.EmbedTexts):
        for allowed in (True, False):
            embed(compiled, allow_slow=allowed)
            assert seen["options"].allow_slow is allowed


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


def test_a_folder_that_another_run_wrote_stays(tmp_path: Path) -> None:
    rows, dest = tmp_path / "rows", tmp_path / "a.parquet"
    for folder, text in ((rows, "new"), (dest, "old")):
        folder.mkdir()
        (folder / "1").write_text(text)
    with pytest.raises(UsageError, match="written by another run meanwhile"):
        cluster._publish(rows, dest, force=False)
    assert ((rows / "1").read_text(), (dest / "1").read_text()) == ("new", "old")
    cluster._publish(rows, dest, force=True)
    assert ((rows / "1").read_text(), (dest / "1").read_text()) == ("old", "new")
    cluster._publish(rows, tmp_path / "b.parquet", force=True)
    assert (tmp_path / "b.parquet" / "1").read_text() == "old"


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


def test_the_key_of_replicas_is_theirs(compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looked for in what the deployment gives them, then here."""

    def same(**_: Any) -> Any:
        return lambda replica: replica

    stand_in = SimpleNamespace(serve=SimpleNamespace(deployment=same, ingress=same))
    monkeypatch.setitem(sys.modules, "ray", stand_in)
    monkeypatch.setattr("internvl_edge.integrations.ray.serving.require", lambda *_: None)
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    outside = {"host": "0.0.0.0"}

    def actors(key: str) -> dict[str, Any]:
        return {"num_cpus": 1, "runtime_env": {"env_vars": {KEY_VARIABLE: key}}}

    ray.deployment(compiled, serving=outside, ray_actor_options=actors("k" * 40))
    with pytest.raises(UsageError, match="key 1 has 5 characters"):
        ray.deployment(compiled, serving=outside, ray_actor_options=actors("short"))
    for nothing in (None, {"num_cpus": 1}, {"runtime_env": None}):
        with pytest.raises(UsageError, match=KEY_VARIABLE):
            ray.deployment(compiled, serving=outside, ray_actor_options=nothing)
    monkeypatch.setenv(KEY_VARIABLE, "k" * 40)
    ray.deployment(compiled, serving=outside)


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
