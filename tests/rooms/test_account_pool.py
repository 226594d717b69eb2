"""The account that is asked next, cooldowns and counts."""

import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime

import pytest

import antigravity_proxy as agproxy

A, B, C = (agproxy.Account(name, "k") for name in "abc")
M = "gemini-2.5-flash"
NOON = 1768507200.0  # 2026-01-15 in Los Angeles
SLOW = agproxy.RateLimited("Slow down.", retry_after_s=30)


class Pool(agproxy.AccountPool):
    """A pool whose accounts are named: `ask` leases the next and says which it was."""

    def ask(self, model: str = M, tried: Sequence[str] = (), key: int = 0, now: float = NOON) -> agproxy.Lease | None:
        return self.acquire(model, tried, key, now, [])

    def name(self, *tried: str, model: str = M, key: int = 0, now: float = NOON) -> str | None:
        """Who answers at once and without trouble."""
        lease = self.ask(model, tried, key, now)
        if lease is not None:
            self.succeeded(lease, now)
            self.release(lease, 0, now)
        return lease and lease.account.name

    def refuse(self, name: str, error: agproxy.UpstreamError = SLOW, model: str = M, now: float = NOON) -> None:
        lease = self.ask(model, [account.name for account in self.accounts if account.name != name], now=now)
        assert lease is not None
        self.failed(lease, error, now, 0.0)


def turns(*accounts: agproxy.Account) -> Pool:
    return Pool(accounts, "round_robin")


# ---- the choice


def test_accounts_answer_in_turn_and_no_tried_one_again() -> None:
    pool = turns(A, B)
    assert [pool.name() for _ in range(3)] == ["a", "b", "a"]
    assert pool.name("a", "b") is None


def test_by_turns_a_weight_counts_and_a_cooldown_is_not_caught_up_with() -> None:
    pool = turns(A, replace(B, weight=3))
    assert Counter(pool.name() for _ in range(40)) == {"a": 10, "b": 30}
    pool.refuse("a", now=NOON)
    assert {pool.name(now=NOON + 1) for _ in range(40)} == {"b"}
    assert Counter(pool.name(now=NOON + 40) for _ in range(40)) == {"a": 10, "b": 30}


def test_fill_first_asks_the_first_as_long_as_it_can() -> None:
    pool = Pool([A, B], "fill_first")
    assert {pool.name() for _ in range(5)} == {"a"}
    pool.refuse("a")
    assert pool.name() == "b"


def test_by_affinity_a_conversation_keeps_its_account_and_only_its_own_cooldown_moves_it() -> None:
    keys = range(3000)
    accounts = [A, B, replace(C, weight=2)]
    before = {key: Pool(accounts).name(key=key) for key in keys}
    assert all(
        abs(count / 3000 - share) < 0.04
        for count, share in zip((Counter(before.values())[name] for name in "abc"), (0.25, 0.25, 0.5), strict=True)
    )
    pool = Pool(accounts)
    pool.refuse("c")
    moved = {key: pool.name(key=key) for key in keys}
    assert all(moved[key] == before[key] for key in keys if before[key] != "c")
    assert {moved[key] for key in keys if before[key] == "c"} == {"a", "b"}
    assert {key: pool.name(key=key, now=NOON + 31) for key in keys} == before


def test_an_account_is_asked_no_more_at_once_than_it_takes() -> None:
    pool = Pool([replace(A, max_concurrency=2)])
    first, second = pool.ask(), pool.ask()
    assert first and second
    assert (pool.ask(), pool.wait_s(M, (), NOON)) == (None, agproxy.POLL_S)
    pool.release(first, 0, NOON)
    pool.release(first, 0, NOON)  # a second time is nothing
    assert pool.ask()
    assert pool.ask() is None


# ---- cooldowns


def test_a_rate_limited_account_is_in_cooldown_until_its_time_for_that_model_alone() -> None:
    pool = turns(A, B)
    pool.refuse("a")
    assert pool.name(now=NOON + 1) == "b"
    assert pool.name("b", now=NOON + 29) is None
    assert pool.name("b", model="other", now=NOON + 1) == "a"
    assert pool.name("b", now=NOON + 30) == "a"


