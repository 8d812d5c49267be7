"""A checkpoint on disk, read tensor by tensor and never as a whole.

checkpoint  a Hugging Face directory: its configuration and tensors; start here
parameters  names and shapes that a configuration calls for
names       the names that the files have, and what is packed in them
scope       what of them the chosen components read
oddities    what else lies in such a directory, and what tensors are besides plain weights
shards      its safetensors files
side_files  tokenizer and settings besides the weights, and which links are followed
tokenizer   which of the tokenizer's files are passed on, and that they are this model's
load        our PyTorch model of it; the others need no PyTorch
"""
