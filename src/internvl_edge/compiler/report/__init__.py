"""What a person reads about a compiled directory.

report  ``report.html``: what it is, what quantization did, what verification measured
plots   its drawings
readme  the README.md inside
"""
