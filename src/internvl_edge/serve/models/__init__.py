"""A compiled directory as requests use it.

served   its components and what they compute, awaited; start here
batches  a component whose requests share batches, and what each waited for
chats    one conversation after the other, in a thread of its own
gallery  a folder of pictures, embedded at the start
"""
