"""Runs a graph twice on ONNX Runtime's CUDA provider, with a line in the log between the runs.

python run_twice.py GRAPH LOG
"""

from __future__ import annotations

import sys

import numpy as np
import onnxruntime


def main() -> None:
    graph, log = sys.argv[1:]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(graph, options, providers=providers)
    (taken,), (given,) = session.get_inputs(), session.get_outputs()
    shape = [size if isinstance(size, int) else 1 for size in taken.shape]
    binding = session.io_binding()
    binding.bind_cpu_input(taken.name, np.zeros(shape, np.float32))
    binding.bind_output(given.name, "cuda", 0)
    session.run_with_iobinding(binding)
    with open(log, "a") as file:
        file.write("=====\n")
    session.run_with_iobinding(binding)


if __name__ == "__main__":
    main()
