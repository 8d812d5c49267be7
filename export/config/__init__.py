"""A checkpoint's ``config.json`` as frozen dataclasses.

checkpoint  the kind of a checkpoint, and its towers; start here
chat        language model, projector and prompts of a chat checkpoint
native      the same in the layout of transformers' own classes
language    the language model, of any of the families
prompts     what its files say of prompts: system sentence, padding, chat template
fields      reads each key without trust, and checks its type
"""
