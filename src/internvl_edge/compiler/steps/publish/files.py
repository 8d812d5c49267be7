"""Everything published besides graphs and weights: copied files, the list, report, manifest."""

from __future__ import annotations

from dataclasses import dataclass, replace

from internvl_edge._version import __version__
from internvl_edge.artifact import ComponentRecord, Manifest
from internvl_edge.artifact.publish import record, write_manifest
from internvl_edge.compiler.cost import Cost
from internvl_edge.compiler.plan import Plan
from internvl_edge.compiler.progress import Progress
from internvl_edge.compiler.report.readme import readme
from internvl_edge.compiler.report.report import with_report
from internvl_edge.compiler.steps.step import Build
from internvl_edge.export.checkpoint.shards import source_files
from internvl_edge.export.checkpoint.side_files import passed_on, read_side_file
from internvl_edge.files.terminal import printable

README = "README.md"


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyFiles:
    """Copy what a runtime reads besides the graphs."""

    def costs(self, plan: Plan) -> tuple[Cost, ...]:
        return ()

    def run(self, plan: Plan, build: Build) -> None:
        for name in passed_on(plan.checkpoint.path, plan.checkpoint.config):
            if (data := read_side_file(plan.checkpoint.path, name)) is not None:
                (build.directory / name).write_bytes(data)


@dataclass(frozen=True, slots=True, kw_only=True)
class ListFiles:
    """List every file, and say in README.md what they are; what was brought is known."""

    def costs(self, plan: Plan) -> tuple[Cost, ...]:
        return ()

    def run(self, plan: Plan, build: Build) -> None:
        for name, text in plan.options.notes.items():
            (build.directory / name).write_text(text, encoding="utf-8")
        brought = build.brought
        files = {
            path.name: brought[path.name].record if path.name in brought else record(path)
            for path in sorted(build.directory.iterdir())
            if path.is_file()
        }
        manifest = replace(_described(plan, build), files=files)
        path = build.directory / README
        path.write_text(readme(manifest), encoding="utf-8")
        build.manifest = replace(manifest, files={**files, README: record(path)})


def _described(plan: Plan, build: Build) -> Manifest:
    """Make the manifest, without files."""
    calibration = build.calibration
    unverified = {"skipped": "not verified: --verify none"}
    return Manifest(
        tool_version=__version__,
        precision=plan.options.precision,
        model=plan.checkpoint.config.to_json(),
        image_size=plan.image_size,
        preprocessing=plan.preprocessing.to_json(),
        recipe=None if plan.recipe is None else plan.recipe.to_json(),
        source={
            "checkpoint": printable(plan.checkpoint.path.resolve().name),
            "files": source_files(plan.checkpoint.shards),
            "weights": {name: shard.how for name, shard in build.brought.items()},
            "calibration": None
            if calibration is None
            else {
                "name": calibration.name,
                "samples": len(calibration),
                "sha256": calibration.digest,
                "skipped": list(calibration.skipped),
            },
        },
        components={
            name: ComponentRecord(
                file=graph.file,
                inputs=graph.inputs,
                outputs=graph.outputs,
                nbytes=graph.nbytes,
                verification=build.figures.get(name, unverified),
            )
            for name, graph in build.graphs.items()
        },
        files={},
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Publish:
    """Write the report and the manifest, the last file of a directory that is then complete."""

    def costs(self, plan: Plan) -> tuple[Cost, ...]:
        return ()

    def run(self, plan: Plan, build: Build) -> None:
        assert build.manifest is not None
        plan.checkpoint.require_unchanged()
        build.manifest = with_report(build.directory, build.manifest)
        build.report(Progress(step="publish", detail=str(plan.options.out), done=0, total=1))
        write_manifest(build.directory, build.manifest)
        build.work.publishing(build.directory)
