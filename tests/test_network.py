"""The networks of a genotype against a functional rebuild from their weights, and their published costs."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from darts_space import GENOTYPES, CifarNetwork, Genotype, ImageNetNetwork, cost, random_genotype
from darts_space.cell import PRIMITIVES
from darts_space.network import BatchNormOfOne
from darts_space.primitives import FactorizedReduce, build_operation, initialised_from

CONCAT = (2, 3, 4, 5)
# Every operation in both cells; in the reduction cell at stride 2, and the skip connection at both strides.
EVERY = Genotype(
    [
        *(("max_pool_3x3", 0), ("sep_conv_5x5", 1), ("skip_connect", 2), ("dil_conv_3x3", 0)),
        *(("avg_pool_3x3", 3), ("sep_conv_3x3", 1), ("dil_conv_5x5", 4), ("skip_connect", 0)),
    ],
    CONCAT,
    [
        *(("skip_connect", 0), ("sep_conv_3x3", 1), ("dil_conv_5x5", 0), ("max_pool_3x3", 1)),
        *(("avg_pool_3x3", 0), ("dil_conv_3x3", 1), ("sep_conv_5x5", 1), ("skip_connect", 4)),
    ],
    CONCAT,
)
CLASSES = {"cifar": CifarNetwork, "imagenet": ImageNetNetwork}


def build(kind="cifar", *, genotype=EVERY, seed=0, dtype=torch.float64, **arguments):
    """A small network whose BatchNorms are not at their neutral initial values."""
    arguments = {"channels": 2, "layers": 5, "num_classes": 3, **arguments}
    generator = torch.Generator().manual_seed(seed)
    model = CLASSES[kind](genotype, **arguments, generator=generator).to(dtype)
    with torch.no_grad():
        for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
            for value in (norm.weight, norm.running_var):
                value.uniform_(0.5, 1.5, generator=generator)
            for value in (norm.bias, norm.running_mean):
                value.normal_(0, 0.5, generator=generator)
    return model


def draw_images(*shape, seed=1, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- The reference: the network again, as functions of its state dict.


class Reference:
    """Reads weights by name. `training` uses the batch's statistics, as BatchNorm does."""

    def __init__(self, model, kind, training):
        self.state, self.kind, self.training = model.state_dict(), kind, training

    def conv(self, name, x, **arguments):
        return F.conv2d(x, self.state[f"{name}.weight"], **arguments)

    def bn(self, name, x):
        mean, variance = (self.state[f"{name}.running_{what}"] for what in ("mean", "var"))
        if self.training:
            mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
        weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        mean, variance, weight, bias = (t[:, None, None] for t in (mean, variance, weight, bias))
        return (x - mean) / (variance + 1e-5).sqrt() * weight + bias

    def relu_conv_bn(self, name, x):
        return self.bn(f"{name}.2", self.conv(f"{name}.1", x.clamp_min(0)))

    def factorized_reduce(self, name, x):
        x = x.clamp_min(0)
        even_size = torch.zeros(*x.shape[:2], *(size + size % 2 for size in x.shape[2:]), dtype=x.dtype)
        even_size[:, :, : x.shape[2], : x.shape[3]] = x
        halves = [
            self.conv(f"{name}.conv_{which}", even_size[:, :, i::2, i::2]) for i, which in enumerate(("even", "odd"))
        ]
        return self.bn(f"{name}.bn", torch.cat(halves, 1))

    def operation(self, name, primitive, x, stride):
        if primitive == "skip_connect":
            return x if stride == 1 else self.factorized_reduce(name, x)
        if "pool" in primitive:
            border = -math.inf if "max" in primitive else 0.0
            windows = F.pad(x, (1, 1, 1, 1), value=border).unfold(2, 3, stride).unfold(3, 3, stride)
            if "max" in primitive:
                return windows.amax((-2, -1))
            inside = F.pad(torch.ones_like(x), (1, 1, 1, 1)).unfold(2, 3, stride).unfold(3, 3, stride)
            return windows.sum((-2, -1)) / inside.sum((-2, -1))
        kernel, dilation = int(primitive[-1]), 2 if primitive.startswith("dil") else 1
        for first, block_stride in [(0, stride)] if dilation == 2 else [(0, stride), (4, 1)]:
            padding = {(3, 1): 1, (5, 1): 2, (3, 2): 2, (5, 2): 4}[kernel, dilation]
            shape = {"stride": block_stride, "padding": padding, "dilation": dilation, "groups": x.shape[1]}
            x = self.conv(f"{name}.{first + 1}", x.clamp_min(0), **shape)
            x = self.bn(f"{name}.{first + 3}", self.conv(f"{name}.{first + 2}", x))
        return x

    def cell(self, name, edges, state0, state1, reduces, previous_reduces, masks):
        preprocess0 = self.factorized_reduce if previous_reduces else self.relu_conv_bn
        states = [preprocess0(f"{name}.preprocess0", state0), self.relu_conv_bn(f"{name}.preprocess1", state1)]
        for node in range(4):
            total = 0
            for position in (2 * node, 2 * node + 1):
                primitive, source = edges[position]
                stride = 2 if reduces and source < 2 else 1
                out = self.operation(f"{name}.operations.{position}", primitive, states[source], stride)
                if masks is not None and not (primitive == "skip_connect" and stride == 1):
                    out = torch.stack([out[n] * masks[position, n] for n in range(len(out))])
                total = total + out
            states.append(total)
        return torch.cat(states[2:], 1)

    def auxiliary(self, x):
        """As published, which needs the published map: 8x8 (CIFAR) or 7x7 (ImageNet)."""
        x = F.avg_pool2d(x.clamp_min(0), 5, 3 if self.kind == "cifar" else 2)
        x = self.conv(
            "auxiliary.features.3", self.bn("auxiliary.features.1", self.conv("auxiliary.features.0", x)).relu()
        )
        x = self.bn("auxiliary.features.4", x).relu() if self.kind == "cifar" else x.relu()
        return F.linear(x.flatten(1), *(self.state[f"auxiliary.classifier.{part}"] for part in ("weight", "bias")))

    def run(self, images, genotype, layers, masks=None):
        """Logits and the state that the auxiliary head sees."""
        if self.kind == "cifar":
            state0 = state1 = self.bn("stem0.1", self.conv("stem0.0", images, padding=1))
        else:
            x = self.bn("stem0.1", self.conv("stem0.0", images, stride=2, padding=1)).relu()
            state0 = self.bn("stem0.4", self.conv("stem0.3", x, stride=2, padding=1))
            state1 = self.bn("stem1.2", self.conv("stem1.1", state0.relu(), stride=2, padding=1))
        previous_reduces = self.kind == "imagenet"
        for index in range(layers):
            reduces = index in (layers // 3, 2 * layers // 3)
            edges = genotype.reduce if reduces else genotype.normal
            mask = None if masks is None else masks[index]
            out = self.cell(f"cells.{index}", edges, state0, state1, reduces, previous_reduces, mask)
            state0, state1, previous_reduces = state1, out, reduces
            if index == 2 * layers // 3:
                seen = out
        pooled = state1.mean((2, 3))
        return F.linear(pooled, *(self.state[f"classifier.{part}"] for part in ("weight", "bias"))), seen


CASES = [
    ("cifar", EVERY, 5, (32, 32)),
    ("cifar", EVERY, 3, (33, 38)),
    ("cifar", EVERY, 4, (35, 47)),
    ("imagenet", EVERY, 5, (224, 224)),
    ("imagenet", EVERY, 4, (129, 150)),
    ("cifar", random_genotype(np.random.default_rng(1)), 6, (32, 32)),
    ("imagenet", random_genotype(np.random.default_rng(2)), 3, (128, 131)),
]


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(("kind", "genotype", "layers", "size"), CASES)
def test_the_network_computes_what_the_rebuild_computes(kind, genotype, layers, size, training):
    model = build(kind, genotype=genotype, layers=layers).train(training)
    reference = Reference(model, kind, training)
    images = draw_images(2, 3, *size)
    masks = model.draw_drop_path(2, 0.3, generator=torch.Generator().manual_seed(0)) if training else None
    expected, seen = reference.run(images, genotype, layers, masks)
    result = model(images, masks)
    if training:
        result, auxiliary = result
        if size in ((32, 32), (224, 224)):
            torch.testing.assert_close(auxiliary, reference.auxiliary(seen), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-10)


# --- Costs


@pytest.mark.parametrize(
    ("network", "genotype", "num_classes", "expected"),
    [
        (CifarNetwork, "PC_DARTS_cifar", 10, (4_111_104, 3_634_678, 556_670_592, None)),
        (CifarNetwork, "PC_DARTS_cifar", 100, (None, 3_686_608, None, None)),
        (ImageNetNetwork, "PC_DARTS_cifar", 1000, (6_531_336, 5_270_560, 571_137_408, 585_945_600)),
        (ImageNetNetwork, "PC_DARTS_image", 1000, (None, 5_342_464, 581_627_328, 597_056_448)),
    ],
)
def test_costs_are_the_published_ones_to_the_unit(network, genotype, num_classes, expected):
    model = network(GENOTYPES[genotype], num_classes=num_classes)
    found = cost(model, 32 if network is CifarNetwork else 224)
    assert list(found) == ["params", "params_without_aux", "macs", "macs_published"]
    for value, published in zip(found.values(), expected, strict=True):
        assert published in (value, None)


def test_a_network_built_without_the_head_has_the_parameters_without_it():
    with_head, without = (cost(build(auxiliary=auxiliary), 32) for auxiliary in (True, False))
    assert without["params"] == without["params_without_aux"] == with_head["params_without_aux"] < with_head["params"]
    assert without["macs"] == with_head["macs"]


@pytest.mark.parametrize(("kind", "size"), [("cifar", 32), ("cifar", 37), ("imagenet", 128), ("imagenet", 151)])
def test_multiply_adds_are_those_that_pytorch_counts(kind, size):
    model = build(kind, dtype=torch.float32).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, size, size))
    assert cost(model, size)["macs"] * 2 == counter.get_total_flops()


