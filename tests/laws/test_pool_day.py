"""A day of an account pool: the real retry loop and real error bodies against three projects, by an injected clock.

Five accounts: a and b share a project and say so, c and d share one and do not, e has its own. Each project has its own
quota for each model, by the minute and by the day, that Gemini's fixed windows count; there are hours of overload, a key
that is refused for a while, and an account without one of the models. A judge that knows only what was answered holds
the pool to its promises.
"""

import asyncio
import copy
import random
import selectors
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import DATA, read_yaml

import antigravity_proxy as agproxy

ERRORS = {row["about"]: row for row in read_yaml(DATA / "errors.yaml")}
START = 1768456800.0  # 2026-01-15, 06:00 UTC: the quotas' day ends two hours later
DAY_S = 86400.0
FLASH, PRO = "gemini-2.5-flash", "gemini-2.5-pro"
QUOTAS = {FLASH: (10, 2000), PRO: (4, 350)}  # a project's requests, a minute and a day
PROJECTS = {"a": "p1", "b": "p1", "c": "p2", "d": "p2", "e": "p3"}
REQUESTS = {FLASH: 6000, PRO: 2000}
BURST = 20


class Skipping(selectors.DefaultSelector):
    """Does not wait: what would be waited for is over at once."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        events = super().select(0)
        if not events and timeout:
            self.now += timeout
        return events


class SkippingLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self.skipping = Skipping()
        super().__init__(self.skipping)

    def time(self) -> float:
        return self.skipping.now


class Gemini:
    """Three projects' quotas, as Google counts them."""

    def __init__(self, clock: Callable[[], float], chance: random.Random) -> None:
        self.clock = clock
        self.chance = chance
        self.used: Counter[tuple[str, str, float]] = Counter()

    def refusal(self, about: str, **changes: str) -> agproxy.UpstreamError:
        """The error that one row of the real bodies makes, with another delay or limit."""
        row = copy.deepcopy(ERRORS[about])
        for detail in row["body"]["error"].get("details", []):
            for violation in detail.get("violations", []):
                violation |= {key: value for key, value in changes.items() if key == "quotaValue"}
            detail |= {key: value for key, value in changes.items() if key == "retryDelay" and key in detail}
        return agproxy.classify_error(row["status"], row["body"])

    async def call(self, account: str, model: str) -> None:
        """Answers, or raises what Google would say."""
        now = self.clock()
        await asyncio.sleep(self.chance.uniform(0.1, 0.4))
        if account == "b" and START + 5 * 3600 < now < START + 6 * 3600:
            raise self.refusal("a key that is none")
        if account == "e" and model == PRO:
            raise self.refusal("a model that is not there")
        if self.chance.random() < (0.2 if START + 9 * 3600 < now < START + 10 * 3600 else 0.005):
            raise self.refusal(self.chance.choice(["capacity, as a 503 with a RetryInfo", "a full model"]))
        if self.chance.random() < 0.002:
            raise self.refusal("a bare 429, as Vertex gives it; the wait grows from probe to probe")
        project = PROJECTS[account]
        minute, day = QUOTAS[model]
        windows = ((project, model, now // 60), (project, model, agproxy.next_midnight(now)))
        if self.used[windows[1]] >= day:
            raise self.refusal(
                "a day's requests of the free tier, with a RetryInfo that tells nothing", quotaValue=f"{day}"
            )
        if self.used[windows[0]] >= minute:
            left = f"{60 - now % 60:.6f}s"
            raise self.refusal("a minute's requests", quotaValue=f"{minute}", retryDelay=left)
        self.used.update(windows)
        await asyncio.sleep(self.chance.uniform(0.5, 5))


class Judge:
    """Remembers what was answered, and what follows from it for whoever may be asked."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.rests: dict[tuple[str, str, str], tuple[float, float]] = {}
        self.probing: set[tuple[str, str, str]] = set()
        self.figures: Counter[str] = Counter()
        self.wrong: list[str] = []

    def keys(self, account: str, model: str) -> list[tuple[str, str, str]]:
        owners = [account, "p1"] if PROJECTS[account] == "p1" else [account]
        return [key for key in self.rests if key[0] in owners and key[1] in ("", model)]

    def has_reason(self, account: str, model: str) -> bool:
        """Whether the account was refused, and its time is not over, a tenth of jitter included."""
        now = self.clock()
        return any(now <= self.rests[key][1] or key in self.probing for key in self.keys(account, model))

    def asked(self, account: str, model: str) -> list[tuple[str, str, str]]:
        self.figures["upstream calls"] += 1
        now, probes = self.clock(), []
        for key in self.keys(account, model):
            if now < self.rests[key][0]:
                self.wrong.append(f"{account} was asked for {model} {self.rests[key][0] - now:.1f} s before its time")
            elif key in self.probing:
                self.wrong.append(f"{account} was asked for {model} beside its probe")
            else:
                self.probing.add(key)
                probes.append(key)
                self.figures["half-open probes"] += 1
        return probes

    def answered(self, account: str, model: str, probes: list[Any], error: agproxy.UpstreamError | None) -> None:
        now = self.clock()
        self.probing -= set(probes)
        if error is None:
            for key in probes:
                self.rests.pop(key, None)
            return
        self.figures[f"refused: {type(error).__name__}"] += 1
        if error.scope == "nobody":
            return
        owner = "p1" if PROJECTS[account] == "p1" and error.scope == "project" else account
        key = (owner, "" if error.scope == "account" else model, error.quota)
        rest_s = error.retry_after_s or {"day": agproxy.next_midnight(now) - now}.get(
            error.quota[-3:], error.cooldown_s
        )
        rest_s = max(1.0, rest_s)
        least = max(now + rest_s, self.rests.get(key, (0.0, 0.0))[0])
        grown = 3600.0 if error.retry_after_s is None and error.quota[-3:] != "day" else rest_s  # from probe to probe
        self.rests[key] = (least, max(now, least) + max(rest_s, grown) * 1.1 + 1)


class Day:
    def __init__(self, loop: SkippingLoop, seed: int) -> None:
        self.loop = loop
        self.chance = random.Random(seed)
        self.gemini = Gemini(self.clock, self.chance)
        self.judge = Judge(self.clock)
        accounts = [agproxy.Account(name, "k") for name in PROJECTS]
        accounts[:2] = [replace(account, quota_group="p1") for account in accounts[:2]]
        self.upstream = agproxy.Upstream(agproxy.Config(tuple(accounts)))
        self.upstream.clock = self.clock

    def clock(self) -> float:
        return START + self.loop.time()

    async def request(self, model: str, conversation: int) -> None:
        trace = agproxy.Trace(self.upstream._config, "req", "chat", self.clock(), mapped_model=model)
        trace.affinity = agproxy.zlib.crc32(b"%d" % conversation)

        async def ask(lease: agproxy.Lease) -> str:
            account = lease.account.name
            probes = self.judge.asked(account, model)
            error: agproxy.UpstreamError | None = None
            try:
                await self.gemini.call(account, model)
            except agproxy.UpstreamError as refused:
                error = refused
                raise
            finally:
                self.judge.answered(account, model, probes, error)
            return account

        question: Any = SimpleNamespace(ask=ask, mends=lambda error: False, barred={})
        self.judge.figures["requests"] += 1
        began = self.clock()
        try:
            self.judge.figures[f"served by {await self.upstream._retry(question, trace)}"] += 1
            self.judge.figures["served after a wait or a retry"] += self.clock() - began > 8
        except agproxy.PoolExhausted as error:
            self.failed(trace, model, error)

    def failed(self, trace: agproxy.Trace, model: str, error: agproxy.PoolExhausted) -> None:
        tried = {step.account for step in trace.decisions if step.account}
        if trace.attempts == agproxy.ATTEMPTS_MAX:
            self.judge.figures["failed: 3 refusals that nothing could foretell"] += 1
            return
        self.judge.figures[f"failed: everything rested (HTTP {error.status})"] += 1
        for account in PROJECTS:
            if account not in tried and not self.judge.has_reason(account, model):
                self.judge.wrong.append(f"{account} was left untried for {model}: {error.message}")

    async def live(self) -> None:
        """Requests as people make them: a night's trickle, a busy noon, and bursts of an agent's."""
        ends = []
        for model, count in REQUESTS.items():
            for _ in range(count // BURST):
                at = DAY_S * self.chance.betavariate(2, 2)
                conversation = self.chance.randrange(300)
                ends.append(self.loop.create_task(self.burst(at, model, conversation)))
        await asyncio.gather(*ends)

    async def burst(self, at: float, model: str, conversation: int) -> None:
        await asyncio.sleep(at)
        for _ in range(BURST):
            await self.request(model, conversation)
            await asyncio.sleep(self.chance.expovariate(1))


@pytest.mark.parametrize("seed", [1, 2])
def test_a_day_of_five_accounts_in_three_projects(seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    loop = SkippingLoop()

    async def live() -> Day:
        day = Day(loop, seed)
        await day.live()
        rested = day.upstream.pool.status(day.clock())
        assert any("cooldown" in model["state"] for account in rested for model in account["models"])
        await asyncio.sleep(2 * DAY_S)
        pool, now = day.upstream.pool, day.clock()
        for account in PROJECTS:  # every cooldown has ended: each is asked, and that ends it
            for model in QUOTAS:
                lease = pool.acquire(model, PROJECTS.keys() - {account}, 0, now, [])
                assert lease, (account, model)
                pool.succeeded(lease, now)
                pool.release(lease, 0, now)
        states = {model["state"] for row in pool.status(now) for model in row["models"]}
        assert states == {"is ready"}
        await day.upstream.close()
        return day

    try:
        day = loop.run_until_complete(live())
    finally:
        loop.close()
    figures, wrong = day.judge.figures, day.judge.wrong
    with capsys.disabled():
        told = "".join(f"  {count:6} {what}\n" for what, count in sorted(figures.items()))
        sys.stdout.write(
            f"\nA day of five accounts in three projects (seed {seed}):\n{told}  {len(wrong):6} promises broken\n"
        )
    assert wrong[:5] == []
    assert figures["requests"] == sum(REQUESTS.values())
    assert sum(count for what, count in figures.items() if what.startswith("served by")) > 0.8 * figures["requests"]
    assert figures["half-open probes"] > 50
