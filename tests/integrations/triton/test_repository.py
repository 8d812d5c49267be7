"""A model repository: what is written, what is refused, and what is left where it fails."""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from onnx import TensorProto
from support.web.triton.configs import as_json, config_of
from support.web.triton.directories import EMBEDDING, SIZE, engine, graph_of, write_directory

from internvl_edge import cli
from internvl_edge.artifact import open_artifact
from internvl_edge.artifact.components import COMPONENTS
from internvl_edge.errors import ArtifactError, InternVLError, UsageError
from internvl_edge.integrations.triton import readme, repository
from internvl_edge.integrations.triton.options import RepositoryOptions
from internvl_edge.integrations.triton.repository import write_repository
from internvl_edge.integrations.triton.tasks import TASKS

STRING, FP32 = 13, 11  # inference.DataType
CPU, GPU = 2, 1  # ModelInstanceGroup.Kind


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return write_directory(tmp_path / "out")


def write(out: Path, **how: Any) -> Path:
    repo: Path = how.pop("repo", out.parent / "repo")
    write_repository(RepositoryOptions(out=out, repo=repo, **how))
    return repo


def refused(out: Path, said: str, **how: Any) -> None:
    """It is refused in these words, and nothing of it is there."""
    before = sorted(out.parent.rglob("*"))
    with pytest.raises(InternVLError, match=said):
        write(out, **how)
    assert sorted(out.parent.rglob("*")) == before


def models(repo: Path) -> set[str]:
    return {path.name for path in repo.iterdir() if path.is_dir()}


def parameters(model: Path) -> dict[str, str]:
    return {key: value.string_value for key, value in config_of(model).parameters.items()}


# --- models in Python ----------------------------------------------------------------------------


def test_every_task_is_a_model(out: Path) -> None:
    repo = write(out)
    assert models(repo) == set(TASKS)
    for name in TASKS:
        config = config_of(repo / name)
        assert (config.name, config.backend) == (name, "python")
        group = config.instance_group[0]
        assert (group.kind, group.count, list(group.gpus)) == (CPU, 1, [])
        assert parameters(repo / name)["out"] == str(out)
        source = (repo / name / "1" / "model.py").read_text()
        imported = f"from internvl_edge.integrations.triton import {TASKS[name].model} as Triton"
        assert imported in source
        compile(source, name, "exec")


def test_tensors_are_those_of_the_table(out: Path) -> None:
    repo = write(out)
    config = config_of(repo / "embed_image")
    assert (config.max_batch_size, config.HasField("dynamic_batching")) == (32, True)
    (given,), (made,) = config.input, config.output
    assert (given.name, given.data_type, given.dims) == ("image", STRING, [1])
    assert (made.name, made.data_type, made.dims) == ("embedding", FP32, [EMBEDDING])
    assert [f.name for f in config_of(repo / "classify").input] == ["image", "labels", "templates"]
    config = config_of(repo / "generate")
    assert config.model_transaction_policy.decoupled
    assert (config.max_batch_size, config.HasField("dynamic_batching")) == (0, False)
    optional = {field.name: field.optional for field in config.input}
    assert optional == {"image": False, "prompt": False, "max_new_tokens": True, "stream": True}


def test_nothing_makes_a_lone_request_wait(out: Path) -> None:
    for name in TASKS:
        batching = config_of(write(out, force=True) / name).dynamic_batching
        assert batching.max_queue_delay_microseconds == 0
        assert not batching.HasField("default_queue_policy")
    repo = write(out, force=True, max_delay_us=1000, max_queued=64)
    batching = config_of(repo / "embed_text").dynamic_batching
    assert batching.max_queue_delay_microseconds == 1000
    assert batching.default_queue_policy.max_queue_size == 64
    assert "500 ms longer**" in (repo / "README.md").read_text()


def test_the_first_request_is_in_a_file(out: Path) -> None:
    repo = write(out)
    for name in ("embed_image", "embed_text", "classify"):
        (warmup,) = config_of(repo / name).model_warmup
        for field, given in warmup.inputs.items():
            data = (repo / name / "warmup" / given.input_data_file).read_bytes()
            assert struct.unpack("<I", data[:4])[0] == len(data) - 4
            assert (given.data_type, list(given.dims)) == (STRING, [1])
            assert (data[4:8] == b"\x89PNG") == (field == "image")