def test_one_quota_is_not_another() -> None:
    minute, day = agproxy.RateLimited("m", retry_after_s=9), agproxy.QuotaGone("d")
    pool = turns(A)
    first, second = pool.ask(), pool.ask()
    assert first and second
    pool.failed(first, day, NOON, 0)
    pool.failed(second, minute, NOON, 0)
    assert pool.name(now=NOON + 10) is None
    assert pool.name(now=NOON + 43201) == "a"


def test_when_the_time_is_over_one_probe_decides() -> None:
    pool = turns(A)
    pool.refuse("a", agproxy.RateLimited("Slow."))
    probe = pool.ask(now=NOON + 5)
    assert probe is not None
    assert pool.ask(now=NOON + 6) is None
    assert pool.wait_s(M, (), NOON + 6) == agproxy.POLL_S
    pool.failed(probe, agproxy.RateLimited("Slow."), NOON + 6, 0)  # twice as long
    assert (pool.ask(now=NOON + 15), pool.wait_s(M, (), NOON + 6)) == (None, 10)
    probe = pool.ask(now=NOON + 16)
    assert probe is not None
    pool.succeeded(probe, NOON + 17)
    assert pool.ask(now=NOON + 17) and pool.ask(now=NOON + 17)
    pool.refuse("a", agproxy.RateLimited("Slow."), now=NOON + 18)
    assert pool.wait_s(M, (), NOON + 18) == 5  # from the beginning again


def test_a_probe_that_ends_without_a_verdict_is_left_to_the_next() -> None:
    pool = turns(A)
    pool.refuse("a")
    for end in (lambda lease: pool.release(lease, 0, NOON), lambda lease: pool.failed(lease, OVERLOADED, NOON, 0)):
        probe = pool.ask(now=NOON + 31)
        assert probe is not None
        assert pool.ask(now=NOON + 31) is None
        end(probe)
    assert pool.name(now=NOON + 31) == "a"


def test_a_probe_that_thinks_keeps_the_others_waiting_for_some_seconds_only() -> None:
    pool = turns(A)
    pool.refuse("a")
    probe, late = pool.ask(now=NOON + 31), NOON + 31 + agproxy.PROBE_S_MAX
    assert probe is not None
    assert pool.ask(now=late - 1) is None
    second = pool.ask(now=late)
    assert second is not None
    pool.release(probe, 0, late + 1)
    assert pool.ask(now=late + 1) is None  # the second is at it
    pool.succeeded(second, late + 2)
    assert pool.ask(now=late + 2)


def test_who_was_refused_probes_nobody_where_another_is_ready() -> None:
    pool = Pool([A, B, C], "fill_first")
    pool.refuse("a")
    pool.refuse("b")
    seen: list[tuple[str, str]] = []
    lease = pool.acquire(M, ["a"], 0, NOON + 31, seen, again=True)
    assert lease is not None
    assert (lease.account.name, seen[1]) == ("c", ("b", "is to be probed"))
    lease = pool.acquire(M, ["a", "c"], 0, NOON + 31, [], again=True)
    assert lease is not None
    assert lease.account.name == "b"


def test_of_several_cooldowns_the_longest_is_told() -> None:
    pool = turns(A)
    first, second = pool.ask(), pool.ask()
    assert first and second
    pool.failed(first, agproxy.RateLimited("minute", retry_after_s=9), NOON, 0)
    pool.failed(second, agproxy.QuotaGone("day"), NOON, 0)
    assert pool.status(NOON)[0]["models"][0]["state"] == "is in cooldown for 43200 s (day): day"


OVERLOADED = agproxy.Overloaded("Busy.", retry_after_s=9)


def test_a_fault_that_is_not_the_accounts_begins_no_cooldown() -> None:
    pool = turns(A)
    pool.refuse("a", OVERLOADED)
    assert pool.name() == "a"


def test_an_answer_that_began_before_the_refusal_ends_no_cooldown() -> None:
    pool = turns(A)
    early, late = pool.ask(), pool.ask()
    assert early and late
    pool.failed(late, SLOW, NOON, 0)
    pool.succeeded(early, NOON + 1)
    assert pool.name(now=NOON + 2) is None


