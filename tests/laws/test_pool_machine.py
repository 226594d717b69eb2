"""The pool under any order of requests, refusals, steering, changed files and time; needs the extra `clients`."""

import math
from dataclasses import replace
from typing import Any

import pytest

import antigravity_proxy as agproxy

pytest.importorskip("hypothesis", reason="hypothesis is not installed: it is in the extra `clients`")

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

ACCOUNTS = tuple(agproxy.Account(name, "k", quota_group=group) for name, group in (("a", "g"), ("b", "g"), ("c", "")))
MODELS = ("gemini-2.5-pro", "gemini-2.5-flash")
ERRORS: Any = [
    lambda: agproxy.RateLimited("Slow down.", retry_after_s=30),
    lambda: agproxy.QuotaGone("The day is used up."),
    lambda: agproxy.CredentialRefused("The key is wrong."),
    lambda: agproxy.ModelGone("There is no such model."),
    lambda: agproxy.Overloaded("Full."),
    lambda: agproxy.UpstreamTimeout("Nothing came."),
]


READY = ("is ready", "is near its limit", "is to be probed")


class PoolMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now = 1768507200.0
        self.accounts = ACCOUNTS
        self.pool = agproxy.AccountPool(ACCOUNTS)
        self.leases: list[agproxy.Lease] = []

    def cooldowns(self) -> list[agproxy.Cooldown]:
        return [each for by_quota in self.pool._cooldowns.by_key.values() for each in by_quota.values()]

    @rule(
        model=st.sampled_from(MODELS),
        key=st.integers(0, 2**32 - 1),
        tried=st.sets(st.sampled_from("abc")),
        again=st.booleans(),
    )
    def acquire(self, model: str, key: int, tried: set[str], again: bool) -> None:
        before = {id(cooldown) for cooldown in self.cooldowns() if cooldown.holds(self.now)}
        seen: list[tuple[str, str]] = []
        lease = self.pool.acquire(model, tried, key, self.now, seen, again)
        assert [name for name, _ in seen] == [account.name for account in self.accounts]
        if lease is None:
            assert not any(state in READY for _, state in seen)
            return
        assert lease.account.name not in tried
        assert lease.account in self.accounts
        own = set(map(id, self.pool._cooldowns.of(lease.entry, model)))
        assert not before & own, "an account was asked in its cooldown"
        self.leases.append(lease)

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), tokens=st.integers(0, 10**6))
    def succeed(self, data: Any, tokens: int) -> None:
        lease = self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1)))
        probes = list(lease.probes)
        self.pool.succeeded(lease, self.now)
        self.pool.release(lease, tokens, self.now)
        left = set(map(id, self.cooldowns()))
        assert not left & set(map(id, probes)), "a probe that was answered ended no cooldown"

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), error=st.sampled_from(ERRORS), chance=st.floats(0, 1))
    def fail(self, data: Any, error: Any, chance: float) -> None:
        lease = self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1)))
        made = error()
        self.pool.failed(lease, made, self.now, chance)
        known = lease.entry in self.pool._entries and lease.entry.account is lease.account  # else it is another one
        cooldown = self.pool._cooldowns.longest(lease.entry, lease.model, self.now)
        assert made.scope == "nobody" or not known or cooldown, "an account that refused is in no cooldown"

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def leave(self, data: Any) -> None:
        lease = self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1)))
        self.pool.release(lease, 0, self.now)
        self.pool.release(lease, 0, self.now)

    @rule(seconds=st.sampled_from([0.1, 1.0, 31.0, 3700.0, 90_000.0, -5.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(
        action=st.sampled_from(agproxy.POOL_ACTIONS), name=st.sampled_from("abcx"), model=st.sampled_from(("", *MODELS))
    )
    def steer(self, action: str, name: str, model: str) -> None:
        assert self.pool.steer(action, name, model) == (name in {account.name for account in self.accounts})

    @rule(count=st.integers(1, 3), key=st.sampled_from("kl"), strategy=st.sampled_from(agproxy.STRATEGIES))
    def reload(self, count: int, key: str, strategy: str) -> None:
        self.accounts = tuple(replace(account, api_key=key) for account in ACCOUNTS[:count])
        self.pool.update(self.accounts, strategy, 0.1)

    @rule()
    def restart(self) -> None:
        rows = self.pool.rows()
        self.pool = agproxy.AccountPool(self.accounts)
        self.pool.restore(rows, self.now)
        self.leases.clear()

    @invariant()
    def every_cooldown_ends_and_has_one_probe(self) -> None:
        for cooldown in self.cooldowns():
            assert math.isinf(cooldown.until) or cooldown.until <= self.now + agproxy.COOLDOWN_END_S_MAX + 5.0 * 50
            assert cooldown.prober is None or not cooldown.prober.ended
        assert all(entry.busy >= 0 for entry in self.pool._entries)

    @invariant()
    def it_can_always_be_told(self) -> None:
        assert len(self.pool.status(self.now)) == len(self.accounts)
        assert self.pool.exhausted(MODELS[0], {}, self.now).status in (401, 403, 404, 429, 502, 503, 504)


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
