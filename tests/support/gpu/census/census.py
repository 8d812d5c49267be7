"""Kernels that ONNX Runtime launches per block, counted without a GPU.

    make gpu-census, or: python tests/support/gpu/census/census.py --work DIR

Of InternViT-6B in bf16, and of QLLaMA-8B at int4-wo, a token with its cache in place. The real
onnxruntime-gpu, taken from the package index, runs graphs of four blocks over a stand-in for CUDA's
libraries (standin.cpp) that computes nothing and notes every launch. Partition, fusions
and the choice of kernels are real; results are not, and nothing is timed. Kernels of cuDNN do not
run, so that attention is counted in the form that needs none: MultiHeadAttention is as many.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes

from internvl_edge.compiler.steps.meta_model import meta_model, shallow_config
from internvl_edge.compiler.steps.trace import trace_all
from internvl_edge.export.config.checkpoint import CheckpointConfig, VisionConfig
from internvl_edge.export.graph.bind import bind, save
from internvl_edge.export.graph.providers.decoder import cuda_decoder
from internvl_edge.export.graph.providers.tower import (
    CONTRIB,
    VERSION,
    take_cuda_form,
    take_patches,
)
from internvl_edge.export.synthetic import PRESETS, shrink
from internvl_edge.export.weights.writer import StoredTensor
from internvl_edge.quantize.graph.qdq import SCALE_SUFFIX, QuantizedLinear, insert_qdq

HERE = Path(__file__).parent
PACKAGES = ("onnxruntime-gpu==1.31.1", "nvidia-cuda-runtime==13.0.*", "nvidia-cuda-crt==13.0.*")
PROVIDER = "onnxruntime/capi/libonnxruntime_providers_cuda.so"
LIBRARIES = {
    "libcudart.so.13": "CUDART",
    "libcublas.so.13": "CUBLAS",
    "libcublasLt.so.13": "CUBLASLT",
    "libcurand.so.10": "CURAND",
    "libcuda.so.1": "DRIVER",
}
OF_CUDA = re.compile("curand|cu[A-Z]")  # names of functions
LAUNCHES = ("KERNEL", "GEMM", "MEMSET", "COPY")
DEPTHS = (2, 4)  # of the towers whose difference is what a block launches
# Launches per block; a decoder's are 11 kernels and a memset of 128 bytes.
AT_MOST = {"vision": {"published": 15, "cuda": 11}, "decoder": {"published": 30, "cuda": 12}}
CAPACITY, BLOCK = 1024, 128  # positions of the decoder's cache, rows with one scale
WEIGHTS = "weights.bin"


def fetch(site: Path) -> None:
    """Take the packages from the index, once."""
    if not (site / PROVIDER).is_file():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site]
        subprocess.run([*pip, *PACKAGES], check=True)


def build(site: Path, folder: Path) -> None:
    """Compile the stand-in of each library; a symbol that it has not returns 0."""
    folder.mkdir(exist_ok=True)
    needed = symbols(site / PROVIDER, "--undefined-only")
    for name in needed.pop("", set()):  # of what has no versions
        library = "libcurand.so.10" if name.startswith("curand") else "libcuda.so.1"
        needed.setdefault(library, set()).update({name} if OF_CUDA.match(name) else ())
    include = next(site.rglob("cuda_runtime_api.h")).parent
    for library, macro in LIBRARIES.items():
        target, versions = folder / library, folder / f"{library}.map"
        versions.write_text(f"{library} {{ global: *; }};\n")
        flags = [f"-D{macro}", f"-I{include}", "-O1", "-fPIC", "-shared", "-w"]
        link = [f"-Wl,--version-script={versions}", f"-Wl,-soname,{library}"]
        command = ["g++", *flags, *link, "-o", target, HERE / "standin.cpp"]
        subprocess.run(command, check=True)
        written = symbols(target, "--defined-only").get(library, set())
        missing = sorted(needed.get(library, set()) - written)
        rest = folder / f"{library}.cpp"
        rest.write_text(
            "".join(f'extern "C" int {name}(...) {{ return 0; }}\n' for name in missing)
        )
        subprocess.run([*command, rest], check=True)


def symbols(library: Path, which: str) -> dict[str, set[str]]:
    """List a library's symbols, by the version that they have: the library that they are of."""
    told = subprocess.run(
        ["nm", "-D", which, library], check=True, capture_output=True, text=True
    ).stdout
    found: dict[str, set[str]] = {}
    for line in told.splitlines():
        name, _, version = line.split()[-1].partition("@")
        found.setdefault(version.lstrip("@"), set()).add(name)
    return found


