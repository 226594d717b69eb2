"""A small version of the soak test (soak.py)."""

from typing import Any

import pytest


@pytest.mark.at_the_end("laws/soak.py", "--streams", "100", "--seconds", "1")
def test_a_hundred_streams_before_a_faulty_upstream_are_intact_and_leave_nothing(beside: dict[str, Any]) -> None:
    ended = beside["laws/soak.py"].result(timeout=240)
    assert (ended.code, "\n0 findings\n" in ended.said) == (0, True), ended.said
