"""CUDA, as much of it as the runtime needs.

device        one GPU, and what its failures mean; start here
probe         which GPUs there are, without a CUDA package
handles       memory, streams, events, graphs
memory        results that outlive their call
device_array  arrays on the GPU, exchanged without a copy;  dlpack  as capsules
"""