def test_a_model_without_memory_is_counted_too():
    with torch.device("meta"):
        model = CifarNetwork(EVERY, 2, 3)
    assert cost(model, 32) == cost(CifarNetwork(EVERY, 2, 3), 32)


def test_both_conventions_by_hand():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)
    )
    macs = 4 * 4 * 4 * 27 + 64 * 5
    params = 4 * 27 + 4 + 8 + 64 * 5 + 5
    found = cost(model, 8)
    assert found == {"params": params, "params_without_aux": params, "macs": macs, "macs_published": macs + 3 * 64}


def test_counting_leaves_the_model_as_it_was():
    model = build().train()
    model.cells[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    cost(model, 32)
    assert same(model.state_dict(), before)
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())


# --- Drop-path


def test_each_image_drops_operations_of_its_own_and_the_mean_stays():
    factors = build().draw_drop_path(1000, 0.3, generator=torch.Generator().manual_seed(0))
    assert factors.shape == (5, 8, 1000) and factors.dtype == torch.float32
    assert torch.equal(factors.unique(), torch.tensor([0, 1 / 0.7]))
    error = 0.3 / 0.7 / 40_000  # of the mean of 40,000 factors, squared
    assert factors.mean() == pytest.approx(1, abs=4 * error**0.5)
    assert factors.mean(2).std() < 0.04 and factors.mean((0, 1)).std() < 0.2, "images and operations are independent"


