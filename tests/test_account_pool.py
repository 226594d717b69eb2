"""Who is asked next, who rests until when; and what signatures are remembered."""

from datetime import UTC, datetime

import pytest

import antigravity_proxy as agproxy

A, B = agproxy.Account("a", "k"), agproxy.Account("b", "k")
M = "gemini-2.5-flash"


def test_accounts_answer_in_turn_and_no_tried_one_again() -> None:
    pool = agproxy.AccountPool([A, B])
    assert [pool.acquire(M, [], 0), pool.acquire(M, [], 0), pool.acquire(M, [], 0)] == [A, B, A]
    assert pool.acquire(M, [A, B], 0) is None


def test_a_rate_limited_account_rests_until_its_time_for_that_model_alone() -> None:
    pool = agproxy.AccountPool([A, B])
    pool.failed(A, M, agproxy.RateLimited("slow down", retry_after_s=30), now=100)
    assert pool.acquire(M, [], now=101) is B
    assert pool.acquire(M, [B], now=101) is None
    assert pool.acquire("other", [B], now=101) is A
    assert pool.acquire(M, [B], now=130) is A


def test_a_fault_that_is_not_the_accounts_makes_nobody_rest() -> None:
    pool = agproxy.AccountPool([A])
    pool.failed(A, M, agproxy.Overloaded("busy"), now=0)
    assert pool.acquire(M, [], now=0) is A


@pytest.mark.parametrize(
    ("last", "status", "wait"),
    [
        (agproxy.RateLimited("r", retry_after_s=40), 429, 20),
        (agproxy.CredentialRefused("c"), 502, 20),
        (agproxy.Overloaded("o", retry_after_s=3), 503, 20),
        (agproxy.UpstreamTimeout("t"), 504, 20),
    ],
)
def test_an_exhausted_pool_has_the_class_of_the_last_refusal(
    last: agproxy.UpstreamError, status: int, wait: float
) -> None:
    pool = agproxy.AccountPool([A, B])
    first = agproxy.RateLimited("first", retry_after_s=20)
    for account, error in ((A, first), (B, last)):
        pool.failed(account, M, error, now=0)
    told = pool.exhausted(M, {"a": first, "b": last}, now=0)
    assert (told.status, told.retry_after_s) == (status, wait)
    assert "a: first" in told.message
    assert f"b: {last.message}" in told.message


def test_signatures_are_put_back_for_the_model_that_made_them_and_the_oldest_give_way() -> None:
    memory = agproxy.SignatureMemory(size=2)
    for id in ("one", "two", "three"):
        memory.remember([agproxy.PartEnd(0, agproxy.ToolCall(id, "f", "{}", f"sig-{id}"))], M)
    calls = tuple(agproxy.ToolCall(id, "f", "{}") for id in ("one", "two", "three"))
    request = agproxy.Request("m", (agproxy.Message("assistant", calls),))

    def recalled(model: str) -> list[str | None]:
        return [p.signature for p in memory.recall(request, model).messages[0].parts if isinstance(p, agproxy.ToolCall)]

    assert recalled(M) == [None, "sig-two", "sig-three"]
    assert recalled("gemini-9") == [None, None, None]


@pytest.mark.parametrize("zones", [True, False], ids=["by the system's zones", "by rule"])
@pytest.mark.parametrize(
    ("now", "midnight"),
    [
        ("2026-01-15T20:00:00Z", "2026-01-16T08:00:00Z"),
        ("2026-01-15T07:59:59Z", "2026-01-15T08:00:00Z"),
        ("2026-03-08T07:00:00Z", "2026-03-08T08:00:00Z"),  # the hour before the shortest day
        ("2026-03-08T08:00:00Z", "2026-03-09T07:00:00Z"),
        ("2026-07-01T12:00:00Z", "2026-07-02T07:00:00Z"),
        ("2026-11-01T07:00:00Z", "2026-11-02T08:00:00Z"),  # the longest day
        ("2026-12-31T23:00:00Z", "2027-01-01T08:00:00Z"),
    ],
)
def test_the_day_of_the_quotas_ends_at_midnight_in_los_angeles(
    now: str, midnight: str, zones: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not zones:
        monkeypatch.setattr(agproxy, "pacific_zone", lambda: None)
    seconds = datetime.fromisoformat(now).timestamp()
    assert datetime.fromtimestamp(agproxy.next_midnight(seconds), UTC) == datetime.fromisoformat(midnight)
