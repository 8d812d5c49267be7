"""A checkpoint on disk, read tensor by tensor and never as a whole.

checkpoint  a Hugging Face directory: its configuration and tensors; start here
parameters  names and shapes that a configuration calls for
names       the names that the files have, and what is packed in them
shards      its safetensors files
side_files  tokenizer and settings besides the weights, and which links are followed
load        our PyTorch model of it; the others need no PyTorch
convert     pickle files to safetensors, on request, in a process of their own
"""
