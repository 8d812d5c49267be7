"""Doors from other systems into the runtime, a module or package for each.

They import the runtime and what is below it, and of the system that they are for only what its own
module needs, where that is used: nothing here is imported by the runtime or the server.
"""
