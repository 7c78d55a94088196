"""Candidates of the finals: which records compete, how controls are drawn, and the widths of their networks."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from darts_space import GENOTYPES, CifarNetwork, Genotype, cost, random_genotype
from darts_space.cell import CONCAT
from nas_kmix.pipeline import candidates
from nas_kmix.pipeline.candidates import Candidate, Entrants, Shape, of_records, random_controls, with_controls

SHAPE = Shape("cifar", 3, 10, 8)
DRAWN = [random_genotype(np.random.default_rng(i)) for i in range(8)]
POOL_CELL = [("max_pool_3x3", i % 2) for i in range(8)]
POOLS = Genotype(POOL_CELL, CONCAT, POOL_CELL, CONCAT)


def test_the_entry_comes_first_and_records_that_differ_follow():
    a, b, c, d, e, f = DRAWN[:6]
    records = [[(0, f), (5, e), (10, b), (15, b), (20, c), (25, d), (30, a)], [(5, a), (10, b)]]
    found = of_records(records)
    assert [(one.genotype, one.seed, one.arch_step) for one in found] == [
        *((a, 0, 30), (b, 1, 10)),  # the last of both seeds
        *((d, 0, 25), (c, 0, 20), (e, 0, 5)),  # the latest three that differ; f is from before the architecture moved
    ]
    assert {one.origin for one in found} == {"bilevel"}
    assert of_records([[(0, a)]]) == [Candidate(a, "bilevel", 0, 0)]


def test_multiply_adds_are_those_of_the_real_network():
    for genotype in (*DRAWN[:2], GENOTYPES["PC_DARTS_cifar"]):
        network = CifarNetwork(genotype, 6, 3, 10, auxiliary=False, generator=torch.Generator())
        assert SHAPE.macs(genotype, 6) == cost(network, 8)["macs"]


def test_multiply_adds_are_a_sum_over_edges():
    for shape in (SHAPE, Shape("imagenet", 8, 5, 96)):
        for genotype in (*DRAWN[:2], POOLS):
            assert candidates._sum_of_edges(shape, genotype, 6) == shape.macs(genotype, 6)


def test_the_nearest_width_is_nearer_than_its_neighbours():
    for genotype in (POOLS, DRAWN[0]):
        for macs in (10_000, 300_000):
            width = SHAPE.nearest_width(genotype, macs)
            off = [abs(SHAPE.macs(genotype, other) - macs) for other in (width, width + 2, max(2, width - 2))]
            assert width % 2 == 0 and off[0] == min(off)


def test_controls_are_near_distinct_and_functions_of_the_seed():
    macs = SHAPE.macs(DRAWN[0], 8)
    drawn = [random_controls(4, macs, SHAPE, 8, taken=DRAWN[:1], rng=np.random.default_rng(s)) for s in (3, 3, 4)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len({*drawn[0], DRAWN[0]}) == 5
    assert all(abs(SHAPE.macs(one, 8) / macs - 1) <= 0.1 for one in drawn[0])


def test_where_no_random_genotype_is_as_small_the_nearest_are_taken_and_counted(monkeypatch):
    monkeypatch.setattr(candidates, "DRAWS", 20)
    searched = [Candidate(POOLS, "bilevel", 0, 9)]
    found = with_controls(searched, {}, controls=3, shape=SHAPE, channels=8, seed=0)
    controls = [one.genotype for one in found if one.origin == "random"]
    rng = np.random.default_rng([0, candidates.CONTROLS])
    smallest = sorted((random_genotype(rng) for _ in range(20)), key=lambda one: SHAPE.macs(one, 8))
    assert controls == smallest[:3]
    entrants = Entrants.of(found, SHAPE, 8)
    assert entrants.far_controls == 3


def test_given_genotypes_compete_once():
    searched = [Candidate(DRAWN[0], "bilevel", 0, 9)]
    given = {"PC_DARTS_cifar": GENOTYPES["PC_DARTS_cifar"], "the same": DRAWN[0]}
    found = with_controls(searched, given, controls=2, shape=SHAPE, channels=8, seed=0)
    assert [one.origin for one in found] == ["bilevel", "given", "random", "random"]
    assert found[1].title == "given: PC_DARTS_cifar" and len({one.genotype for one in found}) == 4


def swapped(genotype):
    """The same network, with the inputs of every node in the other order."""
    cells = {
        cell: [edge for i in range(0, 8, 2) for edge in getattr(genotype, cell)[i : i + 2][::-1]]
        for cell in ("normal", "reduce")
    }
    return replace(genotype, **cells)


def test_one_network_competes_once_however_its_edges_are_listed():
    rows = [(2, swapped(DRAWN[1])), (4, swapped(DRAWN[0])), (6, DRAWN[1]), (8, DRAWN[0])]
    assert swapped(DRAWN[0]) != DRAWN[0] and swapped(DRAWN[0]).entries == DRAWN[0].entries
    found = of_records([rows])
    assert [one.arch_step for one in found] == [8, 6]
    entered = with_controls(found, {"swapped": swapped(DRAWN[0])}, controls=2, shape=SHAPE, channels=8, seed=0)
    assert [one.origin for one in entered] == ["bilevel", "bilevel", "random", "random"]
    rng = np.random.default_rng(3)
    first = random_controls(1, SHAPE.macs(DRAWN[0], 8), SHAPE, 8, rng=np.random.default_rng(3))
    taken = [swapped(one) for one in first]
    assert random_controls(1, SHAPE.macs(DRAWN[0], 8), SHAPE, 8, taken=taken, rng=rng) != first


def test_widths_differ_only_beyond_a_quarter_of_the_median():
    found = [Candidate(one, "bilevel", 0, i) for i, one in enumerate([*DRAWN, POOLS])]
    entrants = Entrants.of(found, SHAPE, 8)
    macs = [SHAPE.macs(one.genotype, 8) for one in found]
    median = np.median(macs)
    for one, own, width, final in zip(found, macs, entrants.channels, entrants.macs, strict=True):
        assert (width == 8) if abs(own / median - 1) <= 0.25 else (width != 8)
        assert final == SHAPE.macs(one.genotype, width) and abs(final - median) <= abs(own - median)
    assert entrants.channels[-1] > 8  # pools cost little


def test_the_file_holds_everything_and_names_itself_when_damaged(tmp_path):
    found = [
        Candidate(DRAWN[0], "bilevel", 0, 20),
        Candidate(DRAWN[1], "given", text="x.json"),
        Candidate(DRAWN[2], "random"),
    ]
    path = tmp_path / "candidates.json"
    candidates.save(path, found, {"stage": "search", "config": {}, "inputs": {}})
    assert candidates.load(path) == (found, {"stage": "search", "config": {}, "inputs": {}})
    raw = json.loads(path.read_text())
    assert [one["candidate"] for one in raw["candidates"]] == [0, 1, 2]
    for change in ({"candidates": []}, {"version": 9}, {"candidates": [{"origin": "luck"}]}, {"provenance": 3}):
        path.write_text(json.dumps(raw | change))
        with pytest.raises(ValueError, match=r"candidates\.json"):
            candidates.load(path)
    assert candidates.identity(found) != candidates.identity(found[::-1])