def test_the_expected_output_of_an_operation_is_unchanged():
    cell = build().cells[0]
    state = draw_images(1, 2, 4, 4)
    factors = build().draw_drop_path(4000, 0.5, generator=torch.Generator().manual_seed(0))[0]
    states = [state.expand(4000, -1, -1, -1)] * 3
    cell.eval()
    for edge in (1, 2):  # a convolution, and the identity, which is never dropped
        whole = cell._edge(edge, [state] * 3, None)
        dropped = cell._edge(edge, states, factors)
        torch.testing.assert_close(dropped.mean(0, keepdim=True), whole, rtol=0.1, atol=1e-3)
        assert (dropped == whole).all() == (edge == 2)


def test_an_image_is_dropped_by_its_own_column():
    model = build().eval()
    images = draw_images(3, 3, 32, 32)
    plain = model(images)
    factors = torch.ones(5, 8, 3)
    torch.testing.assert_close(model(images, factors), plain)
    factors[:, :, 1] = 0
    logits = model(images, factors)
    torch.testing.assert_close(logits[[0, 2]], plain[[0, 2]])
    assert not torch.allclose(logits[1], plain[1])


def test_parts_of_a_batch_drop_what_the_whole_drops():
    model = build().eval()
    images = draw_images(4, 3, 32, 32)
    factors = model.draw_drop_path(4, 0.4, generator=torch.Generator().manual_seed(3))
    parts = [model(images[part], factors[:, :, part]) for part in (slice(0, 1), slice(1, 4))]
    torch.testing.assert_close(model(images, factors), torch.cat(parts))


