"""``embed``, ``classify``, ``retrieve`` and ``match``: a compiled directory from the shell."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any, cast

import click
import numpy as np

from internvl_edge.cli.console import Output
from internvl_edge.cli.options import DIRECTORY, answers, backend, one_of
from internvl_edge.errors import MediaError, UsageError
from internvl_edge.files.disk import write_atomically
from internvl_edge.types import Array

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")

mode = click.option(
    "--mode",
    type=one_of("c", "g"),
    default="c",
    show_default=True,
    help="InternVL-C, or the slower and more precise InternVL-G.",
)
top_option = click.option(
    "--top", type=click.IntRange(min=1), default=5, show_default=True, help="The best so many."
)
video_option = click.option(
    "--video", is_flag=True, help="IMAGES are videos: files, or folders of frames."
)
frames_option = click.option(
    "--frames", type=click.IntRange(min=1), default=8, show_default=True, help="Sampled of a video."
)
texts_option = click.option("--text", "texts", multiple=True, help="A text; repeat for several.")
texts_file = click.option("--texts", "file", type=DIRECTORY, help="A file of texts, one a line.")


@click.command()
@click.argument("out", type=DIRECTORY)
@click.argument("images", type=DIRECTORY, nargs=-1)
@texts_option
@mode
@click.option("--normalize", is_flag=True, help="Scale every embedding to length one.")
@click.option(
    "--save",
    type=DIRECTORY,
    help="Write the embeddings, image_names and texts_given to this new .npz file.",
)
@click.option("--force", is_flag=True, help="Replace the file of --save.")
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
    force: bool,
    backend: str,
) -> None:
    """Embed IMAGES (files or folders) and texts with the model in OUT."""
    paths = expand(images)
    if not paths and not texts:
        raise UsageError("embed: expected an image or a --text")
    if save is not None:
        _check_save(save, force)
    results: dict[str, Array] = {}
    with open_model(out, backend) as model:
        if paths:
            results["images"] = model.encode_image(paths, mode=mode, normalize=normalize)
        if texts:
            results["texts"] = model.encode_text(list(texts), normalize=normalize)
    if save is not None:
        buffer = io.BytesIO()
        told = {"image_names": [*map(str, paths)], "texts_given": [*texts]}
        labels = {name: np.array(some) for name, some in told.items() if some}
        np.savez(buffer, **cast(dict[str, Any], results | labels))
        write_atomically(save, buffer.getvalue())
        output.lines([f"{save}: {', '.join(f'{k} {v.shape}' for k, v in results.items())}"])
    else:
        rows = [row for array in results.values() for row in array]
        for label, row in zip([*map(str, paths), *texts], rows, strict=True):
            output.lines([f"{label}: {' '.join(f'{value:.6g}' for value in row)}"])
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
@top_option
@mode
@video_option
@frames_option
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
    video: bool,
    frames: int,
    backend: str,
) -> None:
    """Classify IMAGES (files or folders) by the labels given."""
    paths = list(images) if video else expand(images)
    names = [label.strip() for label in labels.split(",") if label.strip()]
    with open_model(out, backend) as model:
        if video:
            ranked = model.classify_videos(paths, names, templates, mode=mode, num_frames=frames)
        else:
            ranked = model.classify(paths, names, templates, mode=mode)
    results = [
        {"file": str(path), "labels": scores[:top]}
        for path, scores in zip(paths, ranked, strict=True)
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
@top_option
@mode
@video_option
@frames_option
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
    video: bool,
    frames: int,
    backend: str,
) -> None:
    """Rank texts for every image, and IMAGES (files or folders) for every text."""
    paths, queries = list(images) if video else expand(images), read_texts(texts, file)
    with open_model(out, backend) as model:
        if video:
            matches = model.retrieve_videos(paths, queries, mode=mode, num_frames=frames)
        else:
            matches = model.retrieve(paths, queries, mode=mode)
    by_text: list[dict[str, Any]] = [
        {
            "text": text,
            "images": [
                {"file": str(paths[i]), "score": float(matches.similarity[i, j])}
                for i in matches.images_of_text[j][:top]
            ],
        }
        for j, text in enumerate(queries)
    ]
    by_image: list[dict[str, Any]] = [
        {
            "file": str(path),
            "texts": [
                {"text": queries[j], "score": float(matches.similarity[i, j])}
                for j in matches.texts_of_image[i][:top]
            ],
        }
        for i, path in enumerate(paths)
    ]
    output.lines(
        ["images of each text:"]
        + [_ranking(item["text"], "file", item["images"]) for item in by_text]
        + ["texts of each image:"]
        + [_ranking(item["file"], "text", item["texts"]) for item in by_image]
    )
    output.result({"by_text": by_text, "by_image": by_image})


@click.command()
@click.argument("out", type=DIRECTORY)
@click.argument("image", type=DIRECTORY)
@texts_option
@texts_file
@click.option(
    "--stream", is_flag=True, help="Print every text as it is scored, in the order given."
)
@backend
@answers
def match(
    output: Output,
    out: Path,
    image: Path,
    texts: tuple[str, ...],
    file: Path | None,
    stream: bool,
    backend: str,
) -> None:
    """Say how well each text describes IMAGE, by the image-text matching head."""
    one_image(image)
    queries = read_texts(texts, file)
    scored: list[tuple[float, str]] = []
    with open_model(out, backend) as model:
        for some in model.match_stream([image], queries, batch_size=1 if stream else 8):
            new = zip(some.tolist(), queries[len(scored) :], strict=False)
            for probability, text in list(new):
                scored.append((probability, text))
                if stream:
                    output.piece(f"{probability:.4f}  {text}\n", text=text, probability=probability)
    rows = sorted(scored, reverse=True)
    if not stream:
        output.lines([f"{probability:.4f}  {text}" for probability, text in rows])
    output.result(
        {"file": image, "results": [{"text": text, "probability": p} for p, text in rows]}
    )


def expand(paths: tuple[Path, ...]) -> list[Path]:
    """Expand folders to their images, in order of name; files stay as given."""
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
            if not inside:
                raise MediaError(f"{path}: expected images ({', '.join(IMAGE_SUFFIXES)}) in it")
            files += inside
        else:
            files.append(path)
    return files


def one_image(path: Path) -> None:
    """Refuse a folder where a command looks at one image."""
    if path.is_dir():
        raise MediaError(f"{path}: expected one image, found a folder; name a file in it")


def read_texts(texts: tuple[str, ...], file: Path | None) -> list[str]:
    """Read the texts of ``--text`` and ``--texts``."""
    given = list(texts)
    if file is not None and file.is_dir():
        raise MediaError(f"--texts {file}: expected a UTF-8 file, one text a line; it is a folder")
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise MediaError(f"--texts {file}: expected a UTF-8 text file: {error}") from error
        kept = [line.strip() for line in lines if line.strip()]
        if not kept:
            raise MediaError(f"--texts {file}: expected texts, one a line, found none")
        given += kept
    if not given:
        raise UsageError("expected at least one --text, or a file of them as --texts")
    return given


def _ranking(query: str, kind: str, hits: list[dict[str, Any]]) -> str:
    """Make a line of ``retrieve``: the query, and its matches, best first."""
    return f"  {query}: " + ", ".join(f"{hit[kind]} {hit['score']:.3f}" for hit in hits)


def _check_save(save: Path, force: bool) -> None:
    """Refuse, before any work, to write what is no .npz file or over another file."""
    if save.suffix != ".npz":
        raise UsageError(f"--save {save}: expected a name that ends in .npz")
    if os.path.lexists(save) and not force:
        raise UsageError(f"--save {save} exists; pass --force to replace it, or choose another")
    if not os.access(save.absolute().parent, os.W_OK | os.X_OK):
        raise UsageError(f"--save {save}: {save.absolute().parent} cannot be written or is missing")


def open_model(out: Path, backend: str) -> Any:
    """Open the model of a compiled directory."""
    from internvl_edge.runtime.model import load

    return load(out, backend=backend)
