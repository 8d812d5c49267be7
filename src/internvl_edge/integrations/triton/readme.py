"""REPO/README.md: what was written, how Triton is started on it, and which versions fit.

Its last line, a comment, lists the repository's files: how ``--force`` knows what it may replace.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from internvl_edge._version import __version__
from internvl_edge.artifact.manifest import Manifest
from internvl_edge.files.reading import parse_json
from internvl_edge.integrations.triton.folder import ModelFolder
from internvl_edge.integrations.triton.options import RepositoryOptions

__all__ = ["README", "listed_files", "readme"]

README = "README.md"
MARK = "<!-- Written by internvl-edge triton. -->"  # how a repository of ours is known again
LISTED, END = "<!-- Its files: ", " -->"


def readme(
    manifest: Manifest,
    options: RepositoryOptions,
    models: Sequence[ModelFolder],
    files: Iterable[str],
) -> str:
    """Write Markdown for a repository; ``files`` are paths in it."""
    listed = json.dumps(sorted({*files, README})).replace(">", "\\u003e")  # no end of a comment
    return f"""{MARK}

# {_code(str(manifest.source["checkpoint"]))} at {manifest.precision}, for Triton

Written by internvl-edge {__version__}. Every folder is a model:

| model | backend | inputs | outputs |
|---|---|---|---|
{chr(10).join(map(_row, models))}

Dimensions are without the batch; `?` may be left out. An `image` is the bytes of a JPEG, PNG or
WebP, or the text of a `data:` URL, as JSON has no bytes; nothing is fetched. What cannot be is
answered `INVALID_ARG`, HTTP's 400. `generate` has a response for each piece of text, or with
`stream` false a single one. `threads`, `normalize` and `mode` in a `config.pbtxt` may be changed;
who renames a folder changes `name` with it.

## Start

```bash
tritonserver --model-repository=REPO
```

The models in Python need this package and ONNX Runtime in Triton's own Python, with `numpy<2`:
Triton up to 24.10 reads BYTES wrong with NumPy 2, and ends. {_place(options)}

Triton up to 24.10 neither starts a model again whose process died nor says so: probe it by an
inference.

## Versions

{chr(10).join(_versions(models))}

## Waiting

{_waiting(options)}

{LISTED}{listed}{END}
"""


def listed_files(text: bytes) -> frozenset[str] | None:
    """Read which files a repository was written with; None: its README is not one of ours."""
    lines = text.splitlines()
    start, end = LISTED.encode("ascii"), END.encode("ascii")
    listed = [line for line in lines if line.startswith(start) and line.endswith(end)]
    if lines[:1] != [MARK.encode("ascii")] or not listed:
        return None
    try:
        names = parse_json(listed[-1].removeprefix(start).removesuffix(end))
    except ValueError:
        return None
    return frozenset(map(str, names)) if isinstance(names, list) else None


def _row(model: ModelFolder) -> str:
    config = model.config
    inputs, outputs = (", ".join(map(_tensor, config[side])) for side in ("input", "output"))
    return f"| `{model.name}` | {config['backend']} | {inputs} | {outputs} |"


def _tensor(field: Mapping[str, Any]) -> str:
    kind = field["data_type"].removeprefix("TYPE_")
    return f"`{field['name']}`{'?' if field.get('optional') else ''} {kind} {field['dims']}"


def _code(text: str) -> str:
    """Write a name so that nothing in it is markup."""
    return f"`{text}`" if text.isprintable() and "`" not in text else repr(text).replace("`", "'")


def _place(options: RepositoryOptions) -> str:
    if options.self_contained:
        return "The files that they need are in their folders."
    return f"""They open the compiled directory at
{_code(str(options.out))}: mount it there into a container, or change `out` in each
`config.pbtxt`."""


def _versions(models: Sequence[ModelFolder]) -> list[str]:
    told = ["- The models in Python were run in Triton 24.10 (2.51), on a processor."]
    for model in models:
        if model.config["backend"] == "onnxruntime":
            told.append(f"- `{model.name}`: ONNX Runtime 1.24.1 or later, Triton 26.02 or later.")
        if model.built_by is not None:
            told.append(f"- `{model.name}`: TensorRT {model.built_by}, and the Triton that has it.")
    return told


def _waiting(options: RepositoryOptions) -> str:
    if options.max_queued is not None:
        return (
            "**A queue policy is written, as `--max-queued` asked for. It keeps Triton's batcher\n"
            "from waking up: of lone requests 30 in 600 took 500 ms longer** (Triton 24.10)."
        )
    if options.max_delay_us is not None:
        return f"A lone request waits {options.max_delay_us} µs for others, as asked for."
    return (
        "Requests that are there together share a batch, and none waits for others. No queue\n"
        "policy is written: with one, 30 in 600 lone requests took 500 ms longer (Triton 24.10)."
    )
