"""Statistics over seeds: intervals, paired gains, and verdicts by a rule fixed beforehand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy.special import stdtrit  # quantiles of Student's t; scipy.stats takes a second to import

CONFIDENCE = 0.95
POWER = 0.8
VERDICTS = (
    "reproduced",
    "not reproduced",
    "within noise",
    "not comparable",
    "not run",
)


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its two-sided 95 % t-interval; infinite for one seed."""

    mean: float
    low: float
    high: float
    n: int
    deviation: float  # sample standard deviation; nan for one seed
    points: tuple[float, ...]

    @property
    def smallest_effect(self) -> float:
        """The true mean that this n would have told from 0 four times in five.

        (t_{0.975} + t_{0.8}) s / sqrt(n), with n - 1 degrees of freedom and the s seen here.
        """
        if self.n < 2:
            return math.inf
        quantiles = stdtrit(self.n - 1, [(1 + CONFIDENCE) / 2, POWER]).sum()
        return float(quantiles * self.deviation / math.sqrt(self.n))


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and t-interval of at least one value."""
    n, mean = len(values), math.fsum(values) / len(values)
    if n < 2:
        return Estimate(mean, -math.inf, math.inf, n, math.nan, tuple(values))
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    half = float(stdtrit(n - 1, (1 + CONFIDENCE) / 2)) * deviation / math.sqrt(n)
    return Estimate(mean, mean - half, mean + half, n, deviation, tuple(values))


def paired_gain(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Estimate | None:
    """The gain seed by seed, over the seeds that both have; None where they share none."""
    seeds = sorted(ours.keys() & theirs.keys())
    return estimate([ours[seed] - theirs[seed] for seed in seeds]) if seeds else None


def verdict(gain: Estimate | None, published: float | None, comparable: bool) -> str:
    """The verdict on a published gain; a rule, not a judgement.

    not run          no result
    not comparable   no established published value, or data, body or epochs differ
    not reproduced   our interval excludes the published gain
    reproduced       it contains the published gain and excludes 0
    within noise     it contains both
    """
    if gain is None:
        return "not run"
    if published is None or not comparable:
        return "not comparable"
    if not gain.low <= published <= gain.high:
        return "not reproduced"
    return "within noise" if gain.low <= 0 <= gain.high else "reproduced"


def statement(gain: Estimate, unit: str = "points") -> str:
    """Our own words for a gain: its sign and size, and what this n could have seen."""
    if gain.n < 2:
        return f"{gain.mean:+.2f} {unit} in one seed: no interval, so nothing can be said"
    size = f"{gain.mean:+.2f} {unit} [{gain.low:+.2f}, {gain.high:+.2f}], n = {gain.n}"
    if gain.low > 0:
        said = "better"
    elif gain.high < 0:
        said = "worse"
    else:
        said = "no difference seen"
        if gain.deviation > 0:
            effect = f"{gain.smallest_effect:.2f}"
            said += f" (one of {effect} would have been, four times in five)"
    return f"{said}: {size}"
