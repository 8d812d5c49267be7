"""What checkpoints in the wild are, other than plain weights: read, or named with what to do.

table     a row for each oddity: how it is told, what it is, what to do; start here
choose    which files of a directory hold the model
wrappers  what training frameworks and original files put around names
explain   why tensors are not those that a configuration calls for, in words
"""
