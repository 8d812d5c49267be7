"""A checkpoint written again in another form, which ``internvl-edge convert`` is asked for.

pickles     pickle files as safetensors; start here
one_pickle  one of them, in a process of its own
layout      a chat checkpoint in the other published layout
published   the tensors of such a layout, made of ours
"""
