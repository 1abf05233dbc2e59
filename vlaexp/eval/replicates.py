"""Success of a policy trained with several seeds, all on the same episodes: intervals that carry both variances.

The outcomes are a table of K seeds x N episodes. Both are drawn from many and they are crossed, as readers and cases
are in radiology, so the variance of the mean comes from the mean squares of the two-way layout (the random effects of
Obuchowski and Rockette 1995; Satterthwaite's degrees of freedom, in the manner of Hillis 2007, Stat. Med. 26:596):

    variance = (MS_episodes + max(MS_seeds - MS_rest, 0)) / (K N)

The first term is the variance over episodes with the seeds as they are; it is never taken for less. The second is there
where seeds differ by more than chance within episodes explains. With three seeds it rests on two degrees of freedom:
Student's t then is 4.3 rather than 2, and an interval is wide because little is known, not because seeds differ much.

A rate's interval is Wilson's with the episodes that would give this variance if they were independent (Franco, Little,
Louis, Slud 2019, J. Surv. Stat. Methodol. 7:334). A difference's is Student's on the differences, with half a pseudo
episode on each side so that it has a width where all agree (Agresti and Min 2005, Stat. Med. 24:729). With one seed
both are what `vlaexp.eval.statistics` gives. `tests/eval/test_replicates.py` measures the coverage.
"""

from dataclasses import dataclass
from math import sqrt

import numpy as np
from jaxtyping import Bool, Float
from scipy.stats import t as student

from vlaexp.eval.statistics import POWER, PairedDifference, paired_difference, wilson_interval

MOST_FREEDOM = 1e6  # where nothing varies


@dataclass(frozen=True)
class Mean:
    """Mean of a table of seeds x episodes, its variance, and the degrees of freedom of that variance."""

    value: float
    variance: float
    freedom: float


def crossed_mean(table: Float[np.ndarray, "K N"]) -> Mean:
    """Mean over seeds and episodes that are both random; needs at least two of each."""
    seeds, episodes = table.shape
    mean = float(table.mean())
    of_seeds = episodes * float(table.mean(1).var(ddof=1))
    of_episodes = seeds * float(table.mean(0).var(ddof=1))
    free = seeds - 1, episodes - 1, (seeds - 1) * (episodes - 1)
    left = float(((table - mean) ** 2).sum()) - of_seeds * free[0] - of_episodes * free[1]
    rest = max(0.0, left / free[2])
    total = of_episodes + max(of_seeds - rest, 0.0)
    spread = of_seeds**2 / free[0] + of_episodes**2 / free[1] + rest**2 / free[2]
    freedom = max(float(free[0]), total**2 / spread) if spread else MOST_FREEDOM
    return Mean(mean, total / (seeds * episodes), freedom)


def pooled_interval(table: Bool[np.ndarray, "K N"], confidence: float = 0.95) -> tuple[float, float]:
    """Interval of the success rate over seeds and episodes, from outcomes.

    Where every rollout ended alike nothing tells how much further seeds add: only the N episodes count.
    """
    seeds, episodes = table.shape
    successes = int(table.sum())
    if seeds == 1 or successes in (0, table.size):
        return wilson_interval(successes // seeds, episodes, confidence)
    found = crossed_mean(table.astype(float))
    independent = found.value * (1 - found.value) / found.variance if found.variance else float("inf")
    size = min(independent, float(table.size))
    return wilson_interval(found.value * size, size, z=float(student.ppf(0.5 + confidence / 2, found.freedom)))


def pooled_difference(
    a: Bool[np.ndarray, "K N"], b: Bool[np.ndarray, "K N"], confidence: float = 0.95
) -> PairedDifference:
    """Success of A minus success of B on the same episodes, the k-th seed of A beside the k-th of B.

    `only_a` and `only_b` count rollouts. The p-value is Student's, of the same variance as the interval.
    """
    if a.shape != b.shape:
        raise ValueError(f"paired comparison of seeds x episodes {a.shape} and {b.shape}")
    if len(a) == 1:
        return paired_difference(a[0].tolist(), b[0].tolist(), confidence)
    gap = a.astype(float) - b.astype(float)
    pseudo = np.broadcast_to([sqrt(0.5), -sqrt(0.5)], (len(gap), 2))  # their squares add up to one episode
    found = crossed_mean(np.concatenate([gap, pseudo], 1))
    error = sqrt(found.variance)
    half = float(student.ppf(0.5 + confidence / 2, found.freedom)) * error
    return PairedDifference(
        difference=float(gap.mean()),
        ci_low=max(-1.0, found.value - half),
        ci_high=min(1.0, found.value + half),
        p_value=float(2 * student.sf(abs(found.value) / error, found.freedom)),
        only_a=int((a & ~b).sum()),
        only_b=int((b & ~a).sum()),
        episodes=a.shape[1],
        detectable=half + float(student.ppf(POWER, found.freedom)) * error,
    )
