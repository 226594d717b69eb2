"""What agproxy costs, as ratios to a minimal aiohttp pass-through that transforms nothing.

Two commands, less than half an hour:

    python3 -m venv .venv && .venv/bin/pip install -q aiohttp click pyyaml
    .venv/bin/python tests/bench/bench.py

The gateway has one core to itself; a fake Gemini and the load generator, a process each, share the others. In each round
the gateways run in new processes that were warmed up, and take several short turns one after another, so that a ratio
compares neighbours in time and does not depend on what was measured before. Every stream is checked event by event. CPU
is the clock of the gateway's own process. The pass-through is measured twice: how far the median of its ratios to itself
may be off is the noise, and below it no verdict is given (from eight rounds on the odd ones count less); nor is one where
the chunks of a paced stream piled up because a core was full, for they cost less by the heap. The exit code is 1 when an
answer of agproxy or of the pass-through was wrong, lost, doubled or out of order, and never because of a ratio. Linux
only; on a busy machine `nice -n -10` in front, as root, keeps other work away.

    --quick                     the correctness of every workload, in seconds, without verdicts
    --only 'burst*'             some workloads
    --before old.py             another version of the file in the same rounds, and the ratio to it
    --gateway env/bin/python    another environment, such as one with orjson and uvloop
"""

import argparse
import contextlib
import datetime
import fnmatch
import json
import os
import platform
import re
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import gateways
import report
from gateways import Gateway, Kind, Partner
from meters import cores, raise_file_limit
from report import AGAIN, AGPROXY, BEFORE, DIRECT, YARDSTICK, Row
from workloads import WORKLOADS, Workload, quick

