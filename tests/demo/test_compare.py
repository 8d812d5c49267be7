"""The demo's processes: one for each precision."""

from __future__ import annotations

from pathlib import Path

import pytest

from internvl_edge.demo.compare import compare
from internvl_edge.errors import InternVLError


@pytest.mark.slow
@pytest.mark.parametrize("cores", [1, 2])
def test_a_precision_that_fails_is_named_and_ends_the_others(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    cores: int,
) -> None:
    monkeypatch.setattr("internvl_edge.demo.compare.usable_cores", lambda: cores)
    with pytest.raises(InternVLError, match="fp32: the process that compiled it failed"):
        compare(tmp_path, ("fp32", "int8"), "fp32", force=False)
    assert f"error: fp32: {tmp_path}/fp32" in capfd.readouterr().err
    assert not (tmp_path / "int8").exists()
