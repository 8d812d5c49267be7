"""A checkpoint's ``config.json`` as frozen dataclasses.

checkpoint  the kind of a checkpoint, and its towers; start here
chat        language model, projector and prompts of a chat checkpoint
fields      reads each key without trust, and checks its type
"""
