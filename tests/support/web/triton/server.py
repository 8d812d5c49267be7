"""The real Triton, from NVIDIA's wheel, which is unpacked and not installed.

``make test-triton`` puts it into a folder:

    wheel/      nvidia-pytriton, unpacked: the server, its Python backend and a stub for each Python
    venv/       this package with NumPy 1, which that backend reads BYTES by
    backends/   made here of the wheel's parts, as the server wants them
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from support.paths import ROOT

HOME = Path(os.environ.get("TRITON", ROOT / "out" / "triton"))
PATIENCE_S = 180
MISSING_BACKEND = "unable to find backend library for backend"


@dataclass(frozen=True, slots=True)
class Triton:
    """A server that is ready."""

    process: subprocess.Popen[bytes]
    http: int  # ports
    grpc: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http}"

    def terminate(self) -> int:
        """End it as whatever runs it does; its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE_S)


def backends() -> Path:
    """The folder of backends: Python's alone, with the stub of this Python."""
    folder, parts = HOME / "backends", HOME / "wheel" / "pytriton" / "tritonserver"
    if not folder.exists():
        stub = parts / "python_backend_stubs" / f"{sys.version_info[0]}.{sys.version_info[1]}"
        made = folder.with_name("backends.partial")
        shutil.rmtree(made, ignore_errors=True)
        shutil.copytree(parts / "backends" / "python", made / "python")
        shutil.copytree(stub, made / "python", dirs_exist_ok=True)
        (made / "python" / "triton_python_backend_stub").chmod(0o755)
        made.rename(folder)
    return folder


def command(repositories: Sequence[Path], ports: Sequence[int]) -> tuple[list[str], dict[str, str]]:
    """The command of a server, and its environment.

    The stub takes the packages of the virtual environment whose python3 is first on the path.
    """
    server = HOME / "wheel" / "pytriton" / "tritonserver" / "bin" / "tritonserver"
    server.chmod(0o755)
    arguments = [str(server), f"--backend-directory={backends()}"]
    arguments += [f"--model-repository={repository}" for repository in repositories]
    for kind, port in zip(("http", "grpc", "metrics"), ports, strict=True):
        arguments += [f"--{kind}-address=127.0.0.1", f"--{kind}-port={port}"]
    libraries = [HOME / "wheel" / "nvidia_pytriton.libs", sysconfig.get_config_var("LIBDIR")]
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": ":".join(map(str, libraries)),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    return arguments, environment


@contextmanager
def running(*repositories: Path, log: Path) -> Iterator[Triton]:
    """A server of these model repositories, until the end of the block."""
    ports = free_ports(3)
    arguments, environment = command(repositories, ports)
    with log.open("wb") as file:
        process = subprocess.Popen(
            arguments, env=environment, stdout=file, stderr=subprocess.STDOUT
        )
    triton = Triton(process, ports[0], ports[1], log)
    try:
        _wait(triton)
        yield triton
    finally:
        if process.poll() is None:
            process.terminate()
        try:
            process.wait(PATIENCE_S)
        finally:
            process.kill()


def refused(repository: Path, log: Path) -> str:
    """What a server says that does not come up."""
    arguments, environment = command([repository], free_ports(3))
    with log.open("wb") as file:
        subprocess.run(
            arguments, env=environment, stdout=file, stderr=file, timeout=PATIENCE_S, check=False
        )
    return log.read_text(errors="replace")


def _wait(triton: Triton) -> None:
    for _ in range(PATIENCE_S * 4):
        if triton.process.poll() is not None:
            break
        try:
            urllib.request.urlopen(f"{triton.url}/v2/health/ready", timeout=5).close()
        except (urllib.error.URLError, OSError):
            time.sleep(0.25)
        else:
            return
    raise AssertionError(triton.log.read_text(errors="replace")[-4000:])


def free_ports(count: int) -> list[int]:
    """Ports of this machine alone that nobody has; they may be taken until they are used."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