def test_cooldowns_end_apart_and_never_later_than_a_day() -> None:
    ends = set()
    for chance in (0.0, 0.5, 1.0):
        pool = turns(A)
        lease = pool.ask()
        assert lease is not None
        pool.failed(lease, agproxy.QuotaGone("d", retry_after_s=1e9), NOON, chance)
        ends.add(pool.wait_s(M, (), NOON))
    assert ends == {86400, 86415, 86430}
    assert turns(A).name(now=NOON + 86430) == "a"


def test_a_clock_that_was_set_back_keeps_nobody_out() -> None:
    pool = turns(A)
    pool.refuse("a", agproxy.QuotaGone("d"))
    assert pool.name(now=NOON - 7 * 86400) == "a"


def test_a_credentials_refusal_is_of_all_models_and_a_gone_model_of_one() -> None:
    pool = turns(A, B)
    pool.refuse("a", agproxy.CredentialRefused("No."))
    pool.refuse("b", agproxy.ModelGone("No such model."))
    assert pool.name(model="other") == "b"
    assert pool.name() is None
    assert pool.exhausted(M, {}, NOON).status == 502
    pool.refuse("a", agproxy.ModelGone("No such model."), model="x", now=NOON + 61)
    pool.refuse("b", agproxy.ModelGone("No such model."), model="x", now=NOON + 61)
    assert pool.exhausted("x", {}, NOON + 61).status == 404
    assert pool.name(now=NOON + 60) == "a"


def test_a_barred_account_is_out_until_it_changes_or_is_reset() -> None:
    pool = turns(A, B)
    for name in "ab":
        pool.refuse(name, agproxy.AccountBarred("Suspended."))
    assert (pool.name(now=NOON + 1e7), pool.wait_s(M, (), NOON)) == (None, math.inf)
    pool.update([A, replace(B, api_key="new")], "round_robin", 0)
    assert (pool.name(), pool.name("b")) == ("b", None)
    assert pool.steer("reset", "a", "")
    assert pool.name("b") == "a"
    assert not pool.steer("reset", "nobody", "")


def test_a_refusal_of_credentials_that_were_changed_meanwhile_is_of_nobody() -> None:
    pool = turns(A)
    lease = pool.ask()
    assert lease is not None
    pool.update([replace(A, api_key="new")], "round_robin", 0)
    pool.failed(lease, agproxy.CredentialRefused("No."), NOON, 0)
    assert pool.name() == "a"
    pool.update([], "round_robin", 0)
    assert (pool.name(), pool.wait_s(M, (), NOON), pool.exhausted(M, {}, NOON).status) == (None, math.inf, 503)


def test_who_is_ready_is_not_waited_for() -> None:
    pool = turns(A)
    pool.refuse("a")
    assert (pool.wait_s(M, (), NOON), pool.wait_s(M, (), NOON + 30), pool.wait_s(M, ("a",), NOON + 30)) == (
        30,
        0,
        math.inf,
    )


def test_accounts_of_a_group_share_cooldowns_but_not_of_what_is_their_own() -> None:
    pool = turns(*(replace(account, quota_group="p") for account in (A, B)), C)
    pool.refuse("a", agproxy.CredentialRefused("No."))
    assert pool.name("c") == "b"
    pool.refuse("b")
    assert pool.name() == "c"
    assert pool.name("c") is None


@pytest.mark.parametrize(
    ("last", "status"),
    [
        (agproxy.RateLimited("r", retry_after_s=40), 429),
        (agproxy.QuotaGone("d"), 429),
        (agproxy.CredentialRefused("c"), 429),
        (agproxy.Overloaded("o", retry_after_s=3), 503),
        (agproxy.ModelGone("m"), 429),
    ],
)
def test_an_exhausted_pool_has_the_class_of_the_last_refusal_that_is_soon_over(
    last: agproxy.UpstreamError, status: int
) -> None:
    pool = turns(A, B)
    first = agproxy.RateLimited("first", retry_after_s=20)
    for name, error in (("a", first), ("b", last)):
        pool.refuse(name, error)
    told = pool.exhausted(M, {"a": first, "b": last}, NOON)
    assert (told.status, told.code) == (status, (last if last.scope == "nobody" else first).code)
    assert told.retry_after_s == (3 if last.scope == "nobody" else 20)
    assert "a: first" in told.message
    assert f"b: {last.message}" in told.message


