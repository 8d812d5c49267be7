"""``serve``: compiled directories over HTTP; ``triton``: a model repository for NVIDIA's Triton."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import click

from internvl_edge.cli.console import Output
from internvl_edge.cli.options import DIRECTORY, allow_slow, answers, backend, names, one_of
from internvl_edge.files.packages import require


@click.command()
@click.argument("directories", metavar="OUT...", nargs=-1, required=True)
@click.option("--host", default="127.0.0.1", show_default=True, help="Where to listen.")
@click.option("--port", type=int, default=8000, show_default=True, help="0: any that is free.")
@click.option(
    "--api-key-file",
    "key_file",
    type=DIRECTORY,
    help="Keys that clients show, one a line; INTERNVL_EDGE_API_KEY is one too.",
)
@click.option("--no-auth", is_flag=True, help="Other machines may ask without a key.")
@click.option("--max-batch", type=int, default=8, show_default=True, help="Rows of a batch.")
@click.option(
    "--max-delay-ms",
    type=float,
    default=2.0,
    show_default=True,
    help="How long a request waits for others, where there are any.",
)
@click.option(
    "--max-queued", type=int, default=64, show_default=True, help="Requests that may wait."
)
@click.option(
    "--max-chats", type=int, default=4, show_default=True, help="Chats under way and waiting."
)
@click.option(
    "--max-body", type=int, default=20 << 20, show_default=True, help="Bytes of a request."
)
@click.option(
    "--max-images", type=int, default=64, show_default=True, help="Pictures of a request."
)
@click.option(
    "--max-pixels", type=int, default=20_000_000, show_default=True, help="Pixels of a picture."
)
@click.option(
    "--timeout",
    "timeout_s",
    type=float,
    default=60.0,
    show_default=True,
    help="Seconds in which an answer is done, or its stream begun.",
)
@click.option(
    "--drain",
    "drain_s",
    type=float,
    default=5.0,
    show_default=True,
    help="Seconds after SIGTERM in which connections are still taken.",
)
@click.option(
    "--grace",
    "grace_s",
    type=float,
    default=30.0,
    show_default=True,
    help="Seconds after that for what is under way.",
)
@click.option("--threads", "num_threads", type=int, help="Of ONNX Runtime; every core by default.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda or cuda:1.")
@allow_slow
@click.option("--no-page", is_flag=True, help="Serve the API alone.")
@click.option("--gallery", type=DIRECTORY, help="A folder of pictures to search on the page.")
@backend
@answers
def serve(
    output: Output,
    directories: tuple[str, ...],
    key_file: Path | None,
    no_page: bool,
    **how: Any,
) -> int:
    """Serve compiled directories over HTTP: OpenAI's API, and a page to try them on.

    Each OUT is served under its folder's name, or as NAME=OUT. SIGTERM ends the server once every
    request that it has taken is answered.
    """
    require("starlette", "uvicorn", "prometheus-client")
    from internvl_edge.serve.options import ServeOptions, read_keys, served_names

    places = served_names(directories)
    options = ServeOptions(keys=read_keys(key_file, os.environ), page=not no_page, **how)
    return run(output, places, options)


def run(output: Output, places: dict[str, Path], options: Any) -> int:
    """Serve until the end, and say where."""
    from internvl_edge.serve.server import bound_socket, serve
    from internvl_edge.serve.service import Service

    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # a client's faults are no news
    service = Service(places, options)
    listener = bound_socket(options)
    port = listener.getsockname()[1]
    host = f"[{options.host}]" if ":" in options.host else options.host
    url = f"http://{host}:{port}"
    output.say(f"opening {', '.join(places)}")

    def opened() -> None:
        output.lines([url])
        output.result({"url": url, "models": list(places)})

    return serve(service, listener, opened)


@click.command()
@click.argument("out", type=DIRECTORY)
@click.option("-o", "--repo", type=DIRECTORY, required=True, help="The model repository to write.")
@click.option(
    "--backend",
    type=one_of("python", "onnxruntime", "tensorrt"),
    default="python",
    show_default=True,
    help="What runs the image component: this package, or Triton itself as one more model.",
)
@click.option("--tasks", callback=names, help="Comma-separated; default: all that OUT can do.")
@click.option(
    "--mode", type=one_of("c", "g"), default="c", show_default=True, help="Of image embeddings."
)
@click.option("--max-batch", type=int, default=32, show_default=True, help="Rows of a batch.")
@click.option(
    "--instances", type=int, default=1, show_default=True, help="Processes of each model."
)
@click.option(
    "--threads", type=int, default=1, show_default=True, help="Of each process, on the processor."
)
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:1.")
@click.option(
    "--self-contained", is_flag=True, help="Put the files that a model needs into its folder."
)
@click.option("--max-delay-us", type=int, help="How long a request waits for others; default: not.")
@click.option(
    "--max-queued",
    type=int,
    help="Requests that may wait, by a queue policy, which makes some lone requests slower.",
)
@click.option("--force", is_flag=True, help="Replace REPO, once the new one is complete.")
@answers
def triton(output: Output, out: Path, repo: Path, **how: Any) -> None:
    """Write a model repository for NVIDIA's Triton: every task that OUT can do is a model.

    Triton is not needed to write it. Within Triton, models in Python need this package.
    """
    from internvl_edge.integrations.triton.options import RepositoryOptions
    from internvl_edge.integrations.triton.repository import write_repository

    models = write_repository(RepositoryOptions(out=out, repo=repo, **how))
    output.lines([f"{repo}: {', '.join(models)}"])
    output.result({"repo": repo, "models": models})
