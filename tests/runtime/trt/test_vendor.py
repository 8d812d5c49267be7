from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest

from internvl_edge.errors import HardwareError, MissingDependency
from internvl_edge.runtime.feeds import numpy_dtype
from internvl_edge.runtime.trt import vendor
from internvl_edge.runtime.trt.vendor import MAX_ERRORS, NativeLog, import_tensorrt


def test_dtypes_by_name() -> None:
    assert numpy_dtype("float16") == np.float16
    ml_dtypes = pytest.importorskip("ml_dtypes")
    assert numpy_dtype("bfloat16") == ml_dtypes.bfloat16
    assert numpy_dtype("float8_e4m3fn").name == "float8_e4m3fn"


def refuse(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def import_module(name: str) -> Any:
        raise error

    monkeypatch.setattr(vendor.importlib, "import_module", import_module)


def test_bfloat16_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, ModuleNotFoundError("ml_dtypes"))
    with pytest.raises(MissingDependency, match="ml-dtypes is not installed"):
        numpy_dtype("float4_no_such")


def test_a_backend_that_is_missing_or_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, ModuleNotFoundError("tensorrt"))
    with pytest.raises(MissingDependency, match=r"internvl-edge\[trt\]"):
        import_tensorrt("tensorrt")
    refuse(monkeypatch, ImportError("libnvinfer.so"))
    with pytest.raises(HardwareError, match="does not load: libnvinfer"):
        import_tensorrt("tensorrt-rtx")


def test_a_backend_that_is_there() -> None:
    pytest.importorskip("tensorrt_rtx")
    assert import_tensorrt("tensorrt-rtx") is importlib.import_module("tensorrt_rtx")


def test_a_log_of_days_stays_small() -> None:
    log = NativeLog()
    severity = type("Severity", (), {"name": "ERROR"})
    for number in range(10 * MAX_ERRORS):
        log.log(severity, f"line {number}")
    assert len(log.errors) == MAX_ERRORS
    assert log.mentions("line 639")
    assert not log.mentions("line 1\n")


@pytest.mark.rtx
def test_the_installed_release_has_what_sessions_call() -> None:
    """Every name that the session uses, in the real module; the fakes have them too."""
    trt = pytest.importorskip("tensorrt_rtx")
    for owner, names in {
        trt.ICudaEngine: (
            "create_execution_context create_runtime_config device_memory_size_v2 get_tensor_dtype "
            "get_tensor_location get_tensor_mode get_tensor_name get_tensor_profile_shape "
            "num_io_tensors num_optimization_profiles"
        ),
        trt.IExecutionContext: (
            "active_optimization_profile execute_async_v3 get_tensor_shape set_device_memory "
            "set_input_shape set_optimization_profile_async set_tensor_address"
        ),
        trt.IRuntimeConfig: (
            "create_runtime_cache cuda_graph_strategy "
            "dynamic_shapes_kernel_specialization_strategy "
            "set_execution_context_allocation_strategy set_runtime_cache"
        ),
        trt.IRuntimeCache: "deserialize serialize",
        trt.Runtime: "deserialize_cuda_engine engine_host_code_allowed",
        trt.CudaGraphStrategy: "DISABLED WHOLE_GRAPH_CAPTURE",
        trt.DynamicShapesKernelSpecializationStrategy: "LAZY NONE",
        trt.ExecutionContextAllocationStrategy: "USER_MANAGED",
        trt.SeekPosition: "SET CUR END",
        trt.TensorIOMode: "INPUT OUTPUT",
        trt.TensorLocation: "DEVICE",
        trt.IStreamReaderV2: "read seek",
    }.items():
        assert [name for name in names.split() if not hasattr(owner, name)] == []
    assert not trt.Runtime(trt.Logger()).engine_host_code_allowed


@pytest.mark.rtx
def test_the_installed_release_has_what_builds_call() -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    for owner, names in {
        trt.Builder: (
            "build_serialized_network_to_stream create_builder_config create_network "
            "create_optimization_profile"
        ),
        trt.IBuilderConfig: (
            "add_optimization_profile clear_flag num_compute_capabilities profiling_verbosity "
            "progress_monitor set_compute_capability"
        ),
        trt.INetworkDefinition: (
            "get_input get_layer get_output num_inputs num_layers num_outputs"
        ),
        trt.ILayer: "get_input name type",
        trt.IOptimizationProfile: "set_shape",
        trt.IStreamWriter: "write",
        trt.IProgressMonitor: "phase_finish phase_start step_complete",
        trt.LayerType: "ATTENTION_INPUT QUANTIZE SOFTMAX",
        trt.OnnxParser: "get_error num_errors parse parse_from_file",
        trt.ProfilingVerbosity: "DETAILED",
    }.items():
        assert [name for name in names.split() if not hasattr(owner, name)] == []
