"""Two hosts: network namespaces with a wire between them; skipped where they cannot be made."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "two_hosts.py"


@pytest.mark.slow
def test_two_hosts_draw_what_one_draws() -> None:
    words = ["red apple, 3d style", "--width", "128", "--height", "128", "--steps", "2"]
    command = [sys.executable, str(SCRIPT), "--modes", "sync", "--timeout", "180", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    if done.returncode == 77:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["mode"] for line in lines] == ["one process", "sync"] and "wire: " in done.stderr
    assert lines[1]["ranks"] == 2 and lines[1]["bytes_sent"] > 0
    assert lines[1]["mse"] <= 1, "at most a grey level of difference"
