"""Makes the helpers of this folder importable, and runs the tests of processes first."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests that share one run of processes come first, so that one worker has them all and no other waits."""
    items.sort(key=lambda item: not item.name.startswith("test_on_processes"))
