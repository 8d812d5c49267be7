"""``python -m internvl_edge``, and the command ``internvl-edge``.

Importing the command line takes a moment, in which Ctrl-C is as likely as at any other.
"""

import json
import os
import signal
import sys
from contextlib import suppress
from typing import NoReturn


def main() -> None:
    """Run the command line; while it is imported there is nothing to clean up after Ctrl-C."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # or a shell ignores it
        signal.signal(signal.SIGINT, _leave)
    from internvl_edge.cli import main as run

    try:
        if signal.getsignal(signal.SIGINT) is _leave:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        run()
    except KeyboardInterrupt:  # just before or after what the command line catches itself
        _leave()


def _leave(*_: object) -> NoReturn:
    with suppress(OSError):  # either may be closed
        os.write(2, b"error: interrupted\n")
    if "--json" in sys.argv:
        error = {"type": "Interrupted", "message": "interrupted", "exit_code": 130}
        with suppress(OSError):
            os.write(1, f"{json.dumps({'error': error})}\n".encode())
    os._exit(130)


if __name__ == "__main__":
    main()
