"""A model repository of Triton, written whole or not at all.

    REPO/README.md                      how it is started, and with which versions
    REPO/embed_image/config.pbtxt       a folder for each model, as Triton has it
    REPO/embed_image/1/model.py         one import: the class is in ``models``
    REPO/embed_image/1/out/             the directory's files, where it is self-contained
    REPO/embed_image/warmup/image       the first request, which Triton makes itself
    REPO/image_embed/1/image_embed.onnx the image component, where Triton itself runs it

Every folder in REPO is a model, whole by itself: those in a cloud are fetched model by model.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from internvl_edge.artifact.open import Artifact, open_artifact
from internvl_edge.artifact.publish import check_out, check_parent, placed, staging
from internvl_edge.artifact.subset import subset, write_subset
from internvl_edge.errors import UsageError
from internvl_edge.files.disk import (
    nearest_existing,
    open_regular,
    os_errors,
    require_free_disk,
)
from internvl_edge.files.reading import require_unicode
from internvl_edge.integrations.triton.component import component_model, require_computable
from internvl_edge.integrations.triton.config import text_of
from internvl_edge.integrations.triton.folder import CONFIG, VERSION, ModelFolder
from internvl_edge.integrations.triton.front import front_model
from internvl_edge.integrations.triton.options import RepositoryOptions
from internvl_edge.integrations.triton.readme import README, listed_files, readme
from internvl_edge.integrations.triton.tasks import TASKS, Task, is_chat
from internvl_edge.runtime.components import OpenComponents

__all__ = ["write_repository"]

MAX_README_NBYTES, MAX_NAMED = 1 << 20, 8
COMPILED = "__pycache__"  # Python's, next to a model.py that Triton has run


def write_repository(options: RepositoryOptions) -> tuple[str, ...]:
    """Write a model repository for a compiled directory.

    Returns:
        The names of its models.

    Raises:
        UsageError: OUT lacks a component that a task needs, or has none that the backend can run;
            REPO exists, holds models of others, or cannot be written.
        ArtifactError: OUT is not what its manifest says.
        ResourceError: the disk is full or fails.
    """
    options = _placed(options)
    artifact = open_artifact(options.out)
    models = _models(artifact, options)
    _require_disk(artifact, options, models)
    with staging(
        options.repo, force=options.force, check=lambda folder: None, is_ours=_is_repository
    ) as directory:
        for model in models:
            _write(artifact, model, directory / model.name)
        files = (path for path in directory.rglob("*") if not path.is_dir())
        names = (path.relative_to(directory).as_posix() for path in files)
        text = readme(artifact.manifest, options, models, names)
        (directory / README).write_text(text, encoding="utf-8")
    return tuple(model.name for model in models)


# --- before the work -----------------------------------------------------------------------------


def _placed(options: RepositoryOptions) -> RepositoryOptions:
    """Make both paths absolute, and refuse those that cannot be."""
    out = options.out.absolute()  # links stay: what a name leads to later is what is served then
    require_unicode(out)
    with os_errors(options.repo):
        repo = placed(options.repo)
        check_parent(repo)
        check_out(repo, force=options.force, is_ours=_is_repository)
        inner, outer = out.resolve(), repo.resolve()
    if inner.is_relative_to(outer) or outer.is_relative_to(inner):
        raise UsageError(f"{repo} and {out} lie within one another; choose another folder")
    return replace(options, out=out, repo=repo)


def _models(artifact: Artifact, options: RepositoryOptions) -> tuple[ModelFolder, ...]:
    """Decide everything that is written."""
    tasks = _tasks(artifact, options)
    component = None if options.backend == "python" else component_model(artifact, options)
    asked = component if options.is_bridged else None
    needed = {name for task in tasks for name in task.needs(artifact.manifest, options.mode)}
    for name in sorted(needed - {asked.name if asked else None}):
        require_computable(artifact, name, options.front_gpu)
    fronts = [front_model(artifact, options, task, asked) for task in tasks]
    return (*fronts, component) if component else tuple(fronts)


def _tasks(artifact: Artifact, options: RepositoryOptions) -> list[Task]:
    """Choose the tasks: those asked for, or all that the directory has components for."""
    manifest, mode = artifact.manifest, options.mode
    if options.tasks is not None:
        components = OpenComponents(artifact, _never)
        for name in options.tasks:
            components.require(*TASKS[name].needs(manifest, mode))
        return [task for task in TASKS.values() if task.name in options.tasks]
    possible = [task for task in TASKS.values() if task.is_stream or not is_chat(manifest)]
    tasks = [t for t in possible if set(t.needs(manifest, mode)) <= set(manifest.components)]
    if not tasks:
        wants = "; ".join(f"{t.name} needs {', '.join(t.needs(manifest, mode))}" for t in possible)
        raise UsageError(
            f"{artifact.path} has {', '.join(manifest.components)}, and no task can do with that: "
            f"{wants}; export again with --components"
        )
    return tasks


def _never(component: str) -> Any:
    raise AssertionError(component)


def _require_disk(
    artifact: Artifact, options: RepositoryOptions, models: tuple[ModelFolder, ...]
) -> None:
    """Refuse what does not fit, where files cannot be hard links."""
    with os_errors(options.repo):
        place = nearest_existing(options.repo.parent)
        is_linked = place.stat().st_dev == options.out.stat().st_dev
    if is_linked:
        return
    files, nbytes = artifact.manifest.files, 0
    for model in models:
        nbytes += sum(files[name].nbytes for name in model.linked.values())
        if model.components:
            part = subset(artifact, model.components)
            nbytes += sum(record.nbytes for record in part.files.values())
    require_free_disk(place, nbytes)


def _is_repository(directory: Path) -> bool:
    """Tell whether a folder was written here.

    Raises:
        UsageError: it was, and has more by now; it names that.
    """
    try:
        with open_regular(directory / README) as file:
            written = listed_files(file.read(MAX_README_NBYTES))
    except FileNotFoundError:
        return False
    if written is None:
        return False
    if others := _others(directory, written):
        more = f" and {len(others) - MAX_NAMED} more" if len(others) > MAX_NAMED else ""
        raise UsageError(
            f"{directory} has more than what internvl-edge wrote: {', '.join(others[:MAX_NAMED])}"
            f"{more}; move that elsewhere, or write to another folder"
        )
    return True


def _others(directory: Path, written: Collection[str]) -> list[str]:
    """List the files in a repository that it was not written with, or the folder of only such."""
    known = {*written, *(str(folder) for name in written for folder in PurePosixPath(name).parents)}
    paths = (path.relative_to(directory) for path in sorted(directory.rglob("*")))
    return [
        str(path)
        for path in paths
        if str(path) not in known and str(path.parent) in known and path.name != COMPILED
    ]


# --- writing -------------------------------------------------------------------------------------


def _write(artifact: Artifact, model: ModelFolder, folder: Path) -> None:
    (folder / VERSION).mkdir(parents=True)
    (folder / CONFIG).write_text(text_of(model.config), encoding="utf-8")
    for name, data in model.written.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    for name, given in model.linked.items():
        artifact.bring(given, folder / name)
    if model.components:
        (folder / VERSION / "out").mkdir()
        write_subset(artifact, model.components, folder / VERSION / "out")