def test_who_was_not_asked_any_more_is_free_at_once() -> None:
    pool = turns(A, B, replace(C, max_concurrency=1))
    gone = agproxy.QuotaGone("gone")
    pool.refuse("a", gone)
    told = pool.exhausted(M, {"a": gone}, NOON)
    assert (told.code, told.retry_after_s, "b: was not asked" in told.message) == ("rate_limit_exceeded", 0, True)
    assert pool.ask(tried=["a", "b"])
    assert "c: has max_concurrency requests" in pool.exhausted(M, {"a": gone}, NOON).message
    pool.refuse("b", gone)
    assert pool.exhausted(M, {"a": gone, "b": gone}, NOON).code == "server_is_overloaded"


def test_a_pause_lasts_until_it_is_ended() -> None:
    pool = turns(A, B)
    assert pool.steer("pause", "a", M) and pool.steer("pause", "b", "")
    assert pool.name(now=NOON + 1e6) is None
    told = pool.exhausted(M, {}, NOON)
    assert (told.status, "a: A person paused it" in told.message) == (503, True)
    assert pool.name(model="other") == "a"
    pool.update([replace(A, weight=2), B], "round_robin", 0)
    assert pool.name() is None
    assert pool.steer("resume", "a", M)
    assert pool.name() == "a"


# ---- the ledger

TWO_A_MINUTE = agproxy.RateLimited("Slow.", retry_after_s=1)
TWO_A_MINUTE.quota, TWO_A_MINUTE.limit = "requests_per_minute", 2


def test_who_would_refuse_by_a_limit_that_was_learned_is_asked_last_and_served_it_forgets() -> None:
    pool = Pool([A, B], "fill_first")
    pool.refuse("a", TWO_A_MINUTE)
    later = NOON + 120
    assert [pool.name(now=later + i) for i in range(4)] == ["a", "a", "b", "b"]
    assert pool.status(later)[0]["models"][0]["limits"] == {"requests_per_minute": 2}
    assert pool.name("b", now=later + 5) == "a"
    assert pool.status(later)[0]["models"][0]["limits"] == {}


def test_limits_may_be_given_and_a_share_of_them_reserved() -> None:
    limited = replace(A, limits={"gemini-*": {"tokens_per_day": 1000}})
    for reserve, expected in ((0.0, ["a", "a", "b"]), (0.5, ["a", "b", "b"])):
        pool = Pool([limited, B], "fill_first", reserve)
        asked = []
        for i in range(3):
            lease = pool.ask(now=NOON + 600 * i)
            assert lease is not None
            asked.append(lease.account.name)
            pool.release(lease, 500, NOON + 600 * i)
        assert asked == expected
    assert pool.name(now=NOON + 43200) == "a"  # a new day


def test_limits_that_a_reload_brings_hold_at_once_also_for_models_that_were_asked() -> None:
    pool = Pool([A, B], "fill_first")
    assert pool.name() == "a"
    limited = replace(A, limits={"*": {"requests_per_day": 2}})
    pool.update([limited, B], "fill_first", 0)
    assert [pool.name() for _ in range(2)] == ["a", "b"]
    pool.update([A, B], "fill_first", 0)
    assert pool.name() == "a"


@pytest.mark.parametrize(
    "end",
    [
        lambda pool: pool.update([replace(A, api_key="new"), B], "fill_first", 0),
        lambda pool: pool.steer("reset", "a", ""),
    ],
    ids=["a reload", "a reset"],
)
def test_limits_that_refusals_taught_of_an_account_are_forgotten(end: Callable[[Pool], object]) -> None:
    pool = Pool([A, B, C], "fill_first")
    pool.refuse("a", TWO_A_MINUTE)
    assert pool.status(NOON)[0]["models"][0]["limits"] == {"requests_per_minute": 2}
    end(pool)
    assert pool.status(NOON + 600)[0]["models"][0]["limits"] == {}


def test_a_project_has_the_limits_of_each_of_its_accounts_whoever_is_asked_first() -> None:
    one, other = replace(A, quota_group="p"), replace(B, quota_group="p", limits={"*": {"requests_per_day": 1}})
    pool = Pool([one, other, C], "fill_first")
    assert [pool.name() for _ in range(2)] == ["a", "c"]


