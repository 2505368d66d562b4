"""What commands print on the way."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from diffusion_accel.cli import terminal


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """The time that is seen, in seconds; a test sets it."""
    now = [100.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    yield now


def test_a_log_gets_a_line_of_progress_every_half_minute(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    bar = terminal.Bar(quiet=False)
    for seconds, what, share, left in ((0, "a", 0.0, None), (29, "b", 0.1, None), (31, "plans\x1b", 0.25, 75.0),
                                       (59, "d", 0.3, None), (61, "e", 0.5, None)):  # fmt: skip
        clock[0] = 100.0 + seconds
        bar(what, share, left)
    bar.close()
    out, err = capsys.readouterr()
    assert (out, err) == ("", "25% plans\\x1b, 1:15 left\n50% e\n")


def test_quiet_is_quiet(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    bar = terminal.Bar(quiet=True)
    clock[0] += 100.0
    bar("a", 0.5)
    bar.close()
    assert capsys.readouterr().err == ""
