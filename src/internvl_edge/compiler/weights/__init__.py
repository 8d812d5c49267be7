"""Weights of a directory, decided before any is written.

layout   the tensors of its weights file, their dtypes and shapes; start here
plan     what is brought with the checkpoint's shards, and what is written
tensors  parameters as graphs need them: resampled, converted
"""
