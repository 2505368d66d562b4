"""The file of a search: what is computed once is not computed again, unless the search is about something else."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffusion_accel import ConfigurationError
from diffusion_accel.tuning.state import Scores, forget_search, read_search, search_files


def test_scores_are_computed_once_and_kept(tmp_path: Path) -> None:
    state, made = tmp_path / "a.search", []

    def score(value: float) -> list[float]:
        made.append(value)
        return [value, 30.0]

    scores = Scores(state, lambda: {"about": (1, 2)})
    assert not state.exists(), "nothing is written before the first score"
    assert scores.of("x", lambda: score(20.0)) == scores.of("x", lambda: score(21.0)) == [20.0, 30.0]
    scores.of("y", lambda: score(22.0))
    assert made == [20.0, 22.0]
    assert read_search(state) == ({"about": [1, 2]}, {"x": [20.0, 30.0], "y": [22.0, 30.0]})
    again = Scores(state, lambda: {"about": (1, 2)})
    assert again.of("y", lambda: score(23.0)) == [22.0, 30.0] and made == [20.0, 22.0]
    assert Scores(state, lambda: {"about": 3}).of("y", lambda: score(24.0)) == [24.0, 30.0]
    assert read_search(state)[1] == {"y": [24.0, 30.0]}, "another search forgets"
    assert Scores(None, lambda: None).of("x", lambda: score(25.0)) == [25.0, 30.0]


def test_all_files_of_a_search_are_forgotten_and_no_others(tmp_path: Path) -> None:
    names = ["a.search", "a.search.1", "a.search.x", "b.search"]
    for name in names:
        (tmp_path / name).touch()
    assert [f.name for f in search_files(tmp_path / "a.search")] == names[:2]
    forget_search(tmp_path / "a.search")
    assert sorted(f.name for f in tmp_path.iterdir()) == names[2:]


def test_a_damaged_one_is_refused(tmp_path: Path) -> None:
    state = tmp_path / "a.search"
    state.write_text('{"about": 1}\n{"plan": "x"}\n')
    with pytest.raises(ConfigurationError, match="line 2 of the search"):
        Scores(state, lambda: {"about": 1}).of("x", lambda: [1.0])
