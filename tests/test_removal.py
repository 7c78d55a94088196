"""How much a supernet needs an edge: against a plain supernet in float64 that never had it."""

import copy
import itertools

import pytest
import torch
from test_plain import draw_tables
from torch.nn import functional as F

from darts_space import PRIMITIVES, BilevelConfig, PlainSuperNet, Search, SuperNet, derive, diagnose, from_plain
from darts_space.cell import node_rows
from darts_space.removal import REMOVAL_PASSES, removal_losses


def batches(count=2, size=6):
    rng = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, 3, 8, 8, generator=rng, dtype=torch.float64), torch.randint(5, (size,), generator=rng))
        for _ in range(count)
    ]


def nets():
    plain = PlainSuperNet(4, 5, 3, generator=torch.Generator().manual_seed(0)).double()
    fast = SuperNet(4, 5, 3).double()
    tables = {name: table.double() for name, table in draw_tables(3, 0.5).items()}
    for net in (plain, fast):
        for name, table in tables.items():
            getattr(net, name).data.copy_(table)
    fast.load_state_dict(from_plain(plain.state_dict()))
    return plain, fast


class WithoutEdge(PlainSuperNet):
    """Shares an edge's weight out by hand: the others' exponentials over their own sum."""

    gone = ("normal", 0)

    def _mixing_weights(self, cell):
        alphas, betas = getattr(self, f"alphas_{cell}"), getattr(self, f"betas_{cell}")
        weights = torch.zeros_like(betas)
        for node in range(4):
            rows = [row for row in node_rows(node) if (cell, row) != self.gone]
            total = sum(betas[row].exp() for row in rows)
            for row in rows:
                weights[row] = betas[row].exp() / total
        return alphas.softmax(1), weights


def test_every_edge_against_a_supernet_without_it():
    plain, fast = nets()
    given = batches()

    def mean_loss(net):
        net.train()
        with torch.no_grad():
            return sum(F.cross_entropy(net(images), labels).item() for images, labels in given) / len(given)

    whole = mean_loss(copy.deepcopy(plain))
    found = removal_losses(fast, lambda batch: F.cross_entropy(fast(batch[0]), batch[1]), given)
    for cell, rises in zip(("normal", "reduce"), found, strict=True):
        assert rises[:2].tolist() == [0.0, 0.0]
        for row in (2, 6, 13):
            without = copy.deepcopy(plain)
            without.__class__, without.gone = WithoutEdge, (cell, row)
            assert rises[row].item() == pytest.approx(mean_loss(without) - whole, abs=1e-10)
    assert len(torch.cat(found).unique()) > 20, "edges differ"


def test_the_model_is_as_it_was_and_counted_by_passes():
    _, fast = nets()
    fast.eval()
    search = Search(fast, BilevelConfig())
    before = copy.deepcopy(search.state_dict())
    passes = []
    fast.register_forward_hook(lambda *_: passes.append(fast.training))
    first = search.removal_losses(batches(1))
    fast.eval()
    assert passes == [True] * REMOVAL_PASSES
    again = search.removal_losses(batches(1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not fast.training and search.steps_done == 0
    after = search.state_dict()["model"]
    assert all(torch.equal(value, after[name]) for name, value in before["model"].items())
    assert all(parameter.grad is None for parameter in fast.parameters())


def test_the_model_is_as_it_was_after_an_error():
    _, fast = nets()
    fast.eval()
    before, calls = copy.deepcopy(fast.state_dict()), itertools.count()

    def loss(batch):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return fast(batch[0]).sum()

    with pytest.raises(KeyboardInterrupt):
        removal_losses(fast, loss, batches(1))
    assert next(calls) == 4 and not fast.training
    assert all(torch.equal(value, before[name]) for name, value in fast.state_dict().items())


def test_edges_follow_the_removal_and_operations_alpha():
    tables = draw_tables(0)
    removal = (torch.linspace(1, 0, 14), torch.linspace(0, 1, 14))  # the first inputs, and the last
    genotype = derive(**tables, edges_by="removal", removal=removal)
    assert [source for _, source in genotype.normal] == [0, 1] * 4
    assert [source for _, source in genotype.reduce] == [1, 0, 2, 1, 3, 2, 4, 3]
    for name, edges in (("normal", genotype.normal), ("reduce", genotype.reduce)):
        best = tables[f"alphas_{name}"][:, 1:].argmax(1)
        for position, (operation, source) in enumerate(edges):
            row = node_rows(position // 2).start + source
            assert operation == PRIMITIVES[1 + int(best[row])]
    assert derive(**tables, edges_by="removal", removal=removal) != derive(**tables, edges_by="alpha")
    found = diagnose(**tables, edges_by="removal", removal=removal)
    assert 0 < found.margin_normal < 1, "of the operations alone"


def test_without_a_choice_of_edges_every_node_takes_the_inputs_of_the_cell():
    tables = draw_tables(0)
    genotype = derive(**tables, edges_by="inputs")
    for name, edges in (("normal", genotype.normal), ("reduce", genotype.reduce)):
        best = tables[f"alphas_{name}"][:, 1:].argmax(1).tolist()
        rows = [row for node in range(4) for row in node_rows(node)[:2]]
        assert edges == tuple((PRIMITIVES[1 + best[row]], i % 2) for i, row in enumerate(rows))
    other = {**tables, "betas_normal": tables["betas_normal"].flip(0) * 5}
    assert derive(**other, edges_by="inputs") == genotype
    assert 0 < diagnose(**tables, edges_by="inputs").margin_reduce < 1


def test_what_cannot_be_is_refused():
    tables = draw_tables(0)
    with pytest.raises(ValueError, match="needs `removal`"):
        derive(**tables, edges_by="removal")
    with pytest.raises(ValueError, match="removal of the reduce cell"):
        derive(**tables, edges_by="removal", removal=(torch.zeros(14), torch.full((14,), torch.nan)))
    net = SuperNet(4, 5, 3, edge_normalisation=False)
    with pytest.raises(ValueError, match="edge normalisation"):
        Search(net, BilevelConfig()).removal_losses([])