def test_options_are_written(out: Path) -> None:
    repo = write(out, device="cuda:3", instances=2, threads=4, max_batch=5, mode="g")
    config = config_of(repo / "embed_image")
    group = config.instance_group[0]
    assert (group.kind, group.count, list(group.gpus)) == (GPU, 2, [3])
    assert config.max_batch_size == 5
    told = parameters(repo / "embed_image")
    assert told == {"out": str(out), "threads": "4", "normalize": "true", "mode": "g"}


def test_a_directory_with_less_has_fewer_models(tmp_path: Path) -> None:
    texts = write_directory(tmp_path / "texts", components=["text_embed"])
    assert models(write(texts)) == {"embed_text"}
    parts = write_directory(tmp_path / "parts", components=["vision", "image_pool"])
    assert models(write(parts, repo=tmp_path / "pooled")) == {"embed_image"}


def test_a_chat_model_answers(tmp_path: Path) -> None:
    out = write_directory(tmp_path / "out", kind="chat")
    repo = write(out)
    assert models(repo) == {"generate"}
    image = config_of(repo / "generate").input[0]
    assert (image.name, list(image.dims), image.optional) == ("image", [-1], True)


def test_a_link_to_the_directory_stays_a_link(out: Path) -> None:
    link = out.parent / "current"
    link.symlink_to(out)
    assert parameters(write(link) / "embed_text")["out"] == str(link)


@pytest.mark.parametrize(
    "name", ["with space", 'quo"ted', "back\\slash", "li\nne", "ü→", "#x", "}"]
)
def test_odd_names(tmp_path: Path, name: str) -> None:
    out = write_directory(tmp_path / name / "out", components=["text_embed"])
    repo = write(out)
    assert parameters(repo / "embed_text")["out"] == str(out)
    assert json.loads(as_json(config_of(repo / "embed_text")))["name"] == "embed_text"
    text = (repo / "README.md").read_text()
    assert text.count("\n## ") == 3  # a name's line is no heading


def test_a_name_that_is_not_unicode(tmp_path: Path) -> None:
    out = write_directory(tmp_path / os.fsdecode(b"caf\xe9"), components=["text_embed"])
    refused(out, "UTF-8", repo=tmp_path / "repo")


# --- self-contained ------------------------------------------------------------------------------


def test_each_model_has_its_own_files(out: Path) -> None:
    repo = write(out, self_contained=True)
    for name, task in TASKS.items():
        inner = repo / name / "1" / "out"
        artifact = open_artifact(inner)
        assert set(artifact.manifest.components) == set(task.needs(artifact.manifest, "c"))
        assert "out" not in parameters(repo / name)
        there = {path.name for path in inner.iterdir()}
        graphs = {f"{component}.onnx" for component in artifact.manifest.components}
        assert there == graphs | {"manifest.json", "weights.bin", "tokenizer.model"}
        assert (inner / "weights.bin").samefile(out / "weights.bin")


