"""A short run of the fuzzer of HTTP (fuzz_wire.py)."""

import fuzz_wire
import pytest


def test_damaged_http_of_clients_and_of_gemini(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz_wire, "PATIENCE_S", 0.3)
    monkeypatch.setattr(fuzz_wire, "AT_ONCE", 60)
    summary, failures = fuzz_wire.run(60)
    assert failures == [], summary
