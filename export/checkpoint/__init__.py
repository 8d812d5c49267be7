"""A checkpoint on disk, read tensor by tensor and never as a whole.

checkpoint  a Hugging Face directory: its configuration and tensors; start here
parameters  names and shapes that a configuration calls for
shards      its safetensors files
load        our PyTorch model of it; the others need no PyTorch
convert     pickle files to safetensors, on request, in a process of their own
"""