def write_tower(folder: Path, depth: int) -> dict[str, Path]:
    """Write the graphs of a tower at InternViT-6B's widths."""
    vision = VisionConfig(num_hidden_layers=depth, has_layer_scale=False)
    model = traced(CheckpointConfig(kind="vit", vision=vision), "vision", "bf16", None)
    hollow(model, folder)
    paths = {name: folder / f"vision.{name}.{depth}.onnx" for name in AT_MOST["vision"]}
    for node in [node for node in model.graph if node.op_type == "Conv"]:  # cuDNN's, and no block's
        take_patches(model.graph, node)
    passes.RemoveUnusedNodesPass()(model)
    model.opset_imports[CONTRIB] = VERSION
    save(model, paths["published"])
    if not take_cuda_form(model, multi_head=False):
        raise SystemExit("the tower has no form for CUDA")
    save(model, paths["cuda"])
    return paths


def write_decoder(folder: Path, depth: int) -> dict[str, Path]:
    """Write the graphs of a decoder at QLLaMA-8B's widths, of weights in INT4."""
    config = shrink(PRESETS["qllama-8b"], depth)
    model = traced(config, "decoder", "fp16", CAPACITY)
    products = [name for name in model.graph.initializers if name.endswith("_proj.weight")]
    linears = (
        QuantizedLinear(weight=name, activation_scale=None, format="int4", block=BLOCK)
        for name in products
    )
    insert_qdq(model, {linear.weight: linear for linear in linears})
    hollow(model, folder)
    paths = {name: folder / f"decoder.{name}.{depth}.onnx" for name in AT_MOST["decoder"]}
    save(model, paths["published"])
    fused = cuda_decoder(model, ir.DataType.FLOAT16)
    if fused is None:
        raise SystemExit("the decoder has no form for CUDA")
    save(fused, paths["cuda"])
    return paths


def traced(config: CheckpointConfig, component: str, base: str, capacity: int | None) -> ir.Model:
    size = config.vision.image_size
    plan = SimpleNamespace(
        source=SimpleNamespace(config=config),
        components=(component,),
        bases=(base,),
        image_size=size,
        options=SimpleNamespace(cache_capacity=capacity, input="float32"),
    )
    shallow = meta_model(shallow_config(config), size)
    return trace_all(plan, shallow, base, lambda _: None)[component]  # type: ignore[arg-type]


def hollow(model: ir.Model, folder: Path) -> None:
    """Bind a graph to weights that are a file of holes, and to scales of one."""
    stored, end = {}, 0
    for name, value in model.graph.initializers.items():
        if value.const_value is None and value.shape is not None:
            assert value.dtype is not None
            shape: tuple[int, ...] = tuple(int(n) for n in value.shape.numpy())
            dtype = np.dtype(value.dtype.numpy())
            if value.dtype == ir.DataType.INT4:  # two to a byte
                shape, dtype = (int(np.prod(shape)) // 2,), np.dtype(np.uint8)
            tensor = StoredTensor(
                location=WEIGHTS,
                offset=end,
                nbytes=int(np.prod(shape)) * dtype.itemsize,
                dtype=dtype,
                shape=shape,
            )
            stored[name], end = tensor, end + tensor.nbytes
    bind(model, stored, folder)
    with (folder / WEIGHTS).open("ab") as file:
        file.truncate(max(end, file.tell()))
    with (folder / WEIGHTS).open("r+b") as file:
        for name, tensor in stored.items():
            if name.endswith(SCALE_SUFFIX):  # of a decoder, which are read: none may be too small
                file.seek(tensor.offset)
                file.write(np.ones(tensor.shape, tensor.dtype).tobytes())


def launches_of(graph: Path, site: Path, folder: Path) -> Counter[str]:
    """Run a graph in a process of its own, and count what its second run launches."""
    log = folder / "launches.txt"
    log.unlink(missing_ok=True)
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": str(folder),
        "PYTHONPATH": str(site),
        "CENSUS_LOG": str(log),
    }
    subprocess.run([sys.executable, HERE / "run_twice.py", graph, log], check=True, env=environment)
    lines = log.read_text().partition("=====\n")[2].splitlines()
    return Counter(line for line in lines if line.startswith(LAUNCHES))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="A folder that is kept.")
    work = parser.parse_args().work.resolve()
    site, libraries, graphs = (work / name for name in ("site", "libraries", "graphs"))
    graphs.mkdir(parents=True, exist_ok=True)
    fetch(site)
    build(site, libraries)
    is_good = True
    for component, write in (("vision", write_tower), ("decoder", write_decoder)):
        shallow, deep = (write(graphs, depth) for depth in DEPTHS)
        for name, most in AT_MOST[component].items():
            few, many = (launches_of(g[name], site, libraries) for g in (shallow, deep))
            of_blocks = many - few
            per_block = of_blocks.total() / (DEPTHS[1] - DEPTHS[0])
            print(f"{component}, {name}: {per_block:g} launches per block, at most {most} expected")
            for line, count in sorted(of_blocks.items()):
                print(f"  {count / (DEPTHS[1] - DEPTHS[0]):g} x {line[:110]}")
            is_good = is_good and per_block <= most
    sys.exit(not is_good)


if __name__ == "__main__":
    main()
