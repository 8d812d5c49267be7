"""Weights of a compiled directory.

writer  safetensors files of our own, written in one pass; start here
link    the checkpoint's own files, linked or copied
"""
