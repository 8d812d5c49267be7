"""A checkpoint on disk, read tensor by tensor and never as a whole.

checkpoint  a Hugging Face directory, and our PyTorch model of it; start here
shards      its safetensors files
convert     pickle files to safetensors, on request, in a process of their own
"""
