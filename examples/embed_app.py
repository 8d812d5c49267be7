"""Embed images, compare each with a text: the whole application.

python examples/embed_app.py OUT "a red seven" photo.jpg other.jpg
"""

from __future__ import annotations

import sys

import internvl_edge


def main(out: str, text: str, *images: str) -> None:
    with internvl_edge.load(out) as model:
        pictures = model.encode_image(images, normalize=True)  # (B, E)
        (words,) = model.encode_text([text], normalize=True)
    for image, similarity in zip(images, pictures @ words, strict=True):
        sys.stdout.write(f"{similarity:.4f}  {image}\n")


if __name__ == "__main__":
    if len(sys.argv) < 4 or sys.argv[1].startswith("-"):
        sys.exit("usage: embed_app.py OUT TEXT IMAGE...")
    try:
        main(*sys.argv[1:])
    except internvl_edge.InternVLError as error:
        sys.exit(f"error: {error}")
