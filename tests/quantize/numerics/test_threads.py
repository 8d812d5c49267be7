"""Pieces of work on threads that do not split them further."""

from __future__ import annotations

import pytest
import torch

from internvl_edge.quantize.numerics.threads import each


@pytest.fixture(autouse=True)
def two_threads(request: pytest.FixtureRequest) -> None:
    before = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(before))
    torch.set_num_threads(2)


def test_results_come_in_order_and_the_threads_are_given_back() -> None:
    assert each(lambda n: (n, torch.get_num_threads()), range(5)) == [(n, 1) for n in range(5)]
    assert torch.get_num_threads() == 2


def test_calls_inside_calls_make_no_threads() -> None:
    assert each(lambda n: each(lambda m: n * m, range(3)), range(2)) == [[0, 0, 0], [0, 1, 2]]


def test_what_one_raises_is_raised_and_the_threads_are_given_back() -> None:
    with pytest.raises(ZeroDivisionError):
        each(lambda n: 1 // n, range(3))
    assert torch.get_num_threads() == 2
