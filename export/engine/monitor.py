"""A TensorRT builder's progress, which it calls back, and how it is stopped.

TensorRT wants objects of its own classes. An exception that leaves one of them is lost in native
code, and the build goes on to report success. So nothing raises here: the monitor keeps what went
wrong, and the caller asks for it when the builder has returned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from internvl_edge.files.memory import trim


class Monitor:
    """A builder's progress, told to a function that may stop the build by raising.

    Args:
        report: takes the phase, steps done, steps.
        signals: those that came and wait; the build stops for one.
    """

    def __init__(
        self, report: Callable[[str, int, int], None], signals: Sequence[int] = ()
    ) -> None:
        self.report, self._signals = report, signals
        self.stopped_by: BaseException | None = None
        self._steps: dict[str, int] = {}

    def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
        self._steps[phase] = steps
        self._tell(phase, 0, steps)

    def step_complete(self, phase: str, step: int) -> bool:
        """Report a step; True to go on."""
        return self._tell(phase, step + 1, self._steps.get(phase, step + 1))

    def phase_finish(self, phase: str) -> None:
        trim()  # 10 MB a block of what lowering took, before the engine's bytes are made
        steps = self._steps.pop(phase, 0)
        self._tell(phase, steps, steps)

    def _tell(self, phase: str, done: int, steps: int) -> bool:
        if self.stopped_by is None:
            try:
                self.report(phase, done, steps)
            except BaseException as error:  # an interrupt too; raised again after the build
                self.stopped_by = error
        return not self.is_stopped

    @property
    def is_stopped(self) -> bool:
        """True where the build is to end without an engine."""
        return self.stopped_by is not None or bool(self._signals)