LIMIT_S = 120.0
PEER_LIMIT_S = 600.0
CROWDED = 0.1
TRIES = 2
TURNS = 6
"""Of each gateway in a round: what slows the machine for some seconds slows them all."""
NEEDED = {YARDSTICK, AGAIN, AGPROXY, BEFORE}
"""Whose faults make the run fail; a peer's are only told."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny counts, one round, no verdicts")
    parser.add_argument("--rounds", type=int, default=5, help="paired rounds (5)")
    parser.add_argument("--only", metavar="NAME", action="append", help="workloads by name or pattern; may be repeated")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also writes all figures there")
    parser.add_argument("--gateway", metavar="PYTHON", default=sys.executable, help="runs agproxy and the pass-through")
    parser.add_argument(
        "--gateway-file", metavar="FILE", type=Path, default=gateways.AGPROXY, help="agproxy's one file"
    )
    parser.add_argument("--before", metavar="FILE", type=Path, help="a second version of the one file, to compare with")
    parser.add_argument("--before-gateway", metavar="PYTHON", help="runs the second version (as --gateway)")
    parser.add_argument("--litellm", metavar="BINARY", help="LiteLLM's proxy (where it is installed: litellm)")
    given = parser.parse_args()
    if not any(selected(workload, given.only) for workload in WORKLOADS):
        parser.error(f"--only: the workloads are {', '.join(workload.name for workload in WORKLOADS)}")
    return given


def selected(workload: Workload, only: Sequence[str] | None) -> bool:
    return not only or any(fnmatch.fnmatch(workload.name, pattern) for pattern in only)


def find_kinds(given: argparse.Namespace, upstream: str, folder: Path) -> list[Kind]:
    """The gateways of this run, in the order of the first round."""
    kinds = [
        gateways.pass_through(YARDSTICK, given.gateway, upstream),
        gateways.agproxy(AGPROXY, given.gateway, given.gateway_file.resolve(), upstream, folder),
    ]
    if given.before:
        python = given.before_gateway or given.gateway
        kinds.append(gateways.agproxy(BEFORE, python, given.before.resolve(), upstream, folder))
    if given.quick:
        return kinds
    kinds.append(gateways.pass_through(AGAIN, given.gateway, upstream))
    if binary := given.litellm or gateways.find_lite_llm(given.gateway):
        kinds.append(gateways.lite_llm(binary, upstream, folder))
    return kinds


class Bench:
    """One run: the processes, the rounds, and what they showed."""

    def __init__(self, kinds: Sequence[Kind], upstream_port: int, load: Partner, folder: Path, quick: bool) -> None:
        self.kinds = list(kinds)
        self.waiting: list[float] = []
        self.rows: dict[tuple[str, str], Row] = {}
        self.latencies: dict[str, dict[str, list[list[float]]]] = {}
        self.faults: dict[str, Counter[str]] = {}
        self.problems: list[str] = []
        self._upstream = {"dialect": "gemini", "port": upstream_port, "pid": 0, "key": ""}
        self._load = load
        self._folder = folder
        self._quick = quick
        self._alive: dict[str, Gateway] = {}

    def play(self, workload: Workload, rounds: int) -> None:
        """All rounds of one workload; each begins with another gateway."""
        for number in range(rounds):
            at = number % len(self.kinds)
            kinds = [*self.kinds[at:], *self.kinds[:at]]
            progress(f"{workload.name}, round {number + 1} of {rounds}")
            if workload.content == "start" or workload.grows or workload.window_s:
                for kind in kinds:
                    if kind.effort == 1 or (number == 0 and not workload.grows):
                        self._try(workload, [kind])
            else:
                self._try(workload, [kind for kind in kinds if kind.effort == 1])
                for kind in kinds:
                    if kind.effort < 1 and number == 0:
                        self._try(workload, [kind])
            if workload.content == "chat":
                self._keep_latency(workload, DIRECT, self._ask(workload, DIRECT, self._upstream))

    def _try(self, workload: Workload, kinds: Sequence[Kind]) -> None:
        """A peer that does not start is left out; the run ends without the others."""
        try:
            self._sample(workload, kinds)
        except gateways.NotStarted as error:
            if kinds[0].name in NEEDED:
                raise SystemExit(str(error)) from None
            self.problems.append(str(error))
            self.kinds.remove(kinds[0])

    def stop(self) -> None:
        for gateway in self._alive.values():
            gateway.stop()

    def _sample(self, workload: Workload, kinds: Sequence[Kind]) -> None:
        if workload.content == "start":
            return self._start(workload, kinds[0])
        if workload.grows:
            return self._grow(workload, kinds[0])
        for kind, results in self._take_turns(workload, kinds):
            units = sum(result["units"] for result in results)
            for result in results if workload.content == "chat" else ():
                self._keep_latency(workload, kind.name, result)
            if not units:
                continue
            measured = {"cpu": sum(result["cpu_s"] for result in results) * 1e6 / units}
            if workload.window_s:
                measured["memory"] = results[0]["memory_kib"] / workload.concurrency
            self._keep(workload, kind.name, measured)
            together = self.rows[workload.name, "cpu"].together
            together.setdefault(kind.name, []).append(units / max(sum(result["reads"] for result in results), 1))

    def _take_turns(self, workload: Workload, kinds: Sequence[Kind]) -> list[tuple[Kind, list[dict[str, Any]]]]:
        """What each gateway of a round showed in its turns; one turn where all of it is one window in time."""
        turns = 1 if self._quick or workload.window_s or kinds[0].effort < 1 else TURNS
        share = min(kind.effort for kind in kinds) / (1 if workload.pause_ms else turns)
        workload = replace(workload, requests=max(workload.concurrency, int(workload.requests * share), 2))
        taken: list[tuple[Kind, list[dict[str, Any]]]] = [(kind, []) for kind in kinds]
        lives = turns if workload.afresh else 1
        for _ in range(lives):
            with contextlib.ExitStack() as stack:
                alive = {kind.name: stack.enter_context(self._gateway(kind)) for kind in kinds}
                for _ in range(turns // lives):
                    for kind, results in taken:
                        results.append(self._calmest(workload, kind, alive[kind.name]))
        return taken

    def _calmest(self, workload: Workload, kind: Kind, gateway: Gateway) -> dict[str, Any]:
        """The one of a few tries in which the gateway waited least for its core; on a quiet machine the first.

        Only streams that are paced are tried again: while the gateway waits, their chunks pile up and cost less. Where
        memory is told too they are not: what the first try left behind would serve the second.
        """
        tries: list[dict[str, Any]] = []
        while len(tries) < (TRIES if workload.pause_ms and not (workload.window_s or self._quick) else 1):
            tries.append(self._ask(workload, kind.name, asked(gateway)))
            if crowding(tries[-1]) <= CROWDED:
                break
        return min(tries, key=crowding)

    def _start(self, workload: Workload, kind: Kind) -> None:
        gateway = Gateway(kind, self._folder)
        try:
            measured = {"start": gateway.start_cpu_s * 1000, "idle": gateway.idle_kib() / 1024}
        finally:
            gateway.stop()
        self._keep(workload, kind.name, measured)

    def _grow(self, workload: Workload, kind: Kind) -> None:
        """The cost for one unit of the double size, and its whole cost as a multiple of the single one's.

        Each size has a process of its own, for an allocator serves one size from what another left; they take turns.
        """
        costs = [0.0, 0.0]
        with contextlib.ExitStack() as stack:
            alive = [stack.enter_context(self._gateway(kind)) for _ in costs]
            for _ in range(1 if self._quick else TURNS // 2):
                for at, gateway in enumerate(alive):
                    sized = replace(workload, size=workload.size * (at + 1))
                    result = self._ask(sized, kind.name, asked(gateway))
                    costs[at] += result["cpu_s"] * 1e6 / max(result["requests"], 1) / (TURNS // 2)
        if not all(costs):
            return
        units = 2 * workload.size / (1e6 if workload.content == "event" else 1)
        self._keep(workload, kind.name, {"cpu": costs[1] / units})
        self.rows[workload.name, "cpu"].doubled.setdefault(kind.name, []).append(costs[1] / costs[0])

    @contextlib.contextmanager
    def _gateway(self, kind: Kind) -> Iterator[Gateway]:
        """A process for this measurement only: what an allocator kept from other work would change its cost."""
        if self._quick and kind.name in self._alive:
            yield self._alive[kind.name]
            return
        gateway = self._alive[kind.name] = Gateway(kind, self._folder)
        try:
            yield gateway
        finally:
            if not self._quick:
                gateway.stop()

    def _ask(self, workload: Workload, name: str, whom: Mapping[str, Any]) -> dict[str, Any]:
        limit_s = LIMIT_S if name in NEEDED else PEER_LIMIT_S
        self._load.say(json.dumps({"workload": asdict(workload), **whom, "limit_s": limit_s}))
        result: dict[str, Any] = json.loads(self._load.hear())
        self.faults.setdefault(name, Counter()).update(result["faults"])
        if name in NEEDED:
            self.waiting.append(crowding(result))
        if result["problem"]:
            self.problems.append(f"{workload.name}, {name}: {result['problem']}")
        return result

    def _keep(self, workload: Workload, name: str, measured: dict[str, float]) -> None:
        for target in workload.targets:
            key = workload.name, target.metric
            self.rows.setdefault(key, Row(workload, target)).add(name, measured[target.metric])

    def _keep_latency(self, workload: Workload, name: str, result: dict[str, Any]) -> None:
        if result["latency_s"] and result["first_s"]:
            seen = self.latencies.setdefault(workload.name, {})
            seen.setdefault(name, []).append([*result["latency_s"], *result["first_s"]])

    def failed(self) -> bool:
        return any(faults for name, faults in self.faults.items() if name in NEEDED or name == DIRECT)


def asked(gateway: Gateway) -> dict[str, Any]:
    """Whom the load generator asks, in which dialect."""
    return {"dialect": gateway.kind.dialect, "port": gateway.port, "pid": gateway.pid, "key": gateway.kind.key}


def crowding(result: Mapping[str, Any]) -> float:
    """The part of a measurement in which the gateway waited for its core while others had it."""
    return float(result["waited_s"] / result["wall_s"]) if result["wall_s"] else 0.0


def progress(text: str) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{text}")
    else:
        sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


# ---- the report


def machine(given: argparse.Namespace, rounds: int) -> dict[str, Any]:
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    gateway, rest = cores()
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": model[1] if model else platform.machine(),
        "cores": os.cpu_count(),
        "kernel": f"{platform.system()} {platform.release()}",
        "load_average": os.getloadavg()[0],
        "pinned": "gateway, upstream and load generator share one core"
        if gateway == rest
        else f"gateway on core {min(gateway)}, the rest on {', '.join(map(str, sorted(rest)))}",
        "versions": {**gateways.versions(given.gateway), **lite_llm_version(given)},
        "rounds": rounds,
    }


def lite_llm_version(given: argparse.Namespace) -> dict[str, str]:
    binary = None if given.quick else given.litellm or gateways.find_lite_llm(given.gateway)
    python = Path(binary).resolve().parent / "python" if binary else None
    found = gateways.versions(str(python)) if python and python.exists() else {}
    return {"LiteLLM": found["litellm"]} if "litellm" in found else {}


def about(told: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in told["versions"].items())
    return (
        f"{told['date']}; {told['cpu']}, {told['cores']} cores, {told['kernel']}, load average "
        f"{told['load_average']:.1f}; {told['pinned']}; {versions}; rounds: {told['rounds']}.\n"
        "Absolute figures are the best round; ratios are to `pass`: the median of the rounds (lowest–highest).\n"
    )


def print_report(bench: Bench, told: dict[str, Any]) -> None:
    rows = list(bench.rows.values())
    names = [kind.name for kind in bench.kinds]
    peers = [name for name in names if name not in (YARDSTICK, AGPROXY, AGAIN)]
    plain, growing = [row for row in rows if not row.workload.grows], [row for row in rows if row.workload.grows]
    texts = [about(told), crowd_line(bench)]
    if plain:
        texts.append(report.cost_table(plain, peers))
    if growing:
        texts.append(report.growth_table(growing))
    if bench.latencies:
        titles = {row.workload.name: row.workload.title for row in rows}
        shown = [name for name in names if name != AGAIN]
        texts.append(report.latency_table(titles, bench.latencies, shown))
    texts.append("\n".join(fault_lines(bench)))
    sys.stdout.write("\n" + "\n".join(texts) + "\n")


def crowd_line(bench: Bench) -> str:
    crowded = sum(waited > CROWDED for waited in bench.waiting)
    return (
        f"Other work took the gateway's core for more than {CROWDED:.0%} of the time in {crowded} of "
        f"{len(bench.waiting)} measurements.\n"
    )


def fault_lines(bench: Bench) -> list[str]:
    lines = [
        f"{name}: " + (", ".join(f"{count} {kind}" for kind, count in faults.items()) or "no fault")
        for name, faults in bench.faults.items()
    ]
    return ["Errors, lost, doubled and reordered events:", *lines, *bench.problems[:20]]


def write_json(path: Path, bench: Bench, told: dict[str, Any]) -> None:
    rows = [row.as_json() for row in bench.rows.values()]
    faults = {name: dict(counted) for name, counted in bench.faults.items()}
    whole = {
        **told,
        "rows": rows,
        "latencies": bench.latencies,
        "faults": faults,
        "problems": bench.problems,
        "waiting": bench.waiting,
    }
    path.write_text(json.dumps(whole, indent=1))


def main() -> int:
    given = parse_arguments()
    raise_file_limit()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that no process is left behind
    os.sched_setaffinity(0, cores()[1])
    rounds = 1 if given.quick else given.rounds
    told = machine(given, rounds)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        upstream, load = Partner("upstream.py"), Partner("load.py")
        stack.callback(upstream.stop)
        stack.callback(load.stop)
        port = int(upstream.hear())
        bench = Bench(find_kinds(given, f"http://127.0.0.1:{port}", folder), port, load, folder, given.quick)
        stack.callback(bench.stop)
        for workload in WORKLOADS:
            if selected(workload, given.only):
                bench.play(quick(workload) if given.quick else workload, rounds)
    progress("")
    print_report(bench, told)
    if given.json:
        write_json(given.json, bench, told)
    return int(bench.failed())


if __name__ == "__main__":
    sys.exit(main())
