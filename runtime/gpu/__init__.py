"""CUDA, as much of it as the runtime needs.

device        one GPU, and what its failures mean; start here
handles       memory, streams, events, graphs
memory        results that outlive their call
device_array  arrays on the GPU, exchanged without a copy;  dlpack  as capsules
"""
