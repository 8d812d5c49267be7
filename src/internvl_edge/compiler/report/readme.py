"""The README.md that a compiled directory carries: what it is, how it was made, how to use it."""

from __future__ import annotations

from internvl_edge.artifact import Manifest
from internvl_edge.artifact.components import CHAT_DECODER, IMAGE_EMBED, JOINED_GRAPH
from internvl_edge.compiler.report.elsewhere import openers
from internvl_edge.runtime.text.tokenizer import MAX_TEXT_LENGTH


def readme(manifest: Manifest) -> str:
    """Write Markdown for a manifest."""
    rows = [
        f"| `{name}` | {', '.join(f'`{spec.name}`' for spec in record.inputs)} | "
        f"{record.outputs[0].name} | {record.nbytes / 1e6:.1f} MB | "
        f"{_figure(record.verification)} |"
        for name, record in manifest.components.items()
    ]
    return f"""# {manifest.source["checkpoint"]} at {manifest.precision}

Compiled by internvl-edge {manifest.tool_version} for images of {manifest.image_size} px.

| component | inputs | first output | weights read | compared with PyTorch fp32 |
|---|---|---|---|---|
{chr(10).join(rows)}

```python
import internvl_edge

{_example(manifest)}
```
{_links(manifest)}{_clip(manifest)}
## Without this runtime

{_openers(manifest)}

`manifest.json` lists every file with its size and sha256, shards that were linked with that of
their header; `internvl-edge verify` checks them, with `--full` every byte.
Engines under `engines/` are bound to the TensorRT version they were built with and, like any
engine, must not be loaded from a source you do not trust: rebuild them with `internvl-edge build`.
"""


def _links(manifest: Manifest) -> str:
    if not manifest.hard_links:
        return ""
    return f"""
{", ".join(f"`{name}`" for name in manifest.hard_links)}: hard links, second names of the
checkpoint's own files. **What edits the one edits the other.** ONNX Runtime and TensorRT accept
them; `onnx.checker`, `onnx.load` and onnx-ir refuse files of two names. A plain copy of this
directory (`cp -r`) has files of its own, as has an export with `--weights copy`.
"""


def _clip(manifest: Manifest) -> str:
    if JOINED_GRAPH not in manifest.files:
        return ""
    return f"""
## With optimum and transformers

`{JOINED_GRAPH}` has both towers, and the inputs and outputs of a CLIP:

```python
from optimum.onnxruntime import ORTModelForZeroShotImageClassification
from transformers import AutoImageProcessor, AutoTokenizer, pipeline

classify = pipeline(
    "zero-shot-image-classification",
    model=ORTModelForZeroShotImageClassification.from_pretrained("this directory"),
    tokenizer=AutoTokenizer.from_pretrained("this directory"),
    image_processor=AutoImageProcessor.from_pretrained("this directory"),
)
classify("photo.jpg", candidate_labels=["cat", "dog"], hypothesis_template="a photo of a {{}}")
```

`config.json` says `clip` for that alone. Labels of more than {MAX_TEXT_LENGTH} tokens need
`tokenizer_kwargs={{"truncation": True}}`.
"""


def _openers(manifest: Manifest) -> str:
    rows = [
        f"| {', '.join(f'`{file}`' for file in one.files)} | {one.program} | {one.place} |"
        for one in openers(manifest)
    ]
    return "\n".join(["| graphs | open with | on |", "|---|---|---|", *rows])


def _example(manifest: Manifest) -> str:
    if IMAGE_EMBED in manifest.components:
        return (
            'with internvl_edge.load("this directory") as model:\n'
            '    embeddings = model.encode_image(["photo.jpg"])'
        )
    if CHAT_DECODER in manifest.components:
        return (
            'with internvl_edge.load("this directory") as model:\n'
            '    print(model.chat("photo.jpg", "What is in the picture?").text)'
        )
    name, record = next(iter(manifest.components.items()))
    feeds = ", ".join(f'"{spec.name}": {spec.name}' for spec in record.inputs)
    return (
        f'with internvl_edge.open_session("this directory", "{name}") as session:\n'
        f"    outputs = session.run({{{feeds}}})"
    )


def _figure(verification: dict[str, object] | None) -> str:
    if not verification or "cosine" not in verification:
        return str((verification or {}).get("skipped", "not verified"))
    return f"cosine {verification['cosine']:.6f}, {verification['sqnr_db']:.1f} dB"
