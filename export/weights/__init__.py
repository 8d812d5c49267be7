"""Weights of a compiled directory.

writer  writes new safetensors files in one pass; start here
link    links or copies the checkpoint's own files
"""
