"""The plain supernet against a slow reference in numpy, and its derivation rule against brute force."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from darts_space.cell import PRIMITIVES
from darts_space.derivation import derive, diagnose
from darts_space.genotype import Genotype
from darts_space.plain import PlainSuperNet, channel_shuffle
from darts_space.primitives import build_operation

GOLDEN = json.loads((Path(__file__).parent / "golden" / "genotype_parse.json").read_text())
TABLES = ("alphas_normal", "betas_normal", "alphas_reduce", "betas_reduce")


def build(seed: int = 0, *, dtype: torch.dtype = torch.float64, **arguments) -> PlainSuperNet:
    """A small supernet whose alpha and beta differ enough to matter."""
    generator = torch.Generator().manual_seed(seed)
    model = PlainSuperNet(**{"channels": 4, "num_classes": 3, "layers": 3, **arguments}, generator=generator).to(dtype)
    with torch.no_grad():
        for parameter in (getattr(model, name) for name in TABLES):
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=dtype))
    return model


def draw_images(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def weight_count(model: PlainSuperNet) -> int:
    return sum(parameter.numel() for parameter in model.weight_parameters())


# --- The reference: the network again, in numpy, loop by loop.


class Reference:
    """Reads the weights by name; training mode, so BatchNorm uses the batch's own statistics."""

    def __init__(self, model: PlainSuperNet, layers: int, partial: int, stem: str, edge_normalisation: bool):
        self.state = {name: value.numpy() for name, value in model.state_dict().items()}
        self.layers, self.partial, self.stem = layers, partial, stem
        self.edge_normalisation = edge_normalisation

    def conv(self, name, x, stride=1, padding=0, dilation=1):
        weight = self.state[f"{name}.weight"]
        kernel = weight.shape[2]
        x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
        h, w = ((size - dilation * (kernel - 1) - 1) // stride + 1 for size in x.shape[2:])
        out = 0
        for i, j in itertools.product(range(kernel), range(kernel)):
            rows = [i * dilation + stride * y for y in range(h)]
            columns = [j * dilation + stride * z for z in range(w)]
            tap = x[:, :, rows][:, :, :, columns]
            if weight.shape[1] == 1 and x.shape[1] == weight.shape[0]:  # depthwise
                out = out + weight[:, 0, i, j, None, None] * tap
            else:
                out = out + np.einsum("oc,nchw->nohw", weight[:, :, i, j], tap)
        return out

    def bn(self, name, x):
        centred = x - x.mean((0, 2, 3), keepdims=True)
        x = centred / np.sqrt((centred**2).mean((0, 2, 3), keepdims=True) + 1e-5)
        if f"{name}.weight" in self.state:
            x = x * self.state[f"{name}.weight"][:, None, None] + self.state[f"{name}.bias"][:, None, None]
        return x

    def pool(self, x, stride, size, padding, reduction):
        h, w = x.shape[2:]
        out = np.empty((*x.shape[:2], h // stride, w // stride))
        for y, z in itertools.product(range(h // stride), range(w // stride)):
            top, left = y * stride - padding, z * stride - padding
            out[:, :, y, z] = reduction(
                x[:, :, max(top, 0) : min(top + size, h), max(left, 0) : min(left + size, w)], axis=(2, 3)
            )
        return out

    def relu_conv_bn(self, name, x):
        return self.bn(f"{name}.2", self.conv(f"{name}.1", np.maximum(x, 0)))

    def factorized_reduce(self, name, x):
        x = np.maximum(x, 0)
        even = self.conv(f"{name}.conv_even", x[:, :, ::2, ::2])
        odd = self.conv(f"{name}.conv_odd", x[:, :, 1::2, 1::2])
        return self.bn(f"{name}.bn", np.concatenate([even, odd], axis=1))

    def operation(self, name, primitive, x, stride):
        if primitive == "none":
            return np.zeros_like(x[:, :, ::stride, ::stride])
        if "pool" in primitive:
            return self.bn(f"{name}.1", self.pool(x, stride, 3, 1, np.max if "max" in primitive else np.mean))
        if primitive == "skip_connect":
            return x if stride == 1 else self.factorized_reduce(name, x)
        kernel, dilation = int(primitive[-1]), 2 if primitive.startswith("dil") else 1
        blocks = [(0, stride)] if dilation == 2 else [(0, stride), (4, 1)]
        for first, block_stride in blocks:
            x = np.maximum(x, 0)
            padding = {(3, 1): 1, (5, 1): 2, (3, 2): 2, (5, 2): 4}[kernel, dilation]
            x = self.conv(f"{name}.{first + 1}", x, block_stride, padding, dilation)
            x = self.bn(f"{name}.{first + 3}", self.conv(f"{name}.{first + 2}", x))
        return x

    def edge(self, name, x, weights, stride):
        channels = x.shape[1]
        part = channels // self.partial
        mixed = 0
        for index, primitive in enumerate(PRIMITIVES):
            mixed = mixed + weights[index] * self.operation(
                f"{name}.operations.{index}", primitive, x[:, :part], stride
            )
        bypass = x[:, part:] if stride == 1 else self.pool(x[:, part:], 2, 2, 0, np.max)
        joined = np.concatenate([mixed, bypass], axis=1)
        out = np.empty_like(joined)
        for channel in range(channels):  # block b, place p -> place p, block b
            block, place = divmod(channel, part)
            out[:, place * self.partial + block] = joined[:, channel]
        return out

    def cell(self, name, state0, state1, kind, previous_reduces):
        preprocess0 = self.factorized_reduce if previous_reduces else self.relu_conv_bn
        states = [preprocess0(f"{name}.preprocess0", state0), self.relu_conv_bn(f"{name}.preprocess1", state1)]
        row = 0
        for node in range(4):
            betas = self.state[f"betas_{kind}"][row : row + 2 + node]
            betas = np.exp(betas) / np.exp(betas).sum() if self.edge_normalisation else np.ones(2 + node)
            total = 0
            for state in range(2 + node):
                alphas = np.exp(self.state[f"alphas_{kind}"][row])
                stride = 2 if kind == "reduce" and state < 2 else 1
                edge = self.edge(f"{name}.edges.{row}", states[state], alphas / alphas.sum(), stride)
                total = total + betas[state] * edge
                row += 1
            states.append(total)
        return np.concatenate(states[2:], axis=1)

    def logits(self, images):
        if self.stem == "cifar":
            state0 = state1 = self.bn("stem0.1", self.conv("stem0.0", images, 1, 1))
        else:
            x = np.maximum(self.bn("stem0.1", self.conv("stem0.0", images, 2, 1)), 0)
            state0 = self.bn("stem0.4", self.conv("stem0.3", x, 2, 1))
            state1 = self.bn("stem1.2", self.conv("stem1.1", np.maximum(state0, 0), 2, 1))
        previous_reduces = self.stem == "imagenet"
        for index in range(self.layers):
            reduces = index in (self.layers // 3, 2 * self.layers // 3)
            out = self.cell(f"cells.{index}", state0, state1, "reduce" if reduces else "normal", previous_reduces)
            state0, state1, previous_reduces = state1, out, reduces
        pooled = state1.mean((2, 3))
        return pooled @ self.state["classifier.weight"].T + self.state["classifier.bias"]


@pytest.mark.parametrize(
    ("channels", "partial", "stem", "edge_normalisation", "size"),
    [
        (2, 1, "cifar", False, (8, 4)),
        (4, 2, "cifar", True, (4, 8)),
        (4, 4, "cifar", True, (8, 4)),
        (8, 8, "cifar", True, (4, 4)),
        (2, 2, "imagenet", True, (32, 64)),
    ],
)
def test_the_network_computes_what_the_slow_reference_computes(channels, partial, stem, edge_normalisation, size):
    model = build(channels=channels, partial=partial, stem=stem, edge_normalisation=edge_normalisation)
    images = draw_images(3, 3, *size)
    expected = Reference(model, 3, partial, stem, edge_normalisation).logits(images.numpy())
    torch.testing.assert_close(model(images).detach(), torch.from_numpy(expected), rtol=1e-9, atol=1e-11)


def test_channel_shuffle_is_the_golden_permutation():
    for name, order in GOLDEN["channel_shuffle"].items():
        channels, groups = (int(part.lstrip("Cgroups")) for part in name.split("_"))
        x = torch.arange(channels)[None, :, None, None].expand(2, channels, 3, 1)
        assert channel_shuffle(x.contiguous(), groups)[1, :, 2, 0].tolist() == order


# --- Counts


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"channels": 16, "layers": 8, "num_classes": 10}, 299_578),
        ({"channels": 16, "layers": 8, "num_classes": 100}, 322_708),
        ({"channels": 8, "layers": 5, "num_classes": 10}, 66_586),
        ({"channels": 16, "layers": 8, "num_classes": 1000, "partial": 2, "stem": "imagenet"}, 956_512),
        ({"channels": 16, "layers": 8, "num_classes": 10, "partial": 1, "edge_normalisation": False}, 1_930_618),
    ],
)
def test_parameter_counts_are_the_published_ones(arguments, expected):
    assert weight_count(PlainSuperNet(**arguments)) == expected


def multiply_adds(model: nn.Module, images: torch.Tensor) -> int:
    """Of all convolutions and linear layers, counted while they run."""
    counts = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(lambda m, _, out: counts.append(out.numel() * m.weight[0].numel()))
    with torch.no_grad():
        model.eval()(images)
    return sum(counts)


def test_multiply_adds_are_the_published_ones():
    assert multiply_adds(PlainSuperNet(), torch.zeros(1, 3, 32, 32)) == 56_596_992
    imagenet = PlainSuperNet(num_classes=1000, partial=2, stem="imagenet")
    assert round(multiply_adds(imagenet, torch.zeros(1, 3, 224, 224)) / 1e6, 1) == 144.4


# --- Construction


def test_the_state_dict_holds_alpha_and_beta_and_the_groups_split_it():
    model = PlainSuperNet(channels=4, layers=3)
    state = model.state_dict()
    assert [tuple(state[name].shape) for name in TABLES] == [(14, 8), (14,), (14, 8), (14,)]
    arch, weights = model.arch_parameters(), model.weight_parameters()
    assert {id(p) for p in arch} == {id(getattr(model, name)) for name in TABLES}
    assert {id(p) for p in arch} | {id(p) for p in weights} == {id(p) for p in model.parameters()}
    assert len(arch) + len(weights) == len(list(model.parameters()))
    plain = PlainSuperNet(channels=4, layers=3, edge_normalisation=False)
    assert plain.state_dict().keys() == state.keys()
    assert {id(p) for p in plain.arch_parameters()} == {id(plain.alphas_normal), id(plain.alphas_reduce)}


def test_alpha_and_beta_start_small():
    model = PlainSuperNet(channels=4, layers=3, generator=torch.Generator().manual_seed(0))
    values = torch.cat([getattr(model, name).detach().flatten() for name in TABLES])
    assert 0.8e-3 < values.std() < 1.2e-3 and values.abs().max() < 5e-3
    assert values.unique().numel() == values.numel() == 2 * (14 * 8 + 14)


def test_the_generator_fixes_all_values_and_the_global_one_stays():
    before = torch.get_rng_state()
    one, same, other = (build(seed).state_dict() for seed in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["stem0.0.weight"], other["stem0.0.weight"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first, second = PlainSuperNet(channels=4, layers=3), PlainSuperNet(channels=4, layers=3)
        torch.manual_seed(0)
        again = PlainSuperNet(channels=4, layers=3)
    assert torch.equal(first.classifier.weight, again.classifier.weight)
    assert not torch.equal(first.classifier.weight, second.classifier.weight)


def test_weights_have_pytorch_s_own_distribution():
    weight = PlainSuperNet(channels=16, layers=3).cells[2].preprocess1[1].weight.detach()
    bound = 1 / math.sqrt(weight[0].numel())
    assert weight.abs().max() <= bound and weight.std() == pytest.approx(bound / math.sqrt(3), rel=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": 6, "partial": 4}, "6 channels cannot be divided into 4"),
        ({"partial": 0}, "cannot be divided into 0"),
        ({"channels": 0, "partial": 1}, "0 channels"),
        ({"layers": 2}, "at least 3 layers"),
        ({"stem": "mnist"}, "no stem 'mnist'; use 'cifar' or 'imagenet'"),
        ({"channels": 3, "partial": 1, "stem": "imagenet"}, "must be even"),
    ],
)
def test_impossible_networks_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        PlainSuperNet(**arguments)


@pytest.mark.parametrize(
    ("stem", "shape"),
    [("cifar", (2, 3, 30, 32)), ("cifar", (2, 3, 32, 30)), ("imagenet", (2, 3, 48, 64)), ("cifar", (3, 32, 32))],
)
def test_images_of_a_wrong_size_are_refused(stem, shape):
    with pytest.raises(ValueError, match=r"H and W divisible by (4|32), not \("):
        build(stem=stem, partial=2)(torch.zeros(shape, dtype=torch.float64))


def test_unknown_operations_and_strides_are_refused():
    with pytest.raises(ValueError, match="no operation 'sep_conv_7x7'; use one of none"):
        build_operation("sep_conv_7x7", 4, 1, affine=True)
    with pytest.raises(ValueError, match="stride 1 or 2, not 3"):
        build_operation("none", 4, 3, affine=True)
    with pytest.raises(ValueError, match="must be even"):
        build_operation("skip_connect", 3, 2, affine=True)


@pytest.mark.parametrize("name", PRIMITIVES)
def test_operations_have_learnt_scales_only_where_affine(name):
    norms = [m for m in build_operation(name, 4, 2, affine=True).modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(norm.weight is not None for norm in norms)
    expected = 0 if name == "none" or "pool" in name else 2 if name.startswith("sep") else 1
    assert len(norms) == expected
    plain = build_operation(name, 4, 2, affine=False)
    assert all(m.weight is None for m in plain.modules() if isinstance(m, nn.BatchNorm2d))


# --- Use


@pytest.mark.parametrize("batch", [1, 3])
def test_odd_batches_and_single_images(batch):
    model = build()
    assert model(draw_images(batch, 3, 16, 8)).shape == (batch, 3)
    model.eval()
    images = draw_images(batch, 3, 16, 8)
    singly = torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(model(images), singly)


def test_channels_last_images_give_the_same_result():
    images = draw_images(3, 3, 8, 8)
    expected = build()(images)
    model = build().to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(images.to(memory_format=torch.channels_last)), expected, rtol=1e-9, atol=1e-11)


def test_bf16_autocast_stays_near_float32():
    model = build(dtype=torch.float32)
    images = draw_images(8, 3, 16, 16, dtype=torch.float32)
    expected = model(images)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(images)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), expected, rtol=0.1, atol=0.1)
    logits.float().sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())


