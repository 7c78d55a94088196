"""Budgets of multiply-adds: what people write, and the widest network against trying all widths."""

import numpy as np
import pytest
import torch

from darts_space import GENOTYPES, PlainSuperNet, SuperNet, cost, parse_macs, random_genotype, widest
from darts_space.network import NETWORKS

SHAPES = {
    "cifar": {"layers": 3, "num_classes": 10, "input_size": 32},
    "imagenet": {"layers": 4, "num_classes": 7, "input_size": 129},
}
GENOTYPE = random_genotype(np.random.default_rng(0))


@pytest.mark.parametrize(
    ("text", "macs"),
    [
        ("600M", 600_000_000),
        ("0.6G", 600_000_000),
        (" 600000000 ", 600_000_000),
        ("585.9456 m", 585_945_600),
        ("1.5k", 1500),
        ("1.9", 1),
        ("0.1234567891G", 123_456_789),
    ],
)
def test_multiply_adds_as_people_write_them(text, macs):
    assert parse_macs(text) == macs


@pytest.mark.parametrize(
    "text", ["", "M", "600 MB", "-600M", "6e8", "600,000,000", "0", "0.4", "1.M", "٦M", "9" * 5000]
)
def test_other_texts_are_refused(text):
    with pytest.raises(ValueError, match="no number of multiply-adds; write it as 600M"):
        parse_macs(text)


@pytest.mark.parametrize("kind", SHAPES)
def test_the_widest_is_what_trying_all_widths_finds(kind):
    shape = SHAPES[kind]
    costs = {}
    for channels in range(2, 18, 2):
        model = NETWORKS[kind](GENOTYPE, channels, shape["layers"], shape["num_classes"])
        costs[channels] = cost(model, shape["input_size"])
    for convention, key in (("strict", "macs"), ("published", "macs_published")):
        for budget in (costs[2][key], costs[16][key] - 1, costs[16][key]):
            expected = max(channels for channels, found in costs.items() if found[key] <= budget)
            assert widest(GENOTYPE, budget, kind=kind, **shape, convention=convention) == expected


def test_a_budget_that_nothing_fits_is_refused():
    with pytest.raises(
        ValueError, match=r"costs [\d,]+ multiply-adds \(strict\) with only 2 channels, more than the 999 "
    ):
        widest(GENOTYPE, 999, kind="cifar", **SHAPES["cifar"])


def test_a_supernet_is_counted_in_its_plain_form():
    with pytest.raises(ValueError, match="count the PlainSuperNet"):
        cost(SuperNet(4, 5, 3), 16)
    assert cost(PlainSuperNet(4, 5, 3), 16)["macs"] > 0


def test_the_published_network_is_the_widest_of_the_mobile_setting():
    before = torch.get_rng_state()
    shape = {"kind": "imagenet", "layers": 14, "num_classes": 1000, "input_size": 224}
    assert widest(GENOTYPES["PC_DARTS_cifar"], parse_macs("600M"), **shape) == 48
    assert torch.equal(torch.get_rng_state(), before)
