"""Images, unit and manifest against what they start; ``make check-deploy`` lints them."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from pathlib import PurePosixPath
from typing import Any

import pytest
import yaml
from support.paths import ROOT

from internvl_edge.cli.serve import serve
from internvl_edge.serve.app import OPEN
from internvl_edge.serve.options import ServeOptions

DOCKERFILES = ("Dockerfile", "Dockerfile.gpu")
UNIT, MANIFEST = (
    ROOT / "examples" / "deploy" / n for n in ("internvl-edge.service", "kubernetes.yaml")
)
STOP_S = ServeOptions().drain_s + ServeOptions().grace_s
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def instruction(dockerfile: str, name: str) -> str:
    """The last one of a name; a line that goes on is one line."""
    text = (ROOT / dockerfile).read_text(encoding="utf-8").replace("\\\n", " ")
    return re.findall(rf"^{name} +(.*)$", text, re.MULTILINE)[-1].strip()


def deployment() -> Any:
    found, _ = yaml.safe_load_all(MANIFEST.read_text(encoding="utf-8"))
    return found["spec"]["template"]["spec"]


def unit(key: str) -> str:
    (value,) = re.findall(rf"^{key}=(.*)$", UNIT.read_text(encoding="utf-8"), re.MULTILINE)
    return str(value)


def commands() -> dict[str, list[str]]:
    started = {name: json.loads(instruction(name, "CMD")) for name in DOCKERFILES}
    started["unit"] = shlex.split(unit("ExecStart"))[1:]
    started["manifest"] = deployment()["containers"][0]["args"]
    return started


@pytest.mark.parametrize("where", commands())
def test_every_command_is_one_of_ours(where: str) -> None:
    name, *arguments = commands()[where]
    assert name == "serve"
    context = serve.make_context("serve", list(arguments))  # an unknown option is an error
    given = context.params
    assert given["key_file"] is not None or given["host"] == "127.0.0.1"
    assert not given["no_auth"]


def test_whoever_stops_it_waits_long_enough() -> None:
    assert float(unit("TimeoutStopSec")) > STOP_S
    assert deployment()["terminationGracePeriodSeconds"] > STOP_S


def test_probes_ask_what_needs_no_key() -> None:
    (container,) = deployment()["containers"]
    paths = {
        container[f"{kind}Probe"]["httpGet"]["path"]
        for kind in ("startup", "readiness", "liveness")
    }
    assert paths == OPEN
    (port,) = container["ports"]
    for name in DOCKERFILES:
        assert port["containerPort"] == int(instruction(name, "EXPOSE")) == ServeOptions().port
        check = instruction(name, "HEALTHCHECK")
        assert f"http://127.0.0.1:{ServeOptions().port}/health" in check


def test_the_key_and_the_model_are_where_they_are_looked_for() -> None:
    spec = deployment()
    mounts = {mount["name"]: mount["mountPath"] for mount in spec["containers"][0]["volumeMounts"]}
    given = serve.make_context("serve", commands()["manifest"][1:]).params
    assert given["key_file"].is_relative_to(PurePosixPath(mounts["key"]))
    assert given["directories"] == (f"model={mounts['model']}",)
    image = serve.make_context("serve", commands()["Dockerfile"][1:]).params
    assert image["key_file"] == given["key_file"]
    assert image["directories"] == (mounts["model"],)
    # who runs it can read the key: files of a secret are root's, and the group's
    user = instruction("Dockerfile", "USER")
    security = spec["securityContext"]
    assert user == f"{security['runAsUser']}:{security['fsGroup']}"
    (secret,) = (v["secret"] for v in spec["volumes"] if "secret" in v)
    assert secret["defaultMode"] == 0o440


@pytest.mark.parametrize("name", DOCKERFILES)
def test_an_image_is_stopped_as_the_server_wants(name: str) -> None:
    assert instruction(name, "STOPSIGNAL") == "SIGTERM"
    assert json.loads(instruction(name, "ENTRYPOINT")) == ["internvl-edge"]  # no shell before it
    _, _, extras = instruction(name, "ARG").partition("EXTRAS=")
    assert set(extras.split(",")) <= set(PROJECT["project"]["optional-dependencies"])


def test_an_image_is_built_of_what_the_wheel_needs() -> None:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    allowed = {line[1:] for line in lines if line.startswith("!")}
    roots = {
        path.partition("/")[0] for path in PROJECT["tool"]["setuptools"]["package-dir"].values()
    }
    files = {PROJECT["project"]["readme"], *PROJECT["project"]["license-files"]}
    assert allowed == roots | files | {"pyproject.toml", "constraints.txt"}
    assert "*" in lines
