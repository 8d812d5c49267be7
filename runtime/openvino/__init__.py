"""OpenVINO as a ``Session``: what sees images alone, on the CPU.

opening   which components it runs, and in which dtype; start here
session   the session
options   how it computes; can be written down where OpenVINO is not installed
"""