def test_the_generator_alone_decides_what_is_dropped():
    model = build()
    before = torch.get_rng_state()
    one, again, other = (
        model.draw_drop_path(8, 0.5, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.draw_drop_path(8, 0.0) is None


@pytest.mark.parametrize("probability", [-0.1, 1.0, math.nan])
def test_impossible_probabilities_are_refused(probability):
    with pytest.raises(ValueError, match="at least 0 and below 1"):
        build().draw_drop_path(8, probability)


def test_factors_of_another_batch_are_refused():
    model = build()
    with pytest.raises(ValueError, match=r"shape \(5, 8, 3\), but these images need \(5, 8, 2\)"):
        model(draw_images(2, 3, 32, 32), model.draw_drop_path(3, 0.5))


# --- The auxiliary head


@pytest.mark.parametrize("kind", CLASSES)
def test_the_auxiliary_head_speaks_in_training_only(kind):
    images = draw_images(2, 3, 128, 128)
    model = build(kind)
    logits, auxiliary = model(images)
    assert logits.shape == auxiliary.shape == (2, 3) and not torch.equal(logits, auxiliary)
    assert model.eval()(images).shape == (2, 3)
    assert build(kind, auxiliary=False)(images).shape == (2, 3)


def test_every_parameter_is_trained():
    for kind, size in (("cifar", 32), ("imagenet", 128)):
        model = build(kind)
        logits, auxiliary = model(draw_images(2, 3, size, size))
        F.cross_entropy(logits + 0.4 * auxiliary, torch.tensor([0, 2])).backward()
        assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("kind", "size", "window"),
    [
        ("cifar", (8, 8), (5, 5)),
        ("cifar", (9, 24), (5, 5)),
        ("imagenet", (4, 5), (2, 3)),
        ("imagenet", (6, 7), (4, 5)),
        ("imagenet", (7, 12), (5, 5)),
    ],
)
def test_the_auxiliary_window_shrinks_on_small_maps_only(kind, size, window):
    head = build(kind).auxiliary.eval()
    maps = draw_images(2, head.features[0].in_channels, *size)
    x = head.features(F.avg_pool2d(maps.relu(), window, 3 if kind == "cifar" else 2))
    assert torch.equal(head(maps), head.classifier(x.mean((2, 3))))


# --- Sizes and batches


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("cifar", (2, 3, 33, 71)),
        ("cifar", (2, 3, 13, 28)),
        ("imagenet", (2, 3, 128, 201)),
        ("imagenet", (2, 3, 65, 96)),
    ],
)
@pytest.mark.parametrize("genotype", [EVERY, GENOTYPES["PC_DARTS_image"]], ids=["every", "published"])
def test_any_size_can_be_trained_on(kind, shape, genotype):
    logits, auxiliary = build(kind, genotype=genotype)(draw_images(*shape))
    assert logits.isfinite().all() and auxiliary.isfinite().all()


