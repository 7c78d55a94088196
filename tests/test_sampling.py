"""Tests of nas_kmix.sampling.select against a brute-force sort, on scores with many ties, and its properties."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from nas_kmix.sampling import select

METHODS = ["interval", "top", "bottom", "coverage", "histogram", "random"]
DRAWN_METHODS = METHODS[3:]
SORTED_METHODS = METHODS[:3]
RATIOS = [0.001, 0.05, 0.1, 0.25, 0.29, 0.5, 0.77, 1.0]
PROPERTY = settings(max_examples=150, deadline=None, derandomize=True)


def rng(seed=0):
    return np.random.default_rng(seed)


def quota(ratio, size):
    return max(1, math.floor(ratio * size + 0.5))


def groups(labels, balanced):
    labels = labels.tolist()
    if not balanced:
        return [list(range(len(labels)))]
    return [[i for i, label in enumerate(labels) if label == wanted] for wanted in sorted(set(labels))]


def brute_force(scores, labels, ratio, method, interval=4, balanced=True):
    scores, chosen = [float(score) for score in scores], []
    for members in groups(labels, balanced):
        size = len(members)
        descending = sorted(members, key=lambda i: (-scores[i], i))
        if method == "top":
            ranked = descending
        elif method == "bottom":
            ranked = sorted(members, key=lambda i: (scores[i], i))
        else:  # ranks 0, s, 2s, ..., then 1, 1+s, ..., and so on
            ranked = [descending[rank] for start in range(interval) for rank in range(start, size, interval)]
        chosen += ranked[: quota(ratio, size)]
    return sorted(chosen)


def tied_scores(n, levels, dtype=np.float64):
    return rng(n + levels).integers(0, levels, n).astype(dtype)


def uneven_labels(n):
    """Classes of very different sizes, in random order, with gaps in their numbers; class 40 has one member."""
    labels = np.array([0, 3, 3, 7, 7, 7, 7, 7, 20])[rng(n).integers(0, 9, n)]
    labels[n // 2] = 40
    return labels


@st.composite
def problems(draw):
    n = draw(st.integers(1, 60))
    scores = draw(st.lists(st.sampled_from([-2.0, -0.0, 0.0, 0.5, 1.0, 1e-9, 7.0]), min_size=n, max_size=n))
    labels = draw(st.lists(st.integers(0, 5), min_size=n, max_size=n))
    ratio = draw(st.floats(0.001, 1.0))
    return np.array(scores), np.array(labels), ratio, draw(st.integers(1, 70)), draw(st.booleans())


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("method", SORTED_METHODS)
def test_select_is_the_brute_force_sort(method, balanced):
    for n in (1, 2, 17, 200):
        labels = uneven_labels(n)
        for levels in (1, 3, 20, 10_000):
            scores = tied_scores(n, levels) - levels / 2
            for ratio in RATIOS:
                for interval in (1, 2, 4, 9, 500):
                    options = {"method": method, "interval": interval, "balanced": balanced}
                    expected = brute_force(scores, labels, ratio, **options)
                    assert select(scores, labels, ratio, **options).tolist() == expected


@PROPERTY
@given(problems(), st.sampled_from(METHODS), st.integers(0, 3))
def test_properties(problem, method, seed):
    scores, labels, ratio, interval, balanced = problem
    scores = np.abs(scores) if method == "histogram" else scores
    before = scores.copy(), labels.copy()
    scores.flags.writeable = labels.flags.writeable = False
    options = {"method": method, "interval": interval, "balanced": balanced}
    chosen = select(scores, labels, ratio, **options, rng=rng(seed))
    assert chosen.dtype == np.int64 and chosen.ndim == 1
    assert (np.diff(chosen) > 0).all()  # sorted and unique
    assert chosen[0] >= 0 and chosen[-1] < len(scores)
    for members in groups(labels, balanced):
        assert np.isin(chosen, members).sum() == quota(ratio, len(members))
    if method in SORTED_METHODS:
        assert chosen.tolist() == brute_force(scores, labels, ratio, **options)
    assert np.array_equal(before[0], scores) and np.array_equal(before[1], labels)
    everything = select(scores, labels, 1.0, **options, rng=rng(seed))
    assert everything.tolist() == list(range(len(scores)))


def test_a_small_example_by_hand():
    scores = np.array([5.0, 1.0, 9.0, 3.0, 7.0, 0.0, 8.0, 2.0, 6.0, 4.0])  # descending: 2 6 4 8 0 9 3 7 1 5
    labels = np.zeros(10, dtype=np.int64)
    assert select(scores, labels, 0.3, method="top").tolist() == [2, 4, 6]
    assert select(scores, labels, 0.3, method="bottom").tolist() == [1, 5, 7]
    assert select(scores, labels, 0.3, method="interval", interval=4).tolist() == [0, 1, 2]  # ranks 0, 4, 8
    assert select(scores, labels, 0.4, method="interval", interval=4).tolist() == [0, 1, 2, 6]  # wraps to rank 1
    assert select(scores, labels, 0.3).tolist() == [0, 1, 2]  # the defaults: interval, every fourth


def test_ties_go_to_the_lower_index_from_both_ends():
    scores, labels = np.zeros(12), np.zeros(12, dtype=np.int64)
    for method in ("top", "bottom"):
        for balanced in (True, False):
            assert select(scores, labels, 0.25, method=method, balanced=balanced).tolist() == [0, 1, 2]


def test_unbalanced_takes_the_highest_of_all():
    scores, labels = np.arange(20.0), np.repeat([0, 1], 10)
    assert select(scores, labels, 0.25, method="top", balanced=False).tolist() == [15, 16, 17, 18, 19]
    assert select(scores, labels, 0.25, method="bottom", balanced=False).tolist() == [0, 1, 2, 3, 4]


def test_an_interval_beyond_the_class_walks_rank_by_rank():
    scores, labels = tied_scores(50, 10_000), np.arange(50) % 5  # ten a class
    for interval in (10, 11, 1_000):
        wrapped = select(scores, labels, 0.4, method="interval", interval=interval)
        assert np.array_equal(wrapped, select(scores, labels, 0.4, method="top"))


def test_an_interval_of_one_is_the_top():
    scores, labels = tied_scores(100, 9), uneven_labels(100)
    chosen = select(scores, labels, 0.3, method="interval", interval=1)
    assert np.array_equal(chosen, select(scores, labels, 0.3, method="top"))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.int64, np.uint8])
@pytest.mark.parametrize("method", SORTED_METHODS)
def test_scores_of_other_types_rank_alike(method, dtype):
    scores, labels = tied_scores(90, 12, dtype), uneven_labels(90)
    expected = brute_force(scores, labels, 0.3, method)
    assert select(scores, labels, 0.3, method=method).tolist() == expected


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("method", DRAWN_METHODS)
def test_draws_follow_their_generator(method, balanced):
    scores, labels = np.arange(200.0), uneven_labels(200)
    draws = [select(scores, labels, 0.2, method=method, balanced=balanced, rng=rng(s)) for s in (0, 0, 1)]
    assert np.array_equal(draws[0], draws[1])
    assert not np.array_equal(draws[0], draws[2])
    shared = rng(0)
    first, second = (select(scores, labels, 0.2, method=method, rng=shared) for _ in range(2))
    assert not np.array_equal(first, second)


def test_random_is_balanced_and_takes_every_index_equally_often():
    scores, labels, rounds = np.arange(60.0), np.array([0] * 20 + [1] * 40), 2_000
    shared, hits = rng(0), np.zeros(60)
    for _ in range(rounds):
        chosen = select(scores, labels, 0.1, method="random", rng=shared)
        assert np.bincount(labels[chosen]).tolist() == [2, 4]
        hits[chosen] += 1
    for size, members in ((20, slice(0, 20)), (40, slice(20, 60))):
        # drawn without replacement, the counts vary by a factor (1 - ratio) N / (N - 1) less
        spread = ((hits[members] - 0.1 * rounds) ** 2).sum() / (0.1 * rounds * 0.9) * (size - 1) / size
        assert 1e-4 < stats.chi2(size - 1).sf(spread) < 1 - 1e-4


def quotas_of_strata(scores, count, drop):
    """How many each stratum of Zheng et al. gives: one more for each in turn that has some left, smallest first."""
    kept = sorted(scores)[: max(count, len(scores) - math.floor(drop * len(scores) + 0.5))]
    strata = min(50, count)
    edges = [kept[0] + (kept[-1] - kept[0]) * s / strata for s in range(1, strata)]
    sizes = [0] * strata
    for score in kept:
        sizes[sum(score >= edge for edge in edges) if kept[0] < kept[-1] else 0] += 1
    given, left = {}, count
    for done, s in enumerate(sorted(range(strata), key=lambda s: sizes[s])):
        given[s] = min(sizes[s], left // (strata - done))
        left -= given[s]
    return kept, edges, given


@pytest.mark.parametrize("drop", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("ratio", [0.01, 0.05, 0.4, 1.0])
def test_coverage_takes_from_every_stratum_but_the_hardest(ratio, drop):
    scores = rng(5).gamma(2.0, size=400)
    chosen = select(scores, np.zeros(400), ratio, method="coverage", drop_hardest=drop, rng=rng())
    kept, edges, given = quotas_of_strata(scores.tolist(), quota(ratio, 400), drop)
    assert scores[chosen].max() <= kept[-1]
    taken = [sum(score >= edge for edge in edges) for score in scores[chosen]]
    assert [taken.count(s) for s in range(len(given))] == [given[s] for s in range(len(given))]
    assert sum(given.values()) == len(chosen) == quota(ratio, 400)


def test_coverage_spreads_where_random_follows_the_crowd():
    scores = np.concatenate([rng(1).random(900) * 0.1, rng(2).random(100)])
    options = {"ratio": 0.05, "rng": rng(), "balanced": False}
    spread = select(scores, np.zeros(1000), method="coverage", drop_hardest=0.0, **options)
    crowd = select(scores, np.zeros(1000), method="random", **options)
    assert np.mean(scores[spread] > 0.1) > 0.5 > 0.2 > np.mean(scores[crowd] > 0.1)


def test_histogram_draws_with_the_probabilities_of_its_bins():
    """Counts of 4,000 draws of one image, against P1 computed bin by bin."""
    scores = np.array([0.0, 1e-3, 1.1e-3] + [0.11 + 0.001 * i for i in range(12)] + [2.0, 2.1, 2.2])
    bins = [[0, 1, 2], list(range(3, 15)), [15, 16, 17]]
    expected = np.zeros(18)
    for members in bins:
        expected[members] = (12 - len(members) + 1) / len(members)
    expected /= expected.sum()
    shared, hits = rng(0), np.zeros(18)
    for _ in range(4_000):
        hits[select(scores, np.zeros(18), 1 / 18, method="histogram", rng=shared)] += 1
    assert stats.chisquare(hits, expected * 4_000).pvalue > 1e-3
    assert hits[:3].sum() + hits[15:].sum() > 0.9 * 4_000


SCORES, LABELS = np.arange(8.0), np.array([0, 1] * 4)


@pytest.mark.parametrize(
    ("argument", "changes"),
    [
        ("scores", {"scores": np.array([0, 1, np.nan, 3, 4, 5, 6, 7])}),
        ("scores", {"scores": np.array([0, 1, 2, 3, 4, 5, 6, np.inf])}),
        ("scores", {"scores": np.array([-np.inf, 1, 2, 3, 4, 5, 6, 7])}),
        ("labels", {"labels": LABELS[:-1]}),
        ("scores", {"scores": SCORES[:-1]}),
        ("ratio", {"ratio": 0.0}),
        ("ratio", {"ratio": -0.5}),
        ("ratio", {"ratio": 1.0001}),
        ("ratio", {"ratio": 2}),
        ("ratio", {"ratio": float("nan")}),
        ("interval", {"interval": 0}),
        ("interval", {"interval": -4}),
        ("method", {"method": "median"}),
        *(("rng", {"method": method}) for method in DRAWN_METHODS),
        ("drop_hardest", {"drop_hardest": 1.0}),
        ("drop_hardest", {"drop_hardest": -0.1}),
        ("histogram", {"scores": SCORES - 1.0, "method": "histogram"}),
    ],
)
@pytest.mark.parametrize("balanced", [True, False])
def test_bad_arguments_are_named(argument, changes, balanced):
    arguments = {"scores": SCORES, "labels": LABELS, "ratio": 0.5} | changes
    with pytest.raises(ValueError, match=rf"\b{argument}\b"):
        select(**arguments, balanced=balanced)