# --- The genotype rule


def tables_from(golden: dict) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(golden[name]) for name in TABLES}


def draw_tables(seed: int, scale: float = 1.0) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(seed)
    return {n: torch.from_numpy(scale * rng.normal(size=(14, 8) if "alpha" in n else 14)) for n in TABLES}


def brute_force(alphas: torch.Tensor, betas: torch.Tensor, edge_normalisation: bool) -> tuple[list, float]:
    """One cell's edges and smallest margin: all choices tried, the best one taken."""
    edges, margins, row = [], [], 0
    for node in range(4):
        scores = {}
        for state, operation in itertools.product(range(2 + node), range(8)):
            alpha = [math.exp(value) for value in alphas[row + state].tolist()]
            beta = [math.exp(value) for value in betas[row : row + 2 + node].tolist()]
            share = beta[state] / sum(beta) if edge_normalisation else 1.0
            scores[state, operation] = alpha[operation] / sum(alpha) * share
        # A choice is an ordered pair of (state, operation); the best has the largest first, then second score.
        entries = [(scores[key], key) for key in scores if key[1] != 0]
        choices = [(a, b) for a, b in itertools.permutations(entries, 2) if a[1][0] != b[1][0]]
        best = max(choices, key=lambda choice: (choice[0][0], choice[1][0]))
        edges += [(PRIMITIVES[operation], state) for _, (state, operation) in best]
        chosen = {key for _, key in best}
        states = {state for state, _ in chosen}
        for score, (state, _) in best:
            margins += [score - s for s, key in entries if key[0] == state and key not in chosen]
        margins += [best[1][0] - score for score, (state, _) in entries if state not in states]
        row += 2 + node
    return edges, min(margins)


