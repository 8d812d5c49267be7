"""The bundled model: a small trained InternVL, its data, and the main job shown on it.

    __main__  ``python -m internvl_edge.demo``: compile at every precision and compare; start here
    scenes    pictures composed from real handwritten digits;  language  what is said of them
    picture   one picture, and the answers on it
    evaluate  the share of right answers in each task
    training  how the model was trained (not part of the wheel);  checkpoint  the model

Only the command line imports it, to hand in its calibration samples.
"""
