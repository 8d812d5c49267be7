"""The bundled models: a small trained InternVL and a chat model, their data, and the main job.

    __main__   ``python -m internvl_edge.demo``: compile at every precision and compare; start here
    compare    one precision, compiled and measured in a process of its own
    scenes     pictures composed from real handwritten digits;  language  what is said of them
    dialogues  conversations about them
    picture    one picture, and the answers on it
    evaluate   the share of right answers in each task
    training   how the models were trained (not part of the wheel)
    checkpoint, chat_checkpoint  the models

Only the command line imports it, to find the model by name and to hand in calibration samples.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["MODELS", "bundled"]

# What a command takes in place of a checkpoint's folder, and where it lies in this package.
MODELS = {"demo": "checkpoint", "demo-chat": "chat_checkpoint"}


def bundled(name: str) -> Path | None:
    """Locate a bundled model by its name; None where there is none of that name."""
    return Path(__file__).parent / MODELS[name] if name in MODELS else None
