"""Doors from other systems into the runtime, a module or package for each.

    bulk                   embeddings of many pictures or texts, from and to Parquet
    ray                    the same on many machines, and the server as replicas
    triton                 a model repository for NVIDIA's Triton, and the models that run within it
    sentence_transformers  a directory as a module of that library

They import the runtime and what is below it, and of the system that they are for only what its own
module needs, where that is used: nothing here is imported by the runtime or the server.
"""