def test_a_new_day_begins_also_where_nobody_is_asked() -> None:
    pool = Pool([A])
    pool.name()
    assert pool.status(NOON)[0]["models"][0]["requests_per_day"] == 1
    assert pool.status(NOON + 86400)[0]["models"][0]["requests_per_day"] == 0


def test_a_quotas_refusal_is_not_counted_as_a_request() -> None:
    pool = Pool([A], "fill_first")
    pool.refuse("a", TWO_A_MINUTE)
    pool.name(now=NOON + 31)
    assert pool.status(NOON + 31)[0]["models"][0]["requests_per_day"] == 1


def test_what_outlives_the_process() -> None:
    accounts = [replace(A, quota_group="p"), B, C]
    pool = Pool(accounts, "fill_first")
    assert pool.name() == "a"
    pool.refuse("a", agproxy.QuotaGone("Used up."))
    pool.refuse("b", agproxy.CredentialRefused("No."))
    pool.steer("pause", "c", "")
    again = Pool(accounts, "fill_first")
    again.restore(pool.rows(), NOON + 60)
    assert again.name(now=NOON + 61) == "b"  # its credentials are tried anew
    assert again.name("b", now=NOON + 61) is None
    refused = {"b": agproxy.CredentialRefused("No.")}
    assert again.exhausted(M, refused, NOON + 61).code == "insufficient_quota"
    assert again.status(NOON + 61)[0]["models"][0]["requests_per_day"] == 1
    assert again.name(now=NOON + 43201) == "a"
    tomorrow = Pool(accounts, "fill_first")
    tomorrow.restore(pool.rows(), NOON + 86400)
    assert tomorrow.name(now=NOON + 86400) == "a"
    assert tomorrow.status(NOON + 86400)[0]["models"][0]["requests_per_day"] == 1


def test_another_key_that_came_while_nothing_ran_has_no_cooldown_but_the_pause() -> None:
    pool = Pool([A, B], "fill_first")
    pool.refuse("a", agproxy.QuotaGone("Used up."))
    pool.steer("pause", "b", "")
    for a, expected in ((replace(A, weight=2), [None, None]), (replace(A, api_key="new"), ["a", None])):
        again = Pool([a, replace(B, api_key="new")])
        again.restore(pool.rows(), NOON + 60)
        assert [again.name("b", now=NOON + 61), again.name("a", now=NOON + 61)] == expected
    assert again.status(NOON + 61)[0]["models"][0]["requests_per_day"] == 1


def test_what_is_kept_has_a_bound() -> None:
    pool = turns(A)
    for number in range(agproxy.STATES_MAX + 50):
        pool.refuse("a", agproxy.ModelGone("No."), model=f"m{number}", now=NOON + 1000 * number)
    assert len(pool.rows()) <= 2 * agproxy.STATES_MAX
    assert len(pool._cooldowns.by_key) <= agproxy.STATES_MAX + 1


def test_of_too_many_cooldowns_those_that_end_first_give_way() -> None:
    pool = turns(A)
    pool.steer("pause", "a", "m0")
    for number in range(1, agproxy.STATES_MAX + 50):
        pool.refuse("a", agproxy.ModelGone("No."), model=f"m{number}")
    assert len(pool._cooldowns.by_key) == agproxy.STATES_MAX
    assert pool.name(model="m0") is None


def test_choosing_of_ten_takes_some_microseconds() -> None:
    pool = Pool([agproxy.Account(f"account-{n}", "k") for n in range(10)])
    best = math.inf
    for _ in range(20):
        start = time.perf_counter()
        for key in range(200):
            pool.acquire(M, (), key, NOON, [])
        best = min(best, (time.perf_counter() - start) / 200)
    sys.stdout.write(f"acquire, ten accounts: {best * 1e6:.1f} µs\n")
    assert best < 50e-6


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
def test_the_day_of_the_quotas_ends_at_midnight_in_los_angeles(now: str, midnight: str) -> None:
    seconds = datetime.fromisoformat(now).timestamp()
    assert datetime.fromtimestamp(agproxy.next_midnight(seconds), UTC) == datetime.fromisoformat(midnight)