@pytest.mark.parametrize("table", GOLDEN["tables"], ids=lambda table: table["name"])
def test_golden_tables_derive_their_genotypes(table):
    assert derive(**tables_from(table)) == Genotype(**table["genotype"])
    found = diagnose(**tables_from(table))
    assert min(found.margin_normal, found.margin_reduce) == pytest.approx(table["min_decision_margin"], abs=1e-7)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([1e-3, 0.3, 3.0]), st.sampled_from(["alpha", "alpha-beta"]))
def test_the_rule_is_the_best_of_all_choices(seed, scale, edges_by):
    tables = draw_tables(seed, scale)
    normal, normal_margin = brute_force(tables["alphas_normal"], tables["betas_normal"], edges_by == "alpha-beta")
    reduce, reduce_margin = brute_force(tables["alphas_reduce"], tables["betas_reduce"], edges_by == "alpha-beta")
    assume(min(normal_margin, reduce_margin) > 1e-12)
    genotype = derive(**tables, edges_by=edges_by)
    assert (genotype.normal, genotype.reduce) == (tuple(normal), tuple(reduce))
    found = diagnose(**tables, edges_by=edges_by)
    assert found.margin_normal == pytest.approx(normal_margin, rel=1e-6, abs=1e-13)
    assert found.margin_reduce == pytest.approx(reduce_margin, rel=1e-6, abs=1e-13)


