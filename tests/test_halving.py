"""Successive halving against a plain rewriting of its rules, and the verdict against its distribution."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from nas_kmix.pipeline.halving import Halving
from nas_kmix.pipeline.verdict import in_words, judge, pooled, standard_error


def run_halving(halving, accuracy):
    """The winner, given a function of candidate and rung."""
    while turns := halving.turns():
        for turn in turns:
            halving.record(turn, accuracy(*turn))
    return halving.winner


def halved_by_hand(accuracies, contenders, rungs):
    """The contenders of every rung and the winner, from a table (candidates, rungs): sort, cut, add the entry."""
    entry, there, history = contenders[0], list(contenders), []
    for rung in range(rungs):
        history.append(set(there))
        ranked = sorted(there, key=lambda c: accuracies[c, rung], reverse=True)  # stable: the first of equal ones leads
        there = sorted({*ranked[: (len(ranked) + 1) // 2], entry})
    return history, ranked[0]


@pytest.mark.parametrize(("contenders", "controls", "rungs"), [(1, 2, 1), (2, 2, 2), (5, 3, 3), (9, 6, 3), (3, 2, 5)])
def test_halving_follows_its_rules(contenders, controls, rungs):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        table = rng.integers(0, 4, (contenders + controls, rungs)) / 4  # with ties
        asked = []
        halving = Halving(range(contenders), range(contenders, contenders + controls), rungs)
        winner = run_halving(halving, lambda c, r, asked=asked, table=table: asked.append((c, r)) or table[c, r])
        history, best = halved_by_hand(table, range(contenders), rungs)
        assert winner == best == halving.winner
        beside = set(range(contenders, contenders + controls))
        assert sorted(asked) == sorted((c, r) for r in range(rungs) for c in history[r] | beside)
        for rung in range(rungs):
            assert halving.in_rung(rung) == history[rung]
            assert halving.kept(rung) == (history[rung + 1] if rung + 1 < rungs else {best})


def test_results_may_come_in_any_order_and_a_resume_goes_on_after_them():
    """Turns begin as soon as they may: controls and entry go ahead, the others wait for their rung to end."""
    table = np.random.default_rng(5).random((7, 3))
    whole = Halving(range(4), range(4, 7), 3)
    run_halving(whole, lambda c, r: table[c, r])
    for seed in range(30):
        rng, halving, running = np.random.default_rng(seed), Halving(range(4), range(4, 7), 3), []
        first = halving.turns()
        assert first == [(c, 0) for c in range(7)] and not halving.turns()
        running += first
        while running:
            turn = running.pop(int(rng.integers(len(running))))
            halving.record(turn, table[turn])
            new = halving.turns()
            assert all((c, r - 1) in halving.accuracies for c, r in new)
            running += new
            if rng.random() < 0.2:  # killed: what was running begins again
                resumed = Halving(range(4), range(4, 7), 3)
                for done, accuracy in halving.accuracies.items():
                    resumed.record(done, accuracy)
                halving, running = resumed, resumed.turns()
        assert halving.accuracies == whole.accuracies and halving.winner == whole.winner


def test_the_verdict_is_student_s_t_of_a_new_observation():
    controls = [0.30, 0.34, 0.31, 0.36]
    found = judge(0.40, controls, images=2500)
    spread = math.sqrt(sum((a - 0.3275) ** 2 for a in controls) / 3)
    assert found.mean == pytest.approx(0.0725) and found.se == pytest.approx(spread * math.sqrt(1.25))
    assert found.detectable == pytest.approx(2.353363 * found.se)  # from a table of t with 3 degrees of freedom
    assert found.word == "better than random" and found.n == 4
    for difference in (-1.001, -0.999, 0.999, 1.001):
        word = judge(0.3275 + difference * found.detectable, controls, 2500).word
        expected = "no better than random" if abs(difference) < 1 else "better than random"
        assert word == (expected if difference > -1 else "worse than random")


def test_controls_that_agree_by_chance_do_not_make_the_verdict_certain():
    equal = judge(0.55, [0.5, 0.5], images=100)
    assert equal.se == pytest.approx(0.05 * math.sqrt(1.5)) and equal.word == "no better than random"
    assert standard_error(0.5, 100) == 0.05
    with pytest.raises(ValueError, match="at least two"):
        judge(0.5, [0.4], 100)


@pytest.mark.parametrize(("entry", "controls"), [(0.98, 1.0), (0.02, 0.0), (0.04, 0.0)])
def test_controls_that_are_all_right_or_all_wrong_leave_a_doubt(entry, controls):
    found = judge(entry, [controls] * 6, 50)
    assert found.se > 0 and found.word == "no better than random"
    assert judge(1.0 - controls, [controls] * 6, 50).word != "no better than random"


CONTENDERS, CONTROLS, RUNGS, IMAGES = 3, 6, 2, 2500
# Of random controls in the finals of five runs of the preset cpu (studies/search_quality): mean accuracies by rung on
# the images that judge, and at the end on those of the verdict; their standard deviations without the binomial part;
# and the correlation between the rungs.
MEANS, SPREADS, REPEATED = (0.156, 0.303, 0.165), (0.022, 0.029, 0.014), 0.8


def simulated_verdict(rng):
    """A run whose candidates are all random draws: true accuracies by rung, counted on two sets of images."""
    quality = rng.normal(size=(CONTENDERS + CONTROLS, 1))
    own = math.sqrt(REPEATED) * quality + math.sqrt(1 - REPEATED) * rng.normal(size=(len(quality), RUNGS))
    own = np.concatenate([own, own[:, -1:]], axis=1)  # the verdict is on the networks of the last rung
    true = np.clip(np.array(MEANS) + own * SPREADS, 0.01, 0.99)
    halving = Halving(range(CONTENDERS), range(CONTENDERS, CONTENDERS + CONTROLS), RUNGS)
    run_halving(halving, lambda c, r: rng.binomial(IMAGES, true[c, r]) / IMAGES)
    last = {c for c, r in halving.accuracies if r == RUNGS - 1}
    seen = {c: rng.binomial(IMAGES, true[c, -1]) / IMAGES for c in sorted(last)}
    assert halving.winner in seen
    return judge(seen[halving.entry], [seen[c] for c in halving.controls], IMAGES)


def test_where_every_candidate_is_random_the_verdict_says_so_nine_times_in_ten():
    rng = np.random.default_rng(0)
    words = [simulated_verdict(rng).word for _ in range(2000)]
    for word in ("better than random", "worse than random"):
        assert 0.04 <= words.count(word) / 2000 <= 0.06, words.count(word)


def test_the_detectable_difference_is_found_half_the_time():
    """A true difference as large as the smallest that can be seen is called better in about half of all runs."""
    rng, m = np.random.default_rng(1), 6
    detectable = stats.t.ppf(0.95, m - 1) * 0.02 * math.sqrt(1 + 1 / m)
    words = [judge(0.4 + detectable + rng.normal(0, 0.02), rng.normal(0.4, 0.02, m), 10**6).word for _ in range(1000)]
    assert 0.45 < words.count("better than random") / 1000 < 0.62


def test_runs_are_pooled_by_their_mean():
    assert pooled([0.01, 0.03], [0.03, 0.04]) == pytest.approx((0.02, 0.025))


@pytest.mark.parametrize(("winner", "best"), [*itertools.product((0.31, 0.35), (0.30, 0.40))])
def test_the_words_name_difference_detectable_lead_and_a_control_that_is_ahead(winner, best):
    entry = {"genotype": {"normal": 1}, "accuracy": 0.31}
    chosen = {"genotype": {"normal": 1 if winner == 0.31 else 2}, "title": "given: X", "accuracy": winner}
    result = {
        "winner": chosen,
        "entry": entry,
        "random": {"best": best, "mean": 0.29, "sd": 0.01, "n": 2},
        "entry_minus_random": {"mean": 0.02, "se": 0.0122, "n": 2, "detectable": 0.0773},
        "verdict": "no better than random",
        "images": 2500,
    }
    said = "\n".join(in_words(result))
    assert "no better than random" in said and "+2.0 ± 1.2 points, on 2,500" in said and "below 7.7 points" in said
    assert "demonstration" in said and ("A random control is ahead" in said) == (best > winner)
    assert ("+4.0 points" in said and "not tested" in said) == (winner == 0.35)
