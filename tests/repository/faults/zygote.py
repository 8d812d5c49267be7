"""Runs commands in forked children, everything imported: a fault costs no start-up.

Reads one JSON object a line, ``{"argv": [...], "stderr": path, "limits": {"RLIMIT_AS": n}}``, and
answers ``{"pid": n}``: a child that is stopped, for a tracer to attach. ``{"wait": pid}`` is
answered by ``{"status": n}``, negative for a signal. Computes nothing itself, so that a fork
carries no threads.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import traceback
from typing import Any

import onnx  # noqa: F401
import onnxruntime  # noqa: F401
import torch.onnx  # noqa: F401

import internvl_edge.cli
from internvl_edge import compiler


def run(order: dict[str, Any]) -> None:
    """What the child does; never returns."""
    os.setsid()
    file = os.open(order["stderr"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(file, 1)
    os.dup2(file, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name, limit in order.get("limits", {}).items():
        resource.setrlimit(getattr(resource, name), (limit, limit))
    sys.argv = ["internvl-edge", *order["argv"]]
    os.kill(os.getpid(), signal.SIGSTOP)
    code: Any = 1
    try:
        internvl_edge.cli.main()
        code = 0
    except SystemExit as exit_:
        code = exit_.code
    except KeyboardInterrupt:  # the second one, where the command had already answered the first
        code = 130
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        try:  # noqa: SIM105 - the second one, when all is over, would come in a call of suppress
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        except KeyboardInterrupt:
            pass
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 0 if code is None else 1)


def main() -> None:
    assert compiler.export and compiler.ExportOptions  # imported when first asked for
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            answer = {"status": os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1])}
        else:
            pid = os.fork()
            if pid == 0:
                run(order)
            os.waitpid(pid, os.WUNTRACED)
            answer = {"pid": pid}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