def test_ties_go_to_the_lower_edge_and_the_lower_operation():
    tables = {name: torch.zeros(14, 8) if "alpha" in name else torch.zeros(14) for name in TABLES}
    tables["alphas_normal"][:, [3, 6]] = 1.0  # two equal best operations on every edge
    genotype = derive(**tables)
    assert genotype.normal == (("skip_connect", 0), ("skip_connect", 1)) * 4
    assert genotype.reduce == (("max_pool_3x3", 0), ("max_pool_3x3", 1)) * 4


def test_none_counts_in_the_softmax_but_is_never_chosen():
    tables = draw_tables(0)
    tables["betas_normal"].zero_()
    tables["alphas_normal"][:, 0] = 5.0
    before = derive(**tables)
    assert len(before.normal) == 8, "none is the largest everywhere, yet eight operations are chosen"
    tables["alphas_normal"][13, 0] = -9.0  # without `none` its others weigh more: the last edge of node 3 wins
    assert derive(**tables).normal[6][1] == 4 and derive(**tables).normal[:6] == before.normal[:6]


def test_small_differences_survive_large_half_precision_like_values():
    tables = {name: torch.zeros(14, 8) if "alpha" in name else torch.zeros(14) for name in TABLES}
    tables["alphas_normal"][:] = 1e-3
    tables["alphas_normal"][:, 5] += 1e-7  # nothing in bf16, decisive in float32
    assert {operation for operation, _ in derive(**tables).normal} == {"sep_conv_5x5"}


