"""Signals that wait."""

from __future__ import annotations

import signal
import threading

import pytest

from internvl_edge.files.signals import HELD, interrupts_held


@pytest.mark.parametrize("number", HELD)
def test_a_signal_waits_for_the_end(number: signal.Signals) -> None:
    came: list[int] = []
    before = signal.signal(number, lambda n, _: came.append(n))
    try:
        with interrupts_held():
            signal.raise_signal(number)
            signal.raise_signal(number)
            assert came == []
        assert came == [number]
        assert signal.getsignal(number) is not before
    finally:
        signal.signal(number, before)


def test_ctrl_c_is_raised_after_the_block_even_if_it_failed(
    request: pytest.FixtureRequest,
) -> None:
    # a shell that starts a job in the background lets it ignore Ctrl-C
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, usual))
    before = [signal.getsignal(number) for number in HELD]
    with pytest.raises(KeyboardInterrupt) as caught, interrupts_held():
        signal.raise_signal(signal.SIGINT)
        raise ValueError("of the block")
    assert isinstance(caught.value.__context__, ValueError)
    assert [signal.getsignal(number) for number in HELD] == before


def test_other_threads_may_not_touch_signals() -> None:
    seen: list[object] = []

    def work() -> None:
        with interrupts_held():
            seen.append(signal.getsignal(signal.SIGINT))

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]
