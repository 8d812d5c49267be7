"""Rows by Ray's actors: those of one process, each once, whatever is killed on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.runs.bulk import LATE, STARTS, picture, write_folder, write_shard, write_table

import internvl_edge
from internvl_edge.errors import MediaError, UsageError
from internvl_edge.integrations import ray
from internvl_edge.integrations.bulk import run
from internvl_edge.integrations.bulk.job import How
from internvl_edge.integrations.bulk.sources.opening import open_source
from internvl_edge.integrations.bulk.staging import staging_of
from internvl_edge.runtime.model import Model

# Ray warns of itself
pytestmark = pytest.mark.filterwarnings("default")
COUNT = int(os.environ.get("RAY_PICTURES", "2000"))
BROKEN = (7, 567)
HOW = How(batch_size=8)


@pytest.fixture(scope="module")
def model(compiled: Path) -> Iterator[Model]:
    options = internvl_edge.OrtOptions(num_threads=1)
    with internvl_edge.load(compiled, options=options) as opened:
        yield opened


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("cluster") / "pictures", COUNT, broken=BROKEN)


@pytest.fixture(scope="module")
def whole(folder: Path, model: Model) -> pa.Table:
    """The rows of one process."""
    dest = folder.parent / "whole.parquet"
    done = run.embed(open_source([folder]), model, dest, HOW)
    assert (done.rows, done.errors) == (COUNT, len(BROKEN))
    return pq.read_table(dest)


def rows_of(dest: Path) -> pa.Table:
    return pq.read_table(dest).sort_by("path")


def close(found: pa.Table, expected: pa.Table) -> bool:
    """Tell whether tables agree up to what INT8 on a CPU makes of other batches."""
    same = found.drop_columns(["embedding"]).equals(expected.drop_columns(["embedding"]))
    both = (found.column("embedding").to_pylist(), expected.column("embedding").to_pylist())
    return same and all(
        (a is None) == (b is None) and (a is None or np.allclose(a, b, atol=0.05))
        for a, b in zip(*both, strict=True)
    )


# --- in a cluster that lives ---------------------------------------------------------------------


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("kind", ["pictures", "a.parquet", "a.tar"])
def test_rows_and_schema_are_those_of_one_process(
    compiled: Path, model: Model, tmp_path: Path, kind: str
) -> None:
    write_folder(tmp_path / "pictures", 200, broken=(3,))
    write_table(tmp_path / "a.parquet", 200, group=50)
    write_shard(tmp_path / "a.tar", [{"png": picture(i), "txt": b"%d" % i} for i in range(200)])
    source = open_source([tmp_path / kind])
    run.embed(source, model, tmp_path / "one.parquet", HOW)
    done = ray.embed(source, compiled, tmp_path / "ray.parquet", HOW, actors=2)
    assert (done.rows, done.errors) == (200, int(kind == "pictures"))
    one, many = rows_of(tmp_path / "one.parquet"), rows_of(tmp_path / "ray.parquet")
    assert many.schema.remove_metadata() == one.schema.remove_metadata()
    assert many.equals(one)  # bit for bit: the batches are the same
    assert not staging_of(tmp_path / "ray.parquet").exists()
    with pytest.raises(UsageError, match="exists; pass --force"):
        ray.embed(source, compiled, tmp_path / "ray.parquet", HOW)
    again = ray.embed(source, compiled, tmp_path / "ray.parquet", HOW, resume=True)
    assert again.kept_rows == 200
    with pytest.raises(UsageError, match="another normalize"):
        ray.embed(source, compiled, tmp_path / "ray.parquet", How(normalize=True), resume=True)


@pytest.mark.usefixtures("cluster")
def test_texts(compiled: Path, model: Model, tmp_path: Path) -> None:
    write_table(tmp_path / "a.parquet", 40)
    source = open_source([tmp_path / "a.parquet"], column="caption", keep=["id"])
    run.embed(source, model, tmp_path / "one.parquet", HOW)
    ray.embed(source, compiled, tmp_path / "ray.parquet", HOW, actors=1, force=True)
    assert rows_of(tmp_path / "ray.parquet").equals(rows_of(tmp_path / "one.parquet"))


@pytest.mark.usefixtures("cluster")
def test_none_that_can_be_embedded(compiled: Path, tmp_path: Path) -> None:
    source = open_source([write_folder(tmp_path / "pictures", 3, broken=(0, 1, 2))])
    with pytest.raises(MediaError, match="none of 3 rows"):
        ray.embed(source, compiled, tmp_path / "a.parquet", actors=1)
    assert [path.name for path in tmp_path.iterdir()] == ["pictures"]


@pytest.mark.usefixtures("cluster")
def test_a_dataset_of_one_s_own(compiled: Path, model: Model) -> None:
    """As the documentation shows it."""
    import ray as cluster

    data = cluster.data.from_items([{"id": i, "bytes": picture(i)} for i in range(20)])
    embedded = data.map_batches(
        ray.EmbedImages,
        fn_constructor_kwargs={"out": str(compiled)},
        compute=cluster.data.ActorPoolStrategy(size=1),
        num_cpus=1,
    )
    rows = sorted(embedded.take_all(), key=lambda row: row["id"])
    expected = model.encode_image([picture(i) for i in range(20)])
    assert np.allclose(np.array([row["embedding"] for row in rows]), expected, atol=0.05)
    assert all(row["error"] is None for row in rows)


# --- killed --------------------------------------------------------------------------------------


def command(folder: Path, compiled: Path, dest: Path) -> list[Any]:
    places = [folder, compiled, "-o", dest, "--ray", "--actors", "2", "--batch-size", "8"]
    options = ["--resume", "--skip-errors", "--json"]
    return [sys.executable, "-m", "internvl_edge", "embed", *places, *options]


def workers(mark: str, above: int) -> list[int]:
    """Processes of Ray below another one, by a word in their titles."""
    found = []
    for place in Path("/proc").iterdir():
        if place.name.isdigit():
            try:
                title = (place / "cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")
            except OSError:
                continue
            if title.startswith("ray::") and mark in title and is_below(int(place.name), above):
                found.append(int(place.name))
    return sorted(found)


def is_below(process: int, above: int) -> bool:
    while process > 1:
        if process == above:
            return True
        try:
            fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return False
        process = int(fields[1])
    return False


def begun(
    what: list[Any], reached: Callable[[], Any], log: Path, seconds: float = 300
) -> subprocess.Popen[bytes]:
    """Start a command and wait until it has come somewhere, or has ended; see ``LATE``."""
    for _ in range(STARTS):
        with log.open("wb") as errors:
            process = subprocess.Popen(what, stdout=subprocess.PIPE, stderr=errors)
        waited_for(lambda: reached() or process.poll() is not None, "rows", seconds)  # noqa: B023
        if not process.poll() or LATE not in log.read_text():
            break
    return process


def waited_for(reached: Callable[[], Any], what: str, seconds: float = 180) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := reached()):
        assert time.monotonic() < deadline, what
        time.sleep(0.05)
    return found


def written(dest: Path) -> int:
    return len(list((staging_of(dest) / "rows").glob("*.parquet")))


def test_an_actor_is_killed(folder: Path, compiled: Path, whole: pa.Table, tmp_path: Path) -> None:
    dest = tmp_path / "a.parquet"
    log = tmp_path / "log"
    process = begun(command(folder, compiled, dest), lambda: written(dest), log)
    actors = workers("Rows", process.pid)
    assert actors, log.read_text()
    os.kill(actors[0], signal.SIGKILL)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, log.read_text()
    assert json.loads(out.splitlines()[-1])["rows"] == COUNT
    assert close(rows_of(dest), whole)


def test_the_driver_is_killed_and_resumed(
    folder: Path, compiled: Path, whole: pa.Table, tmp_path: Path
) -> None:
    dest = tmp_path / "a.parquet"
    log = tmp_path / "log"
    process = begun(command(folder, compiled, dest), lambda: written(dest) >= 2, log)
    assert process.poll() is None, log.read_text()
    process.kill()
    process.communicate()
    assert not dest.exists()
    assert written(dest) > 0
    # its Ray ends by itself; a worker that still writes does so under a name that is known
    process = begun(command(folder, compiled, dest), lambda: False, log, 600)
    out, _ = process.communicate()
    assert process.returncode == 0, log.read_text()
    result = json.loads(out.splitlines()[-1])
    assert result["rows"] == COUNT
    assert 0 < result["kept_rows"] < COUNT
    assert close(rows_of(dest), whole)
    assert not staging_of(dest).exists()


# --- served --------------------------------------------------------------------------------------


def asked(url: str, data: bytes) -> tuple[int, Any]:
    spelled = "data:image/png;base64," + b64encode(data).decode()
    body = json.dumps({"input": spelled, "modality": "image"}).encode()
    request = urllib.request.Request(
        f"{url}/v1/embeddings", body, {"content-type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, error.read()
    except OSError as error:
        return 0, str(error)


def test_a_deployment_takes_the_key_of_its_replicas(compiled: Path) -> None:
    actors = {"runtime_env": {"env_vars": {"INTERNVL_EDGE_API_KEY": "k" * 40}}}
    outside = {"host": "0.0.0.0"}
    served = ray.deployment(compiled, serving=outside, ray_actor_options=actors)
    assert served.ray_actor_options["runtime_env"] == actors["runtime_env"]
    with pytest.raises(UsageError, match="INTERNVL_EDGE_API_KEY"):
        ray.deployment(compiled, serving=outside)


@pytest.mark.usefixtures("cluster")
def test_a_replica_is_killed_under_load(compiled: Path, model: Model) -> None:
    from ray import serve

    pictures = [picture(i) for i in range(16)]
    right = model.encode_image(pictures, normalize=True)
    port = 8123
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    served = ray.deployment(
        compiled,
        name="demo",
        num_replicas=2,
        max_ongoing_requests=16,
        ray_actor_options={"num_cpus": 0.5},
        health_check_period_s=1,
    )
    serve.run(served.bind(), route_prefix="/")
    url = f"http://127.0.0.1:{port}"
    statuses: Counter[int] = Counter()
    wrong: list[float] = []
    stop = threading.Event()

    def client(first: int) -> None:
        at = first
        while not stop.is_set():
            at = (at + 1) % len(pictures)
            status, answer = asked(url, pictures[at])
            statuses[status] += 1
            if status == 200:
                vector = np.array(answer["data"][0]["embedding"])
                if not np.allclose(vector, right[at], atol=0.01):
                    wrong.append(float(np.abs(vector - right[at]).max()))

    try:
        with urllib.request.urlopen(f"{url}/v1/models", timeout=30) as answer:
            assert json.loads(answer.read())["data"][0]["id"] == "demo"
        assert asked(url, b"no picture")[0] == 400
        clients = [threading.Thread(target=client, args=(i,)) for i in range(8)]
        for one in clients:
            one.start()
        time.sleep(3)
        before = workers("ServeReplica", os.getpid())
        assert len(before) == 2
        os.kill(before[0], signal.SIGKILL)
        known = set(before)
        waited_for(
            lambda: set(workers("ServeReplica", os.getpid())) - known, "a replica in its place"
        )
        waited_for(
            lambda: (
                serve.status().applications["default"].status == "RUNNING"
                and len(workers("ServeReplica", os.getpid())) == 2
            ),
            "both replicas",
        )
        stop.set()
        for one in clients:
            one.join()
    finally:
        stop.set()
        serve.shutdown()
    assert not wrong
    assert statuses[200] > 100
    failed = sum(statuses.values()) - statuses[200]
    assert failed <= 16, statuses  # its requests under way, and nothing else
    print(f"answers: {dict(statuses)}")