@pytest.mark.parametrize(
    ("kind", "shape"),
    [("cifar", (2, 3, 12, 32)), ("cifar", (2, 3, 32, 12)), ("imagenet", (2, 3, 64, 128)), ("cifar", (3, 32, 32))],
)
def test_images_too_small_for_the_auxiliary_head_are_refused(kind, shape):
    """And one pixel less than the head takes is indeed too few for its layers."""
    with pytest.raises(ValueError, match=r"H and W of (13|65) or more, not \(.*leave out the auxiliary head"):
        build(kind)(torch.zeros(shape, dtype=torch.float64))
    if len(shape) == 4:
        model = build(kind)
        model.smallest_with_head = 1
        with pytest.raises(RuntimeError, match="size"):
            model(torch.zeros(shape, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["cifar", "imagenet"])
@pytest.mark.parametrize("genotype", [EVERY, GENOTYPES["PC_DARTS_image"]], ids=["every", "published"])
def test_without_auxiliary_head_any_image_will_do(kind, genotype):
    for size in (1, 4, 5):
        assert build(kind, genotype=genotype, auxiliary=False)(draw_images(3, 3, size, size)).isfinite().all()


@pytest.mark.parametrize("kind", CLASSES)
def test_images_are_evaluated_independently(kind):
    model = build(kind).eval()
    images = draw_images(3, 3, 128, 130)
    torch.testing.assert_close(model(images), torch.cat([model(image[None]) for image in images]))


def test_a_single_image_can_be_trained_on():
    model = build()
    before = {name: value.clone() for name, value in model.auxiliary.features[4].state_dict().items()}
    logits, auxiliary = model(draw_images(1, 3, 32, 32))
    (logits.sum() + auxiliary.sum()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert same(model.auxiliary.features[4].state_dict(), before), "one value has no variance to learn from"
    norm, plain = BatchNormOfOne(5).double(), nn.BatchNorm2d(5).double()
    for shape in ((2, 5, 1, 1), (1, 5, 2, 1)):
        assert torch.equal(norm(draw_images(*shape)), plain(draw_images(*shape)))
    assert same(norm.state_dict(), plain.state_dict())


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("cifar", {"layers": 2}, "at least 3 layers"),
        ("cifar", {"channels": 0}, "0 channels and 3 classes"),
        ("cifar", {"num_classes": 0}, "2 channels and 0 classes"),
        ("imagenet", {"channels": 3}, "must be even"),
    ],
)
def test_impossible_networks_are_refused(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        build(kind, **arguments)


# --- Layout, precision, reproducibility


@pytest.mark.parametrize(("kind", "size"), [("cifar", 33), ("imagenet", 130)])
def test_channels_last_images_give_the_same_result(kind, size):
    images = draw_images(2, 3, size, size)
    expected = build(kind)(images)
    seen = []
    model = build(kind).to(memory_format=torch.channels_last)
    model.cells[4].register_forward_hook(
        lambda _module, _inputs, out: seen.append(out.is_contiguous(memory_format=torch.channels_last))
    )
    result = model(images.to(memory_format=torch.channels_last))
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-10)
    assert seen == [True], "the layout is kept up to the last cell"


@pytest.mark.parametrize("size", [(6, 6), (7, 5)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_gradient_of_factorized_reduce_has_the_input_s_layout(size, layout):
    """A slice's would be contiguous, which slows the backward pass before it down."""
    operation = FactorizedReduce(4, 6, affine=True).double()
    images = draw_images(2, 4, *size)
    (expected,) = torch.autograd.grad(operation(images.requires_grad_()).square().sum(), images)
    activations = []
    operation.relu.register_forward_hook(lambda _module, _inputs, out: activations.append(out))
    images = images.detach().contiguous(memory_format=layout).requires_grad_()
    loss = operation(images).square().sum()
    gradient, below = torch.autograd.grad(loss, [images, *activations])
    assert below.is_contiguous(memory_format=layout)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["cifar", "imagenet"])
def test_no_pointwise_convolution_has_a_stride(kind):
    """oneDNN overruns a buffer in their backward pass in channels_last (see FactorizedReduce)."""
    pointwise = [m for m in build(kind).modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1)]
    assert pointwise and all(module.stride == (1, 1) for module in pointwise)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [20, 32, 33])
