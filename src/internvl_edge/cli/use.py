"""``embed``, ``classify``, ``retrieve`` and ``match``: a compiled directory from the shell."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import click
import numpy as np

from internvl_edge.cli.console import Output
from internvl_edge.cli.options import DIRECTORY, answers, backend
from internvl_edge.disk import os_errors
from internvl_edge.errors import UsageError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")

mode = click.option(
    "--mode",
    type=click.Choice(("c", "g")),
    default="c",
    show_default=True,
    help="InternVL-C, or the slower and more precise InternVL-G.",
)
texts_option = click.option("--text", "texts", multiple=True, help="A text; repeat for several.")
texts_file = click.option("--texts", "file", type=DIRECTORY, help="A file of texts, one a line.")


@click.command()
@click.argument("out", type=DIRECTORY)
@click.argument("images", type=DIRECTORY, nargs=-1)
@texts_option
@mode
@click.option("--normalize", is_flag=True, help="Scale every embedding to length one.")
@click.option("--save", type=DIRECTORY, help="Write the embeddings to this .npz file.")
@backend
@answers
def embed(
    output: Output,
    out: Path,
    images: tuple[Path, ...],
    texts: tuple[str, ...],
    mode: str,
    normalize: bool,
    save: Path | None,
    backend: str,
) -> None:
    """Embed IMAGES (files or folders) and texts with the model in OUT."""
    paths = expand(images)
    if not paths and not texts:
        raise UsageError("embed: expected an image or a --text")
    results: dict[str, np.ndarray[Any, Any]] = {}
    with _load(out, backend) as model:
        if paths:
            results["images"] = model.encode_image(paths, mode=mode, normalize=normalize)
        if texts:
            results["texts"] = model.encode_text(list(texts), normalize=normalize)
    if save is not None:
        with os_errors(save), save.open("wb") as file:
            np.savez(file, **cast(dict[str, Any], results))
        output.say(f"{save}: {', '.join(f'{k} {v.shape}' for k, v in results.items())}")
    elif not output.as_json:
        for array in results.values():
            output.lines([" ".join(f"{value:.6g}" for value in row) for row in array])
    output.result({"image_files": paths, "text": texts, **results})


@click.command()
@click.argument("out", type=DIRECTORY)
@click.argument("images", type=DIRECTORY, nargs=-1, required=True)
@click.option("--labels", required=True, help="Comma-separated labels.")
@click.option(
    "--template",
    "templates",
    multiple=True,
    default=("a photo of a {}",),
    show_default=True,
    help="Where {} stands for the label; repeat for an ensemble.",
)
@click.option("--top", default=5, show_default=True, help="Labels to show for each image.")
@mode
@backend
@answers
def classify(
    output: Output,
    out: Path,
    images: tuple[Path, ...],
    labels: str,
    templates: tuple[str, ...],
    top: int,
    mode: str,
    backend: str,
) -> None:
    """Classify IMAGES (files or folders) by the labels given."""
    paths = expand(images)
    names = [label.strip() for label in labels.split(",") if label.strip()]
    with _load(out, backend) as model:
        ranked = model.classify(paths, names, templates, mode=mode)
    results = [
        {"file": str(path), "labels": found[:top]}
        for path, found in zip(paths, ranked, strict=True)
    ]
    for result in results:
        scores = ", ".join(f"{item['label']} {item['score']:.3f}" for item in result["labels"])
        output.lines([f"{result['file']}: {scores}"])
    output.result({"results": results})


@click.command()
@click.argument("out", type=DIRECTORY)
@click.argument("images", type=DIRECTORY, nargs=-1, required=True)
@texts_option
@texts_file
@click.option("--top", default=5, show_default=True, help="Results to show for each query.")
@mode
@backend
@answers
def retrieve(
    output: Output,
    out: Path,
    images: tuple[Path, ...],
    texts: tuple[str, ...],
    file: Path | None,
    top: int,
    mode: str,
    backend: str,
) -> None:
    """Rank texts for every image, and IMAGES (files or folders) for every text."""
    paths, queries = expand(images), read_texts(texts, file)
    with _load(out, backend) as model:
        found = model.retrieve(paths, queries, mode=mode)
    by_text: list[dict[str, Any]] = [
        {
            "text": text,
            "images": [
                {"file": str(paths[i]), "score": float(found.similarity[i, j])}
                for i in found.images_of_text[j][:top]
            ],
        }
        for j, text in enumerate(queries)
    ]
    by_image: list[dict[str, Any]] = [
        {
            "file": str(path),
            "texts": [
                {"text": queries[j], "score": float(found.similarity[i, j])}
                for j in found.texts_of_image[i][:top]
            ],
        }
        for i, path in enumerate(paths)
    ]
    for item in by_text:
        best = ", ".join(f"{hit['file']} {hit['score']:.3f}" for hit in item["images"])
        output.lines([f"{item['text']}: {best}"])
    output.result({"by_text": by_text, "by_image": by_image})


@click.command()
@click.argument("out", type=DIRECTORY)
@click.argument("image", type=DIRECTORY)
@texts_option
@texts_file
@backend
@answers
def match(
    output: Output, out: Path, image: Path, texts: tuple[str, ...], file: Path | None, backend: str
) -> None:
    """Say how well each text describes IMAGE, by the image-text matching head."""
    queries = read_texts(texts, file)
    with _load(out, backend) as model:
        probabilities = model.match([image], queries)
    rows = sorted(zip(probabilities.tolist(), queries, strict=True), reverse=True)
    output.lines([f"{probability:.4f}  {text}" for probability, text in rows])
    output.result(
        {"file": image, "results": [{"text": text, "probability": p} for p, text in rows]}
    )


def expand(paths: tuple[Path, ...]) -> list[Path]:
    """Files as given, folders as their images in order of name."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
            if not inside:
                raise UsageError(f"{path}: expected images ({', '.join(IMAGE_SUFFIXES)}) in it")
            found += inside
        else:
            found.append(path)
    return found


def read_texts(texts: tuple[str, ...], file: Path | None) -> list[str]:
    """The texts of ``--text`` and ``--texts``."""
    given = list(texts)
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{file}: expected a UTF-8 text file: {error}") from error
        given += [line.strip() for line in lines if line.strip()]
    if not given:
        raise UsageError("expected at least one --text, or a file of them as --texts")
    return given


def _load(out: Path, backend: str) -> Any:
    from internvl_edge.runtime.model import load

    return load(out, backend=backend)
