"""A compiled directory on disk: its format, how it is opened, and how it is published.

manifest     ``manifest.json``: the components, their tensors, and every file; start here
components   the table of what a checkpoint is compiled into
schema       what is read of the objects in it
open         a directory that is checked before anything in it is used
pins         what was verified, compared again when it is used
publish      a directory that appears whole or not at all
subset       the same with fewer components, for a machine that needs no more
workspace    what an interrupted compilation has finished, for the same command to go on
onnx_gate    an ONNX file, judged before a native parser reads it;  onnx_wire  its bytes
safetensors  headers of weights files, parsed and validated
sidecar      what is written down about a built engine;  census  its layers
"""

from internvl_edge.artifact.manifest import (
    CHECKPOINT_FILE,
    MANIFEST,
    SCHEMA_VERSION,
    ComponentRecord,
    EngineRecord,
    FileRecord,
    Manifest,
    TensorSpec,
)
from internvl_edge.artifact.open import Artifact, open_artifact
from internvl_edge.artifact.pins import Watch

__all__ = [
    "CHECKPOINT_FILE",
    "MANIFEST",
    "SCHEMA_VERSION",
    "Artifact",
    "ComponentRecord",
    "EngineRecord",
    "FileRecord",
    "Manifest",
    "TensorSpec",
    "Watch",
    "open_artifact",
]
