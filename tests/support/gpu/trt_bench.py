"""A compiled directory on a stand-in GPU and TensorRT, its feeds, and what comes out."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from support.artifacts import file_record, manifest_of
from support.gpu.fake_cuda import FakeCuda
from support.gpu.fake_engine import KEY, LINEAR, Computation, FakeRuntimeTrt, expected

from internvl_edge.artifact.manifest import ComponentRecord, EngineRecord
from internvl_edge.artifact.open import Artifact
from internvl_edge.artifact.sidecar import EngineInfo, ShapeRanges
from internvl_edge.runtime.generation.batch import Generation, Prompt
from internvl_edge.runtime.generation.cache import DeviceDecoding, HostDecoding, empty_cache, start
from internvl_edge.runtime.generation.loop import generate
from internvl_edge.runtime.gpu.device_array import DeviceArray
from internvl_edge.runtime.trt.options import TrtOptions
from internvl_edge.runtime.trt.session import TrtSession, open_component
from internvl_edge.types import Array

RESULT_SHAPES = {"y": (2, 3), "part": (2, 3)}  # of 2 rows and 3 ids
TARGETS = {"tensorrt": "11.4.0.106", "tensorrt-rtx": "1.7.1.116"}
Arrays = dict[str, Array]


class Bench:
    """A directory with an engine, a GPU and a TensorRT."""

    def __init__(
        self, path: Path, target: str = "tensorrt", computation: Computation = LINEAR, **cuda: Any
    ) -> None:
        self.target, self.data = target, computation.plan
        self.cuda = FakeCuda(**cuda)
        self.trt = FakeRuntimeTrt(self.cuda, target.replace("-", "_"), TARGETS[target], computation)
        inputs, outputs = computation.inputs, computation.outputs
        name = f"engines/vision.{target}-1a2b3c4d"
        self.files = {f"{name}.plan": self.data, f"{name}.json": b"{}"}
        self.path, self.plan = path, path / f"{name}.plan"
        self.info = EngineInfo(
            component="vision",
            target=target,
            precision="fp16",
            builder_version=TARGETS[target],
            tool_version="0",
            compute_capabilities=(),
            minimum_sm=80,
            profile=ShapeRanges(),
            onnx_sha256="0" * 64,
            nbytes=len(self.data),
            sha256=hashlib.sha256(self.data).hexdigest(),
            fused_attention=0,
            decomposed_attention=0,
            build_seconds=1.0,
            inputs=inputs,
            outputs=outputs,
        )
        record = ComponentRecord(
            file="vision.onnx", inputs=inputs, outputs=outputs, nbytes=0, verification=None
        )
        engine = EngineRecord(
            component="vision", target=target, file=f"{name}.plan", sidecar=f"{name}.json"
        )
        self.manifest = manifest_of(self.files, engines=(engine,), components={"vision": record})
        self.write()

    def write(self) -> None:
        self.plan.parent.mkdir(exist_ok=True)
        self.plan.write_bytes(self.data)
        sidecar = json.dumps(self.info.to_json()).encode()
        self.plan.with_suffix(".json").write_bytes(sidecar)
        self.manifest.files[f"engines/{self.plan.stem}.json"] = file_record(sidecar)

    def open(self, device: str = "cuda", **options: Any) -> TrtSession:
        return open_component(
            Artifact(path=self.path, manifest=self.manifest),
            "vision",
            device,
            self.target,
            options=TrtOptions(**options),
            trt=self.trt,
            cudart=self.cuda,
        )

    def on_gpu(self, array: Array, offset: int = 0, **changed: Any) -> Any:
        """An array of another library, by ``__cuda_array_interface__``."""
        data = array.tobytes()
        address = self.cuda.cudaMalloc(len(data) + offset)[1] + offset
        self.cuda.bytes_at(address, len(data))[:] = np.frombuffer(data, np.uint8)
        told = {
            "shape": array.shape,
            "typestr": array.dtype.str,
            "data": (address, False),
            "version": 3,
        }
        return SimpleNamespace(__cuda_array_interface__=told | changed)

    def owned(self, session: TrtSession, name: str, array: Array) -> DeviceArray:
        """An array of the session's, with these values."""
        owned = session.empty(name, array.shape)
        data = np.frombuffer(array.tobytes(), np.uint8)
        self.cuda.bytes_at(owned.pointer, len(data))[:] = data
        return owned

    def fetch(self, array: DeviceArray) -> Array:
        """What the GPU holds once the array's stream got there."""
        if array.stream is not None:
            self.cuda.cudaStreamSynchronize(array.stream)
        data = self.cuda.bytes_at(array.pointer, array.nbytes).copy()
        return data.view(array.dtype).reshape(array.shape)


def feeds_of(batch: int, length: int, seed: int = 0) -> Arrays:
    rng = np.random.default_rng(seed)
    return {
        "x": rng.standard_normal((batch, 4)).astype(np.float32),
        "ids": rng.integers(0, 100, (batch, length)),
    }


def assert_same(found: Arrays, feeds: Arrays) -> None:
    wanted = expected(feeds)
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def wrong_values() -> Arrays:
    return feeds_of(3, 2) | {"x": np.full((3, 4), np.nan, np.float32)}


def on_gpu_and_on_host(bench: Bench, num_beams: int) -> tuple[Any, Any]:
    """The ids of three prompts with the cache on the GPU, and with it handed through the host."""
    prompt = Prompt(rows=[[3, 1, 4], [5, 2], [3]])
    how = Generation(max_new_tokens=20, num_beams=num_beams, stop_ids=(2,))
    with bench.open() as session:
        cache = empty_cache(session, rows=3)
        on_gpu = start(session, cache)
        assert isinstance(on_gpu, DeviceDecoding)
        found = generate(on_gpu, prompt, how)
        past = {KEY: next(iter(cache.values()))}
        return found, generate(HostDecoding(session, past), prompt, how)
