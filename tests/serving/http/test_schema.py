"""What the page of the API says holds for requests that nobody thought of. docs/serving.md tells how to try more."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from http_server import TOKEN, Server
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

EACH = 3  # requests of a kind
OWN_LIMITS = [positive_data_acceptance]  # of the server, and of what its model can draw: the page has those of all


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["right", "wrong"])
def test_as_the_page_says(painter: Server, mode: GenerationMode) -> None:
    """No answer is an error of the server, and each is one of those that the page has."""
    tried = 0
    for found in schemathesis.openapi.from_url(f"{painter.url}/openapi.json").get_all_operations():
        operation = found.ok()

        @settings(max_examples=EACH, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy(generation_mode=mode))
        def holds(case: Any) -> None:
            nonlocal tried
            tried += 1
            case.call_and_validate(headers={"Authorization": f"Bearer {TOKEN}"}, excluded_checks=OWN_LIMITS)

        if mode is GenerationMode.POSITIVE or operation.body:
            holds()
    assert tried > 20
