"""ONNX Runtime as a ``Session``, on the CPU or with its CUDA provider.

session      the session; start here
choice       which graph of a component is opened
opening      ONNX Runtime's own, opened;  failures  what it says, as our errors
options      how and where it computes
cpu          the instruction sets that decide which INT8 graph is right
rows         rows of one cache, each at its own position
growing      a cache that grows, handed from one call on the host to the next
values       NumPy's arrays as ONNX Runtime's values, and back
cuda_graphs  calls replayed as CUDA graphs
steps        one token after another, each step one CUDA graph
pinned       results in page-locked memory, which is used again
"""
