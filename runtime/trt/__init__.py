"""TensorRT and TensorRT-RTX as a ``Session``.

session   the session; start here;  options  how it runs its engine
engine    a serialized engine, verified and brought onto the GPU
profiles  what it takes and gives, and the bounds of its shapes
slot      one place where it runs
contexts  execution contexts, captured as CUDA graphs
vendor    what both modules have in common
"""
