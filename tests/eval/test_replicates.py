"""Pooled seeds: one seed is as before, seeds are exchangeable, and intervals hold the truth as often as they say."""

import numpy as np
import pytest

from vlaexp.eval.replicates import crossed_mean, pooled_difference, pooled_interval
from vlaexp.eval.statistics import POWER, paired_difference, wilson_interval

rng = np.random.default_rng


def rollouts(random, seeds=3, episodes=100, centre=0.0, of_seeds=0.0, of_episodes=1.0, hard=None):
    """Outcomes whose log odds are a centre, an effect of the seed and one of the episode."""
    hard = random.normal(0, of_episodes, episodes) if hard is None else hard
    odds = centre + random.normal(0, of_seeds, (seeds, 1)) + hard
    return random.random((seeds, episodes)) < 1 / (1 + np.exp(-odds))


def true_rate(centre, of_seeds, of_episodes):
    odds = centre + rng(1).normal(0, np.hypot(of_seeds, of_episodes), 1_000_000)
    return float((1 / (1 + np.exp(-odds))).mean())


def test_one_seed_is_as_before():
    a, b = rollouts(rng(0), seeds=1), rollouts(rng(1), seeds=1)
    assert pooled_interval(a) == wilson_interval(int(a.sum()), 100)
    assert pooled_difference(a, b) == paired_difference(a[0].tolist(), b[0].tolist())


def test_the_order_of_seeds_and_of_episodes_does_not_matter():
    a, b = rollouts(rng(0), of_seeds=0.5), rollouts(rng(1))
    seeds, episodes = rng(2).permutation(3), rng(3).permutation(100)
    assert pooled_interval(a[seeds][:, episodes]) == pytest.approx(pooled_interval(a))
    one, other = pooled_difference(a, b), pooled_difference(a[seeds][:, episodes], b[seeds][:, episodes])
    assert (one.ci_low, one.ci_high, one.p_value) == pytest.approx((other.ci_low, other.ci_high, other.p_value))


def test_exchanged_policies_exchange_the_signs():
    a, b = rollouts(rng(0), centre=1.0), rollouts(rng(1))
    one, two = pooled_difference(a, b), pooled_difference(b, a)
    assert (one.difference, one.ci_low, one.ci_high) == pytest.approx((-two.difference, -two.ci_high, -two.ci_low))
    assert (one.only_a, one.only_b, one.detectable) == pytest.approx((two.only_b, two.only_a, two.detectable))


def test_the_variance_by_hand():
    """Seeds 3/4 and 1/4, episodes 1, 1, 1/2, 0 with one that the second seed missed and one that it missed too."""
    table = np.array([[1.0, 1.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    found = crossed_mean(table)
    of_seeds, of_episodes = 4 * 0.125, 2 * (0.25 + 0 + 0 + 0.25) / 3
    rest = (2.0 - 1 * of_seeds - 3 * of_episodes) / 3
    total = of_episodes + of_seeds - rest
    assert (found.value, found.variance) == pytest.approx((0.5, total / 8))
    assert found.freedom == pytest.approx(max(1.0, total**2 / (of_seeds**2 + of_episodes**2 / 3 + rest**2 / 3)))


def test_repeating_a_seed_adds_nothing_and_seeds_that_differ_widen():
    one = rollouts(rng(0), seeds=1)
    low, high = pooled_interval(np.repeat(one, 3, axis=0))
    assert high - low == pytest.approx(np.diff(wilson_interval(int(one.sum()), 100))[0], rel=0.05)
    apart = np.stack([np.arange(100) < hits for hits in (50, 70, 90)])
    alike = np.stack([np.roll(np.arange(100) < 70, shift) for shift in (0, 37, 74)])
    assert np.diff(pooled_interval(apart))[0] > 2 * np.diff(pooled_interval(alike))[0]


@pytest.mark.parametrize("success", [False, True])
def test_where_all_ended_alike(success):
    table = np.full((3, 50), success)
    assert pooled_interval(table) == wilson_interval(50 * success, 50)
    found = pooled_difference(table, table)
    assert (found.difference, found.p_value, found.resolvable) == (0.0, 1.0, False)
    assert 0.01 < found.ci_high == pytest.approx(-found.ci_low)
    assert found.ci_high < 0.1


def test_unlike_tables_are_refused():
    with pytest.raises(ValueError, match=r"paired comparison of seeds x episodes \(3, 100\) and \(2, 100\)"):
        pooled_difference(rollouts(rng(0)), rollouts(rng(0), seeds=2))


@pytest.mark.parametrize(
    ("seeds", "centre", "of_seeds", "of_episodes", "at_least"),
    [
        (3, 0.0, 0.0, 1.0, 0.95),
        (3, 0.0, 0.3, 1.0, 0.94),
        (3, 2.5, 0.5, 1.0, 0.94),
        (3, 0.0, 0.5, 2.0, 0.92),  # seeds of 50 +- 8%: two degrees of freedom are few
        (5, 1.0, 0.5, 1.0, 0.93),
    ],
)
def test_coverage_of_a_rate(seeds, centre, of_seeds, of_episodes, at_least):
    """400 repetitions, each with new seeds and new episodes; a margin of 1.5 standard errors below what is said."""
    random, truth, held, naive = rng(7), true_rate(centre, of_seeds, of_episodes), 0, 0
    for _ in range(400):
        table = rollouts(random, seeds, 100, centre, of_seeds, of_episodes)
        low, high = pooled_interval(table)
        held += low <= truth <= high
        low, high = wilson_interval(int(table.sum()), table.size)
        naive += low <= truth <= high
    assert held / 400 >= at_least - 1.5 * np.sqrt(0.05 * 0.95 / 400)
    assert naive < held


@pytest.mark.parametrize("of_seeds", [0.0, 0.2, 0.5])
@pytest.mark.parametrize("centre", [0.0, 2.5])
def test_coverage_of_a_difference(centre, of_seeds):
    """Two policies of one rate: told apart no more often than one time in twenty."""
    random, wrong = rng(8), 0
    for _ in range(400):
        hard = random.normal(0, 1.0, 100)
        a, b = (rollouts(random, 3, 100, centre, of_seeds, hard=hard) for _ in "ab")
        wrong += pooled_difference(a, b).resolvable
    assert wrong / 400 <= 0.05 + 1.5 * np.sqrt(0.05 * 0.95 / 400)


@pytest.mark.parametrize("seeds", [1, 3])
def test_a_detectable_difference_is_detected_as_often_as_promised(seeds):
    """At the difference that pairs of some size call detectable in the mean, about `POWER` of them are resolved."""

    def pairs(random, shift):
        for _ in range(300):
            hard = random.normal(0, 1.0, 100)
            a = rollouts(random, seeds, 100, shift, 0.0, hard=hard)
            yield pooled_difference(a, rollouts(random, seeds, 100, 0.0, 0.0, hard=hard))

    promised = float(np.mean([pair.detectable for pair in pairs(rng(9), 0.5)]))
    shift = next(s for s in np.arange(0.3, 3.0, 0.02) if true_rate(s, 0.0, 1.0) - 0.5 >= promised)
    assert np.mean([pair.resolvable for pair in pairs(rng(10), shift)]) == pytest.approx(POWER, abs=0.1)