def test_other_disks_get_copies(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", _no_link)
    inner = write(out, self_contained=True) / "embed_text" / "1" / "out"
    assert not (inner / "weights.bin").samefile(out / "weights.bin")
    assert (inner / "weights.bin").read_bytes() == (out / "weights.bin").read_bytes()
    open_artifact(inner)


def _no_link(source: Path, target: Path) -> None:
    raise OSError(18, "Invalid cross-device link")


def test_a_file_that_changes_meanwhile(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is written to after it was verified, and before it is copied, or as it is."""

    def link_or_copy(source: Path, target: Path) -> None:
        target.write_bytes(b"x" * source.stat().st_size)

    monkeypatch.setattr("internvl_edge.artifact.open.link_or_copy", link_or_copy)
    refused(out, "changed since it was opened", self_contained=True)


# --- Triton's own backends -----------------------------------------------------------------------


def test_onnxruntime_runs_the_component(out: Path) -> None:
    repo = write(out, backend="onnxruntime", threads=2)
    assert models(repo) == {*TASKS, "image_embed"}
    model = repo / "image_embed"
    config = config_of(model)
    assert (config.backend, config.default_model_filename) == ("onnxruntime", "image_embed.onnx")
    assert config.parameters["intra_op_thread_count"].string_value == "2"
    (given,), (made,) = config.input, config.output
    assert (given.name, given.data_type, given.dims) == ("pixel_values", FP32, [3, SIZE, SIZE])
    assert (made.name, made.dims) == ("image_embeds", [EMBEDDING])
    assert config.model_warmup[0].inputs["pixel_values"].zero_data
    assert (model / "1" / "weights.bin").samefile(out / "weights.bin")
    assert not (model / "1" / "weights.bin").is_symlink()
    assert "image_model" not in parameters(repo / "embed_image")  # beside it on a processor


def test_on_a_gpu_models_ask_the_component(out: Path) -> None:
    repo = write(out, backend="onnxruntime", device="cuda:1")
    group = config_of(repo / "image_embed").instance_group[0]
    assert (group.kind, list(group.gpus)) == (GPU, [1])
    for name in ("embed_image", "classify"):
        assert parameters(repo / name)["image_model"] == "image_embed"
        config = config_of(repo / name)
        assert config.instance_group[0].kind == CPU
        assert not config.model_warmup  # what it asks is opened meanwhile
    assert "image_model" not in parameters(repo / "embed_text")
    assert config_of(repo / "embed_text").model_warmup


def test_int8_on_a_processor_is_the_unsigned_graph(tmp_path: Path) -> None:
    unsigned = graph_of(COMPONENTS["image_embed"], "Identity", TensorProto.FLOAT)
    more = {"image_embed.u8.onnx": unsigned}
    out = write_directory(tmp_path / "out", precision="int8", more=more)
    repo = write(out, backend="onnxruntime")
    assert config_of(repo / "image_embed").default_model_filename == "image_embed.u8.onnx"
    files = {path.name for path in (repo / "image_embed" / "1").iterdir()}
    assert files == {"image_embed.u8.onnx", "weights.bin"}
    assert "1.24.1" in (repo / "README.md").read_text()


def test_tensorrt_has_a_plan_for_each_gpu(tmp_path: Path) -> None:
    engines = [
        engine("image_embed"),
        engine("image_embed", compute_capabilities=("SM120",), minimum_sm=120),
        engine("text_embed"),
        engine("image_embed", target="tensorrt-rtx", compute_capabilities=()),
    ]
    out = write_directory(tmp_path / "out", precision="fp16", engines=engines)
    repo = write(out, backend="tensorrt", device="cuda", max_batch=64)
    config = config_of(repo / "image_embed")
    names = dict(config.cc_model_filenames)
    assert set(names) == {"8.9", "12.0"}
    assert {path.name for path in (repo / "image_embed" / "1").iterdir()} == set(names.values())
    assert config.max_batch_size == 16  # of the profile
    assert list(config.instance_group[0].profile) == ["0"]
    assert config.optimization.cuda.graphs
    assert config_of(repo / "embed_image").max_batch_size == 16
    assert config_of(repo / "embed_text").max_batch_size == 64
    assert "TensorRT 10.16.1.11" in (repo / "README.md").read_text()


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"backend": "onnxruntim"},
            "--backend onnxruntim: expected python, .* did you mean 'onnxruntime'",
        ),
        ({"tasks": ("embed_imag",)}, "--tasks embed_imag: .* did you mean 'embed_image'"),
        ({"tasks": ()}, "found none"),
        ({"mode": "x"}, "--mode x"),
        ({"device": "gpu"}, "--device gpu"),
        ({"max_batch": 0}, "--max-batch 0"),
        ({"instances": 0}, "--instances 0"),
        ({"threads": 0}, "--threads 0"),
        ({"max_delay_us": -1}, "--max-delay-us -1"),
        ({"max_queued": 0}, "--max-queued 0"),
        ({"backend": "tensorrt"}, "add --device cuda:0"),
        ({"backend": "onnxruntime", "mode": "g"}, "leave --backend out"),
    ],
)
def test_options_that_cannot_be(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        RepositoryOptions(out=Path("out"), repo=Path("repo"), **given)


@pytest.mark.parametrize(
    ("components", "how", "said"),
    [
        (["text_embed"], {"tasks": ("classify",)}, "no component image_embed"),
        (["image_embed"], {"tasks": ("generate",)}, "no component vision, image_queries, decoder"),
        (["image_embed"], {"mode": "g"}, "no task can do with that: embed_image needs vision"),
        (["vision"], {}, "no task can do with that"),
        (["text_embed"], {"backend": "onnxruntime"}, "runs image_embed, and .* has text_embed"),
        (["image_embed"], {"backend": "tensorrt", "device": "cuda"}, "has no engine of it"),
    ],
)
def test_a_directory_that_lacks_a_component(
    tmp_path: Path, components: Sequence[str], how: dict[str, Any], said: str
) -> None:
    refused(write_directory(tmp_path / "out", components=components), said, **how)


def test_fp8_is_not_for_triton_s_onnxruntime(tmp_path: Path) -> None:
    out = write_directory(tmp_path / "out", precision="fp8", data_type=TensorProto.FLOAT8E4M3FN)
    refused(out, "FP8 products", backend="onnxruntime")
    assert models(write(out)) == set(TASKS)  # this package opens them


def test_bfloat16_needs_a_gpu(tmp_path: Path) -> None:
    out = write_directory(tmp_path / "out", precision="bf16", data_type=TensorProto.BFLOAT16)
    refused(out, "computes in bfloat16")
    refused(out, "computes in bfloat16", backend="onnxruntime")
    assert models(write(out, device="cuda")) == set(TASKS)


def test_int8_is_slow_in_onnxruntime_on_a_gpu(tmp_path: Path) -> None:
    out = write_directory(tmp_path / "out", precision="int8", op="QuantizeLinear")
    refused(out, "multiplies in 8 bits", device="cuda")
    refused(out, "multiplies in 8 bits", device="cuda", backend="onnxruntime")


@pytest.mark.parametrize(
    ("engines", "said"),
    [
        ([{"target": "tensorrt-rtx"}], "only engines of tensorrt-rtx, another runtime"),
        ([{"builder_version": "10.1"}, {}], "engines of TensorRT 10.1 and 10.16.1.11"),
        ([{"profile": replace(engine("x").profile, batch=(2, 4, 8))}], "takes batches from 2"),
    ],
)
def test_engines_that_triton_cannot_run(
    tmp_path: Path, engines: list[dict[str, Any]], said: str
) -> None:
    sms = ("SM89", "SM90")
    infos = [
        engine("image_embed", compute_capabilities=(sm,), **changed)
        for sm, changed in zip(sms, engines, strict=False)
    ]
    out = write_directory(tmp_path / "out", engines=infos)
    refused(out, said, backend="tensorrt", device="cuda")


def test_no_compiled_directory(tmp_path: Path) -> None:
    refused(tmp_path / "none", "expected a directory")
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "config.json").write_text("{}")
    refused(tmp_path / "checkpoint", "is a checkpoint")


def test_a_damaged_directory(out: Path) -> None:
    (out / "weights.bin").write_bytes(b"\1" * 64)
    with pytest.raises(ArtifactError, match="the file was changed"):
        write(out)


# --- where it goes -------------------------------------------------------------------------------


def test_what_is_there_stays_unless_forced(out: Path) -> None:
    repo = write(out, tasks=("embed_text",))
    refused(out, "exists; pass --force")
    assert models(write(out, force=True)) == set(TASKS)
    assert sorted(path.name for path in repo.parent.iterdir()) == ["out", "repo"]


def test_only_what_was_written_here_is_replaced(out: Path) -> None:
    repo = out.parent / "repo"
    (repo / "other" / "1").mkdir(parents=True)
    refused(out, "not written by internvl-edge", force=True)
    (repo / "README.md").write_text("# mine\n")
    refused(out, "not written by internvl-edge", force=True)


@pytest.mark.parametrize(
    "name",
    [
        "resnet",
        "notes.txt",
        "embed_text/2",
        "embed_text/labels.txt",
        "embed_text/1/mine.py",
        "embed_text/1/out/notes.txt",
        "embed_text/warmup/mine",
        "image_embed/1/model.plan",
    ],
)
def test_what_others_added_is_named_and_stays(out: Path, name: str) -> None:
    repo = write(out, backend="onnxruntime", self_contained=True)
    (repo / name).mkdir()
    (repo / name / "inner").write_text("x")
    refused(out, f"more than what internvl-edge wrote: {name}; move that elsewhere", force=True)
    (repo / name / "inner").unlink()
    (repo / name).rmdir()
    (repo / name).write_text("x")
    refused(out, f"more than what internvl-edge wrote: {name}; move that elsewhere", force=True)
    (repo / name).unlink()
    write(out, force=True)


def test_much_that_others_added_is_counted(out: Path) -> None:
    repo = write(out)
    for number in range(10):
        (repo / "classify" / "1" / f"{number}.txt").write_text("x")
    refused(out, "classify/1/0.txt, .*classify/1/7.txt and 2 more; move", force=True)


def test_what_triton_and_its_users_change_is_replaced(out: Path) -> None:
    """Python leaves what it compiled; a config is meant to be edited."""
    repo = write(out)
    cache = repo / "embed_text" / "1" / "__pycache__"
    cache.mkdir()
    (cache / "model.cpython-312.pyc").write_bytes(b"x")
    (repo / "embed_text" / "config.pbtxt").write_text("edited")
    (repo / "embed_text" / "warmup" / "text").unlink()
    write(out, force=True)
    assert not cache.exists()
    assert config_of(repo / "embed_text").name == "embed_text"


@pytest.mark.parametrize("listed", [None, "<!-- Its files: {} -->", "<!-- Its files: [ -->"])
def test_a_readme_that_lists_nothing_is_not_ours(out: Path, listed: str | None) -> None:
    page = write(out) / "README.md"
    lines = page.read_text().splitlines()
    assert lines[-1].startswith("<!-- Its files: [")
    page.write_text("\n".join([*lines[:-1], *([listed] if listed else [])]))
    refused(out, "not written by internvl-edge", force=True)


def test_a_name_does_not_end_the_list(out: Path) -> None:
    manifest = open_artifact(out).manifest
    options = RepositoryOptions(out=out, repo=out.parent / "repo")
    names = {"a --> b", "c\nd", "é", "README.md"}
    text = readme.readme(manifest, options, [], names)
    assert readme.listed_files(text.encode()) == names
    assert readme.listed_files(b"") is None


def test_places_that_cannot_be(out: Path) -> None:
    refused(out, "lie within one another", repo=out / "repo")
    inner = write(out, self_contained=True) / "embed_text" / "1" / "out"
    with pytest.raises(UsageError, match="lie within one another"):
        write(inner, repo=out.parent / "repo", force=True)
    (out.parent / "file").write_text("x")
    refused(out, "is not a folder", repo=out.parent / "file" / "repo")
    refused(out, "is a file", repo=out.parent / "file")


def test_a_folder_that_cannot_be_written(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # as for others than root
    refused(out, "cannot be written; choose a folder that can")


def test_a_full_disk_leaves_nothing(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr("internvl_edge.artifact.open.link_or_copy", full)
    refused(out, "free some disk space", self_contained=True)


def test_copies_are_counted_before(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(repository, "require_free_disk", lambda place, n: asked.append((place, n)))
    monkeypatch.setattr(repository, "nearest_existing", lambda path: Path("/proc"))
    write(out, self_contained=True, tasks=("embed_text",))
    there = (out.parent / "repo" / "embed_text" / "1" / "out").iterdir()
    nbytes = sum(path.stat().st_size for path in there if path.name != "manifest.json")
    assert asked == [(Path("/proc"), nbytes)]


def test_what_a_killed_run_left_goes(out: Path) -> None:
    (out.parent / ".repo.0123abcd.partial" / "embed_image").mkdir(parents=True)
    repo = write(out)
    assert sorted(path.name for path in repo.parent.iterdir()) == ["out", "repo"]


def test_nobody_else_can_change_it(out: Path) -> None:
    before = os.umask(0)
    try:
        repo = write(out, self_contained=True)
    finally:
        os.umask(before)
    for path in [repo, *repo.rglob("*")]:
        if path.stat().st_nlink == 1 or path.is_dir():
            assert path.stat().st_mode & 0o022 == 0, path


# --- the command ---------------------------------------------------------------------------------


def test_the_command(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    repo = out.parent / "repo"
    arguments = ["triton", str(out), "-o", str(repo), "--tasks", "embed_text,classify"]
    assert cli.run([*arguments, "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told == {"repo": str(repo), "models": ["embed_text", "classify"]}
    assert cli.run(arguments) == 2
    assert re.search("exists; pass --force", capsys.readouterr().err)
    assert cli.run([*arguments, "--force"]) == 0
    assert "embed_text, classify" in capsys.readouterr().out
