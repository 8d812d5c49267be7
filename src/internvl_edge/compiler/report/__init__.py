"""Pages that a person reads about a compiled directory.

report  ``report.html``: what it is, what quantization did, what was measured; start here
plots   its drawings, as marks in pixels
readme  the README.md inside;  elsewhere  what opens its graphs without this runtime
"""
