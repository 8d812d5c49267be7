"""The kernels that TensorRT-RTX compiled, kept beside the engine."""

from __future__ import annotations

import hashlib
import stat
from pathlib import Path

import pytest
from support.gpu.fake_cuda import ILLEGAL_ADDRESS
from support.gpu.trt_bench import Bench, assert_same, feeds_of

from internvl_edge.errors import SessionDead, UsageError


def cache_of(bench: Bench) -> Path:
    return bench.plan.with_name(f"{bench.plan.name}.SM89.cache")


@pytest.fixture
def rtx(tmp_path: Path) -> Bench:
    return Bench(tmp_path, "tensorrt-rtx")


def test_compiled_kernels_are_kept_and_read_again(rtx: Bench) -> None:
    rtx.open().close()
    data = cache_of(rtx).read_bytes()
    assert data == hashlib.sha256(b"kernels").digest() + b"kernels"
    assert stat.S_IMODE(cache_of(rtx).stat().st_mode) == 0o600
    before = cache_of(rtx).stat().st_mtime_ns
    with rtx.open(slots=2):
        assert rtx.trt.caches[-1].loaded == b"kernels"
        assert len({id(context.config.cache) for context in rtx.trt.contexts[-2:]}) == 1
    assert cache_of(rtx).stat().st_mtime_ns == before  # nothing new
    rtx.trt.cache = b"kernels and more"
    rtx.open().close()
    assert cache_of(rtx).read_bytes().endswith(b"kernels and more")


def test_kernels_are_kept_once_the_engine_is_open(rtx: Bench) -> None:
    """A server may be killed."""
    with rtx.open():
        assert cache_of(rtx).read_bytes().endswith(b"kernels")


def test_a_gpu_that_failed_keeps_no_kernels(rtx: Bench) -> None:
    session = rtx.open()
    rtx.trt.cache = b"kernels of a broken context"
    rtx.cuda.fail["cudaStreamSynchronize"] = 0, ILLEGAL_ADDRESS
    with pytest.raises(SessionDead):
        session.run(feeds_of(2, 2))
    session.close()
    assert cache_of(rtx).read_bytes().endswith(b"kernels")


def test_a_cache_that_is_not_taken_is_no_error(
    rtx: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    rtx.trt.refuses["set_runtime_cache"] = "no"
    with caplog.at_level("INFO"), rtx.open() as session:
        assert_same(session.run(feeds_of(1, 1)), feeds_of(1, 1))
    assert "each context compiles its own kernels" in caplog.text


@pytest.mark.parametrize("data", [b"", b"x" * 40, hashlib.sha256(b"k").digest() + b"kernels"])
def test_a_broken_cache_reaches_no_parser(rtx: Bench, data: bytes) -> None:
    cache_of(rtx).write_bytes(data)
    rtx.open().close()
    assert rtx.trt.caches[0].loaded is None
    assert cache_of(rtx).read_bytes().endswith(b"kernels")


def test_a_cache_that_others_may_write_reaches_no_parser(rtx: Bench) -> None:
    rtx.open().close()
    cache_of(rtx).chmod(0o666)
    rtx.open().close()
    assert rtx.trt.caches[-1].loaded is None


def test_a_cache_of_another_gpu_is_ignored(rtx: Bench) -> None:
    data = b"of another driver"
    cache_of(rtx).write_bytes(hashlib.sha256(data).digest() + data)
    cache_of(rtx).chmod(0o600)
    with rtx.open() as session:
        assert_same(session.run(feeds_of(1, 1)), feeds_of(1, 1))
    assert cache_of(rtx).read_bytes().endswith(b"kernels")


def test_a_directory_that_cannot_be_written_is_no_error(
    rtx: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, data: bytes) -> None:
        raise UsageError(f"{path}: read-only")

    monkeypatch.setattr("internvl_edge.runtime.trt.engine.write_atomically", refuse)
    rtx.open().close()
    assert not cache_of(rtx).exists()
