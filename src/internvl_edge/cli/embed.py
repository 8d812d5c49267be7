"""``embed``, ``classify``, ``retrieve`` and ``match``: a compiled directory from the shell.

``embed`` has two forms: OUT and a few pictures, answered on stdout; and with ``-o`` a source of any
size, embedded into a Parquet file (``cli.bulk``).
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any, cast

import click
import numpy as np

from internvl_edge.cli.bulk import Bulk, bulk_options, embed_source
from internvl_edge.cli.console import Output
from internvl_edge.cli.inputs import (
    Pictures,
    Readable,
    expand,
    one_picture,
    read_labels,
    read_texts,
    recursive_option,
    skip_option,
)
from internvl_edge.cli.options import DIRECTORY, Running, answers, one_of, runs_model
from internvl_edge.errors import UsageError
from internvl_edge.files.disk import write_atomically
from internvl_edge.types import Array

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
texts_file = click.option(
    "--texts", "file", type=DIRECTORY, help="A file of texts, one a line; - is stdin."
)
long_option = click.option(
    "--on-long",
    type=one_of("truncate", "error"),
    default="truncate",
    show_default=True,
    help="Texts of too many tokens: cut off, with a warning, or refused.",
)


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
@bulk_options
@click.option("--force", is_flag=True, help="Replace the file of --save or -o.")
@long_option
@recursive_option
@skip_option
@runs_model
@answers
def embed(
    output: Output,
    out: Path,
    images: tuple[Path, ...],
    texts: tuple[str, ...],
    mode: str,
    normalize: bool,
    save: Path | None,
    bulk: Bulk,
    force: bool,
    on_long: Any,
    recursive: bool,
    skip_errors: bool,
    running: Running,
) -> None:
    """Embed IMAGES (files, folders, or - for stdin) and texts with the model in OUT.

    A picture that cannot be read ends no folder: its error is told, and is among the "errors" of
    --json; the exit code is that of the first one.

    Of any number: embed SOURCE OUT -o DEST.parquet, where SOURCE is a folder, *.parquet with
    pictures or texts in a column, or WebDataset's *.tar. Rows that cannot be embedded say so in the
    column "error". What an interrupted run finished stays next to DEST for --resume.
    """
    if bulk.dest is not None:
        if texts or save is not None:
            option = "--text" if texts else "--save"
            raise UsageError(f"{option} does not go with -o DEST.parquet; leave one of them out")
        embed_source(
            output,
            (out, *images),
            bulk,
            running,
            {"mode": mode, "normalize": normalize, "on_long": on_long},
            force=force,
            recursive=recursive,
            skip_errors=skip_errors,
        )
        return
    bulk.require_dest()
    found = expand(output, images, recursive=recursive)
    read = Readable(found.paths, skip=skip_errors)
    if not found.paths and not texts:
        raise UsageError("embed: expected an image or a --text")
    if save is not None:
        _check_save(save, force)
    results: dict[str, Array] = {}
    with running.open(out) as model:
        if found.paths:
            pictures = read.pictures(model, None)
            results["images"] = model.encode_image(pictures, mode=mode, normalize=normalize)
        if texts:
            results["texts"] = model.encode_text(list(texts), normalize=normalize, on_long=on_long)
    paths = read.paths
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
    rest = {"errors": read.to_json(), "left_out": found.left_out}
    output.result({"image_files": paths, "text": texts, **results, **rest})
    read.finish()


@click.command()
@click.argument("out", type=DIRECTORY)
@click.argument("images", type=DIRECTORY, nargs=-1, required=True)
@click.option("--labels", help="Comma-separated labels.")
@click.option("--labels-file", type=DIRECTORY, help="A file of labels, one a line; - is stdin.")
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
@long_option
@recursive_option
@skip_option
@runs_model
@answers
def classify(
    output: Output,
    out: Path,
    images: tuple[Path, ...],
    labels: str | None,
    labels_file: Path | None,
    templates: tuple[str, ...],
    top: int,
    mode: str,
    video: bool,
    frames: int,
    on_long: Any,
    recursive: bool,
    skip_errors: bool,
    running: Running,
) -> None:
    """Classify IMAGES (files, folders, or - for stdin) by the labels given.

    Scores compare the labels with each other: of a single one it is always 1, and its cosine is
    shown instead. A picture that cannot be read ends no folder, as for embed.
    """
    names = read_labels(labels, labels_file)
    found = _named(output, images, video=video, recursive=recursive)
    read = Readable(found.paths, skip=skip_errors)
    how: dict[str, Any] = {"mode": mode, "top_k": top, "on_long": on_long}
    with running.open(out) as model:
        if video:
            given = read.videos(frames)
            ranked = model.classify_videos(given, names, templates, num_frames=frames, **how)
        else:
            given = read.pictures(model, "classification")
            ranked = model.classify(given, names, templates, **how)
    results = [
        {"file": path, "labels": scores} for path, scores in zip(read.paths, ranked, strict=True)
    ]
    shown = "cosine" if len(names) == 1 else "score"
    if len(names) == 1:
        output.say(f"one label: its score is 1 whatever the image shows; read its {shown}")
    for path, scores in zip(read.paths, ranked, strict=True):
        figures = ", ".join(f"{item['label']} {item[shown]:.3f}" for item in scores)
        output.lines([f"{path}: {figures}"])
    output.result({"results": results, "errors": read.to_json(), "left_out": found.left_out})
    read.finish()


@click.command()
@click.argument("out", type=DIRECTORY)
@click.argument("images", type=DIRECTORY, nargs=-1, required=True)
@texts_option
@texts_file
@top_option
@mode
@video_option
@frames_option
@long_option
@recursive_option
@skip_option
@runs_model
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
    on_long: Any,
    recursive: bool,
    skip_errors: bool,
    running: Running,
) -> None:
    """Rank texts for every image, and IMAGES (files, folders, or - for stdin) for every text.

    A picture that cannot be read ends no folder, as for embed.
    """
    queries = read_texts(texts, file)
    found = _named(output, images, video=video, recursive=recursive)
    read = Readable(found.paths, skip=skip_errors)
    how: dict[str, Any] = {"mode": mode, "on_long": on_long}
    with running.open(out) as model:
        if video:
            given = read.videos(frames)
            matches = model.retrieve_videos(given, queries, num_frames=frames, **how)
        else:
            matches = model.retrieve(read.pictures(model, "retrieval"), queries, **how)
    paths = read.paths
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
    told = {"errors": read.to_json(), "left_out": found.left_out}
    output.result({"by_text": by_text, "by_image": by_image, **told})
    read.finish()


@click.command()
@click.argument("out", type=DIRECTORY)
@click.argument("image", type=DIRECTORY)
@texts_option
@texts_file
@click.option(
    "--stream", is_flag=True, help="Print every text as it is scored, in the order given."
)
@long_option
@runs_model
@answers
def match(
    output: Output,
    out: Path,
    image: Path,
    texts: tuple[str, ...],
    file: Path | None,
    stream: bool,
    on_long: Any,
    running: Running,
) -> None:
    """Say how well each text describes IMAGE (or - for stdin), by the matching head."""
    queries = read_texts(texts, file)
    picture = one_picture(image)
    scored: list[tuple[float, str]] = []
    with running.open(out) as model:
        size = 1 if stream else 8
        for some in model.match_stream([picture], queries, batch_size=size, on_long=on_long):
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


def _named(output: Output, paths: tuple[Path, ...], *, video: bool, recursive: bool) -> Pictures:
    """Return the pictures that are named; of videos, a folder is one."""
    if video and recursive:
        raise UsageError("--recursive: a folder is a video with --video; leave one of them out")
    return Pictures(list(paths)) if video else expand(output, paths, recursive=recursive)


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
