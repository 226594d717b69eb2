"""Figures to verdicts, and to the Markdown that is printed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from workloads import LINEAR_MAX, Target, Workload

YARDSTICK, AGAIN, AGPROXY, BEFORE, DIRECT = "pass", "pass again", "agproxy", "before", "no gateway"

PILED_UP = 1.2
"""Chunks a read."""
ROUNDS_MIN = 3

Samples = dict[str, list[float]]
"""Gateway to its value in each round."""


@dataclass
class Row:
    """One metric of one workload: what each gateway needed in each round."""

    workload: Workload
    target: Target
    samples: Samples = field(default_factory=dict)
    doubled: Samples = field(default_factory=dict)
    """How much the double size cost, as a multiple; only where growth is measured."""
    together: Samples = field(default_factory=dict)
    """How many chunks reached the client in one read."""

    def add(self, gateway: str, value: float) -> None:
        self.samples.setdefault(gateway, []).append(value)

    def best(self, gateway: str) -> float:
        return min(self.samples[gateway])

    def ratios(self, gateway: str) -> list[float]:
        """To the yardstick, round by round."""
        pairs = zip(self.samples.get(gateway, []), self.samples.get(YARDSTICK, []), strict=False)
        return [value / unit for value, unit in pairs if unit]

    def judged(self) -> list[float]:
        """What is held against the must, round by round: the growth, or the ratio to the yardstick."""
        return self.doubled.get(AGPROXY, []) if self.workload.grows else self.ratios(AGPROXY)

    def must(self) -> float | None:
        return LINEAR_MAX if self.workload.grows else self.target.must

    def noise(self) -> float | None:
        """How far the median of the yardstick's ratios to itself may be off, or its distance to 1 where that is more.

        Where growth is measured: the same of agproxy's own.
        """
        if self.workload.grows:
            values = self.judged()
            return uncertainty(values) / median(values) if len(values) > 1 else None
        if AGAIN not in self.samples or not (ratios := self.ratios(AGAIN)):
            return None
        return max(uncertainty(ratios), abs(median(ratios) - 1))

    def verdict(self) -> str:
        """Of the must, and of the aim where it is reached too; none where noise could have made the difference.

        Fewer than three rounds do not tell the noise.
        """
        must, noise, values = self.must(), self.noise(), self.judged()
        if must is None or noise is None or len(values) < ROUNDS_MIN:
            return ""
        verdict = judge(median(values), must, noise)
        if self.piled_up(AGPROXY if verdict == "held" else YARDSTICK):
            return "piled up"
        aim = self.target.aim
        reached = verdict == "held" and aim is not None and judge(median(values), aim, noise) == "held"
        return "held, aim too" if reached else verdict

    def piled_up(self, gateway: str) -> bool:
        """Whether chunks that were sent one by one went on several at once: a core was full, and they cost too little."""
        paced = self.workload.pause_ms > 0 and self.target.metric == "cpu"
        return paced and median(self.together.get(gateway, [1.0])) > PILED_UP

    def as_json(self) -> dict[str, Any]:
        return {
            "workload": self.workload.name,
            "metric": self.target.metric,
            "unit": self.target.unit,
            "must": self.must(),
            "aim": self.target.aim,
            "samples": self.samples,
            "doubled": self.doubled,
            "together": self.together,
            "ratios": {gateway: self.ratios(gateway) for gateway in self.samples if gateway != YARDSTICK},
            "noise": self.noise(),
            "verdict": self.verdict(),
        }


def uncertainty(values: Sequence[float]) -> float:
    """Half the width of what holds their true median in nine cases of ten: all of up to 7 rounds, less of more.

    Source: https://online.stat.psu.edu/stat415/lesson/19/19.1
    """
    rounds, outside = len(values), 0
    while sum(math.comb(rounds, k) for k in range(outside + 2)) <= 0.05 * 2**rounds:
        outside += 1
    inner = sorted(values)[outside : rounds - outside]
    return (inner[-1] - inner[0]) / 2


def judge(value: float, limit: float, noise: float) -> str:
    if abs(value - limit) < noise * value:
        return "below noise"
    return "held" if value <= limit else "missed"


# ---- Markdown


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def figure(value: float | None) -> str:
    """Three significant digits."""
    if value is None or math.isnan(value):
        return ""
    digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:,.{digits}f}"


def spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    middle, low, high = median(values), min(values), max(values)
    digits = 2 if middle >= 0.1 else 3
    return f"{middle:.{digits}f}" + (f" ({low:.{digits}f}–{high:.{digits}f})" if len(values) > 1 else "")


def cost_table(rows: Sequence[Row], peers: Sequence[str]) -> str:
    head = ["workload", "unit", "pass", "agproxy", "ratio", "must", "aim", "noise", "verdict"]
    for peer in peers:
        head += [peer, f"agproxy / {peer}"]
    return table(head, [cost_line(row, peers) for row in rows])


def cost_line(row: Row, peers: Sequence[str]) -> list[str]:
    noise = row.noise()
    line = [row.workload.title, row.target.unit]
    line += [figure(row.best(name)) if name in row.samples else "" for name in (YARDSTICK, AGPROXY)]
    line += [spread(row.ratios(AGPROXY)), limit(row.must()), limit(row.target.aim)]
    line += ["" if noise is None else f"±{noise:.0%}", row.verdict()]
    for peer in peers:
        line += peer_cells(row, peer) if peer in row.samples else ["", ""]
    return line


def limit(value: float | None) -> str:
    return "" if value is None else f"≤ {value:g}"


def peer_cells(row: Row, peer: str) -> list[str]:
    pairs = zip(row.samples.get(AGPROXY, []), row.samples[peer], strict=False)
    return [figure(row.best(peer)), spread([ours / theirs for ours, theirs in pairs if theirs])]


def growth_table(rows: Sequence[Row]) -> str:
    head = ["growth", "unit", "pass", "agproxy", "ratio", "twice as many, pass", "agproxy", "must", "noise", "verdict"]
    lines = []
    for row in rows:
        noise, line = row.noise(), [row.workload.title, row.target.unit]
        line += [figure(row.best(name)) if name in row.samples else "" for name in (YARDSTICK, AGPROXY)]
        line += [spread(row.ratios(AGPROXY)), *(spread(row.doubled.get(name, [])) for name in (YARDSTICK, AGPROXY))]
        lines.append([*line, limit(row.must()), "" if noise is None else f"±{noise:.0%}", row.verdict()])
    return table(head, lines)


Latencies = Mapping[str, Mapping[str, list[list[float]]]]
"""Workload and gateway to [p50, p99 of the answer, p50, p99 of its first chunk] in each round, in seconds."""


def latency_table(titles: Mapping[str, str], latencies: Latencies, names: Sequence[str]) -> str:
    """Best rounds, in milliseconds; what a gateway adds to the upstream asked without one."""
    head = ["latency, ms: p50 / p99", DIRECT, *(f"{name} adds" for name in names)]
    head += [f"first chunk, {DIRECT}", *(f"{name} adds" for name in names)]
    lines = []
    for workload, seen in latencies.items():
        if DIRECT not in seen:
            continue
        cells = [titles[workload]]
        for first in (0, 2):
            base = best_of(seen[DIRECT], first)
            cells.append(" / ".join(map(figure, base)))
            cells += [added(seen.get(name, []), base, first) for name in names]
        lines.append(cells)
    return table(head, lines)


def best_of(rounds: Sequence[Sequence[float]], first: int) -> tuple[float, float]:
    return tuple(min(values[at] for values in rounds) * 1000 for at in (first, first + 1))  # type: ignore[return-value]


def added(rounds: Sequence[Sequence[float]], base: tuple[float, float], first: int) -> str:
    if not rounds:
        return ""
    return " / ".join(f"{value - floor:+.2f}" for value, floor in zip(best_of(rounds, first), base, strict=True))