def test_beta_plays_no_part_where_alpha_alone_chooses_the_edges():
    tables = draw_tables(0)
    other = {**tables, "betas_normal": tables["betas_normal"].flip(0) * 5}
    assert derive(**tables, edges_by="alpha") == derive(**other, edges_by="alpha")
    assert derive(**tables) != derive(**other)


def test_tables_that_cannot_be_are_refused():
    for name in TABLES:
        tables = draw_tables(0)
        with pytest.raises(ValueError, match=rf"{name} has the shape \(13,"):
            derive(**{**tables, name: tables[name][:13]})
        tables[name][3] = float("nan")
        with pytest.raises(ValueError, match=f"{name} has values that are not finite"):
            derive(**tables)


def test_the_model_derives_by_its_own_tables():
    for edge_normalisation in (True, False):
        model = build(edge_normalisation=edge_normalisation)
        tables = {name: getattr(model, name) for name in TABLES}
        for edges_by in ("alpha", "alpha-beta"):
            used = edges_by if edge_normalisation else "alpha"
            assert model.genotype(edges_by) == derive(**tables, edges_by=used)
            assert model.diagnostics(edges_by) == diagnose(**tables, edges_by=used)


def test_entropy_skip_connections_and_pools():
    tables = draw_tables(0)
    tables["alphas_normal"] = torch.zeros(14, 8)
    tables["alphas_reduce"] = torch.zeros(14, 8)
    tables["alphas_reduce"][:, 3] = 40.0
    found = diagnose(**tables)
    assert found.entropy_normal == pytest.approx(math.log(8)) and found.skips_normal == 0
    assert found.entropy_reduce == pytest.approx(0.0, abs=1e-12) and found.skips_reduce == 8
    assert (found.pools_normal, found.pools_reduce) == (8, 0), "ties go to the max pool"
    tables["alphas_normal"][:7, :4] = 50.0  # half the rows choose evenly among four, half among eight
    assert diagnose(**tables).entropy_normal == pytest.approx((math.log(4) + math.log(8)) / 2)