@pytest.mark.parametrize("name", [name for name in PRIMITIVES if "conv" in name])
def test_gradients_in_bf16_stay_near_float32(name, size, stride, layout):
    """One convolution each. oneDNN's own gradients of dilated filters are garbage in channels_last beyond 28 px."""
    with initialised_from(torch.Generator().manual_seed(0)):
        operation = build_operation(name, 16, stride, affine=True).to(memory_format=layout)
    convolutions = [module for module in operation.modules() if isinstance(module, nn.Conv2d)]
    images = draw_images(4, 16, size, size, dtype=torch.float32).to(memory_format=layout).requires_grad_()
    for convolution in convolutions:
        inputs = images, convolution.weight
        expected = convolution(images)
        upwards = draw_images(*expected.shape, dtype=torch.float32).to(memory_format=layout)
        with torch.autocast("cpu", torch.bfloat16):
            found = convolution(images)
        assert found.dtype == torch.bfloat16
        gradients = torch.autograd.grad(found, inputs, upwards.bfloat16())
        for left, right in zip(gradients, torch.autograd.grad(expected, inputs, upwards), strict=True):
            assert float((left - right).norm() / right.norm()) < 0.01


def test_bf16_autocast_stays_near_float32():
    model = build(dtype=torch.float32, channels=8)
    images = draw_images(8, 3, 32, 32, dtype=torch.float32)
    factors = model.draw_drop_path(8, 0.2, generator=torch.Generator().manual_seed(0))
    expected = model(images, factors)
    dtypes = set()
    for cell in model.cells:
        cell.register_forward_hook(lambda _module, _inputs, out: dtypes.add(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        result = model(images, factors)
    assert dtypes == {torch.bfloat16}, "drop-path keeps the precision of what it drops"
    for found, wanted in zip(result, expected, strict=True):
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.float(), wanted, rtol=0.1, atol=0.15)
    sum(found.float().sum() for found in result).backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())


def test_the_generator_fixes_all_weights_and_the_global_one_stays():
    before = torch.get_rng_state()
    one, again, other = (build(seed=seed).state_dict() for seed in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), before)
    assert same(one, again) and not torch.equal(one["stem0.0.weight"], other["stem0.0.weight"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first, second = CifarNetwork(EVERY, 2, 3), CifarNetwork(EVERY, 2, 3)
        torch.manual_seed(0)
        assert same(first.state_dict(), CifarNetwork(EVERY, 2, 3).state_dict())
    assert not torch.equal(first.classifier.weight, second.classifier.weight)


def train(model, optimizer, steps):
    """Steps of SGD, each a function of its number."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(4, 3, 32, 32, generator=generator)
        logits, auxiliary = model(images, model.draw_drop_path(4, 0.3, generator=generator))
        labels = torch.randint(3, (4,), generator=generator)
        optimizer.zero_grad()
        (F.cross_entropy(logits, labels) + 0.4 * F.cross_entropy(auxiliary, labels)).backward()
        optimizer.step()


def test_a_resumed_training_ends_with_the_same_bits():
    def start(seed):
        model = build(seed=seed, dtype=torch.float32)
        return model, torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)

    straight, optimizer = start(0)
    train(straight, optimizer, range(4))
    interrupted, optimizer = start(0)
    train(interrupted, optimizer, range(2))
    resumed, new_optimizer = start(1)
    resumed.load_state_dict(interrupted.state_dict())
    new_optimizer.load_state_dict(optimizer.state_dict())
    train(resumed, new_optimizer, range(2, 4))
    assert same(resumed.state_dict(), straight.state_dict())


def test_gradients_of_single_images_by_vmap_are_those_of_each():
    """As zero-cost scores of architectures take them, in the layout and the type of the depthwise kernels."""
    network = CifarNetwork(EVERY, 4, 3, 3, False).eval().to(memory_format=torch.channels_last)
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    parameters = {name: value.detach() for name, value in network.named_parameters()}

    def loss(parameters, image):
        return torch.func.functional_call(network, parameters, (image[None],)).logsumexp(1).sum()

    together = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, images)
    for i, image in enumerate(images):
        for name, gradient in torch.func.grad(loss)(parameters, image).items():
            torch.testing.assert_close(together[name][i], gradient, rtol=1e-4, atol=1e-5)


def test_a_network_can_be_looked_through_without_a_preparation():
    network = CifarNetwork(EVERY, 4, 3, 3)
    assert (network.class_names, network.image_size) == (None, None)
