"""A checkpoint's ``config.json`` as frozen dataclasses.

checkpoint  the towers of every checkpoint; start here
chat        language model, projector and prompts of a chat checkpoint
fields      each key read as a stranger's, against its type
"""
