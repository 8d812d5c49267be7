"""A stand-in for the TensorRT modules: the calls that the engine builder makes, nothing more.

Like the real one it hands out plain layers, loses what callbacks raise, and reports success after
a writer failed. A test scripts it by replacing ``parse`` and ``build``.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

DataType = enum.Enum("DataType", "FLOAT HALF BF16 INT64 INT32 FP4")
LayerType = enum.Enum("LayerType", "CAST ATTENTION_INPUT QUANTIZE SOFTMAX")
Severity = enum.Enum("Severity", "INTERNAL_ERROR ERROR WARNING INFO VERBOSE")
ComputeCapability = enum.Enum("ComputeCapability", "NONE CURRENT SM75 SM80 SM86 SM89 SM120")
Flag = enum.IntEnum("Flag", {"STRONGLY_TYPED": 1})


class _Base:
    def __init__(self) -> None:
        self.initialised = True  # pybind11 refuses an object whose base was not


class ILogger(_Base):
    pass


class IStreamWriter(_Base):
    pass


class IProgressMonitor(_Base):
    pass


def tensor(name: str, dtype: DataType, *shape: int) -> Any:
    return SimpleNamespace(name=name, dtype=dtype, shape=shape)


class Layer:
    """A layer as the bindings return it: what only attention has is out of reach."""

    def __init__(self, kind: LayerType, query: Any = None, name: str = "") -> None:
        self.type, self._query, self.name = kind, query, name

    def get_input(self, index: int) -> Any:
        return self._query


def parser_error(
    description: str, operator: str = "MatMul", node: str = "fc/MatMul", code: str = "INVALID_NODE"
) -> Any:
    values = {"desc": description, "node_operator": operator, "node_name": node, "node": 3}
    error = SimpleNamespace(code=lambda: f"ErrorCode.{code}")
    for name, value in values.items():
        setattr(error, name, lambda value=value: value)
    return error


class FakeTrt:
    """One module, and what was asked of it."""

    def __init__(self, name: str = "tensorrt_rtx", version: str = "1.7.1.116") -> None:
        self.__name__, self.__version__ = name, version
        self.ILogger, self.IStreamWriter = ILogger, IStreamWriter
        self.IProgressMonitor = IProgressMonitor
        self.ProfilingVerbosity = SimpleNamespace(DETAILED="detailed")
        self.LayerType, self.ComputeCapability = LayerType, ComputeCapability
        self.NetworkDefinitionCreationFlag = Flag
        self.BuilderFlag = SimpleNamespace(TF32="TF32")
        self.inputs = [tensor("x", DataType.FLOAT, -1, 17, 64)]
        self.outputs = [tensor("y", DataType.FLOAT, -1, 64)]
        self.layers: list[Layer] = [Layer(LayerType.CAST)]
        self.errors: list[Any] = []  # of the parser
        self.starts = True  # whether there is a builder
        self.accepts_capability = True
        self.build: Callable[..., bool] = lambda writer, log, monitor: writer.write(b"plan") > 0
        self.parse: Callable[[str], Any] = lambda path: None
        self.network_flags = 0
        self.cleared: list[str] = []
        self.shapes: dict[str, Any] = {}
        self.capabilities: dict[int, Any] = {}
        self.num_builds = 0
        self.parsed: list[bytes] = []  # graphs that were not read from their file
        self.listed = ""  # what the builder says of an engine's layers

    def Builder(self, logger: Any) -> Any:  # noqa: N802
        assert logger.initialised
        if not self.starts:
            logger.log(Severity.ERROR, "CUDA initialization failure with error: 35")
            raise TypeError("factory function returned nullptr")
        return SimpleNamespace(
            create_network=self._network,
            create_builder_config=self._config,
            create_optimization_profile=lambda: SimpleNamespace(set_shape=self._set_shape),
            build_serialized_network_to_stream=lambda network, config, writer: self._build(
                config, writer, logger
            ),
        )

    def OnnxParser(self, network: Any, logger: Any) -> Any:  # noqa: N802
        return SimpleNamespace(
            parse_from_file=lambda path: self._parse(path),
            parse=lambda model, path: self._parse(path, model),
            num_errors=len(self.errors),
            get_error=lambda index: self.errors[index],
        )

    def _parse(self, path: str, model: bytes | None = None) -> bool:
        self.parse(path)
        self.parsed += [] if model is None else [model]
        return not self.errors

    def _network(self, flags: int) -> Any:
        self.network_flags = flags
        return SimpleNamespace(
            num_inputs=len(self.inputs),
            num_outputs=len(self.outputs),
            num_layers=len(self.layers),
            get_input=lambda index: self.inputs[index],
            get_output=lambda index: self.outputs[index],
            get_layer=lambda index: self.layers[index],
        )

    def _config(self) -> Any:
        return SimpleNamespace(
            clear_flag=self.cleared.append,
            set_compute_capability=self._set_capability,
            add_optimization_profile=lambda profile: 0,
        )

    def _set_capability(self, capability: Any, index: int) -> bool:
        self.capabilities[index] = capability.name
        return self.accepts_capability

    def _set_shape(self, name: str, low: Any, typical: Any, high: Any) -> None:
        self.shapes[name] = (low, typical, high)

    def _build(self, config: Any, writer: Any, logger: Any) -> bool:
        assert writer.initialised
        assert config.progress_monitor.initialised
        self.num_builds += 1
        if config.profiling_verbosity == "detailed" and self.listed:
            logger.log(Severity.VERBOSE, self.listed)
        return self.build(
            writer, lambda text: logger.log(Severity.ERROR, text), config.progress_monitor
        )
