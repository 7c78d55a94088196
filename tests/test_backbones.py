"""The backbones: parameter counts of the papers, shapes, independence of the batch, reproducible weights."""

from __future__ import annotations

from decimal import ROUND_HALF_EVEN, Decimal
from fractions import Fraction

import pytest
import torch
from torch import nn

from nas_kmix.backbones import BACKBONES, STEMS, Drop, PyramidNet, build_backbone, pyramid_widths

# Every network with a stem that it supports and the smallest side at which that stem makes sense.
COMBINATIONS = [
    ("pyramidnet110", "cifar", 32),
    ("preactresnet18", "cifar", 32),
    ("wrn16_8", "cifar", 32),
    ("resnext29_4_24", "cifar", 32),
    ("small", "cifar", 32),
    ("tiny", "cifar", 32),
    ("small", "imagenet", 96),
    ("tiny", "imagenet", 96),
    ("resnet50", "imagenet", 96),
]
FAST = ("small", "tiny")


def count_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def random_images(n: int, height: int, width: int) -> torch.Tensor:
    return torch.randn(n, 3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("name", "num_classes", "stem", "expected"),
    [
        ("pyramidnet110", 100, "cifar", 1_725_300),
        ("pyramidnet110", 10, "cifar", 1_696_410),
        ("pyramidnet200", 100, "cifar", 26_844_952),
        ("preactresnet18", 100, "cifar", 11_217_316),
        ("wrn16_8", 100, "cifar", 11_012_036),
        ("resnext29_4_24", 100, "cifar", 4_937_252),
        ("resnet50", 1000, "imagenet", 25_557_032),
        ("resnet152", 1000, "imagenet", 60_192_808),
    ],
)
def test_parameter_counts_of_the_papers(name: str, num_classes: int, stem: str, expected: int) -> None:
    assert count_parameters(build_backbone(name, num_classes=num_classes, stem=stem)) == expected


def multiply_adds(network: nn.Module, side: int) -> int:
    """Strict multiply-adds of the convolutions for one image."""
    total = 0

    def add(module: nn.Conv2d, _inputs: tuple, output: torch.Tensor) -> None:
        nonlocal total
        total += output.numel() * module.weight[0].numel()

    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(add)
    with torch.inference_mode():
        network.eval()(torch.zeros(1, 3, side, side))
    return total


def test_cost_of_the_small_networks() -> None:
    small = multiply_adds(build_backbone("small", num_classes=100), 32)
    tiny = multiply_adds(build_backbone("tiny", num_classes=100), 32)
    large_images = multiply_adds(build_backbone("small", num_classes=100, stem="imagenet"), 224)
    assert small < 60e6  # PyramidNet-110 takes 361 million
    assert tiny < 0.3 * small
    assert large_images < 6 * small  # although 224 px has 49 times the pixels of 32 px


@pytest.mark.parametrize(("depth", "alpha"), [(110, 64), (200, 240), (20, 7)])
def test_pyramid_widths(depth: int, alpha: int) -> None:
    """Against exact arithmetic; the running float sum may differ from it only at ties."""
    blocks = 3 * ((depth - 2) // 9)
    widths = pyramid_widths(depth=depth, alpha=alpha)
    assert len(widths) == blocks
    for index, width in enumerate(widths, start=1):
        exact = 16 + Fraction(alpha * index, blocks)
        if exact.denominator == 2:
            assert abs(width - exact) == Fraction(1, 2)
        else:
            value = Decimal(exact.numerator) / Decimal(exact.denominator)
            assert width == int(value.quantize(Decimal(1), rounding=ROUND_HALF_EVEN))
    assert widths[-1] == 16 + alpha


def test_pyramid_stages() -> None:
    """The residual width is four times the block's; the map halves, rounding up, at the start of two stages."""
    network = build_backbone("pyramidnet110", num_classes=10).eval()
    assert isinstance(network, PyramidNet)
    shapes = []
    with torch.inference_mode():
        x = network.stem(random_images(1, 33, 20))
        for block in network.blocks:
            x = block(x)
            shapes.append(tuple(x.shape[1:]))
    assert [shape[0] for shape in shapes] == [4 * width for width in pyramid_widths(depth=110, alpha=64)]
    assert [shape[1:] for shape in shapes] == 12 * [(33, 20)] + 12 * [(17, 10)] + 12 * [(9, 5)]


def test_pyramid_shortcut_carries_the_input_and_zeros() -> None:
    """With the last BN of the residual path at zero, a block is its shortcut."""
    block = build_backbone("pyramidnet110", num_classes=10).blocks[12].eval()
    nn.init.zeros_(block.residual[-1].weight)
    channels = block.residual[0].num_features
    x = random_images(2, 16, 12).repeat(1, channels // 3 + 1, 1, 1)[:, :channels]
    with torch.inference_mode():
        out = block(x)
    pooled = x.reshape(2, channels, 8, 2, 6, 2).mean(dim=(3, 5))
    torch.testing.assert_close(out[:, :channels], pooled)
    assert not out[:, channels:].any()


@pytest.mark.parametrize(("name", "stem", "side"), COMBINATIONS)
def test_logits_do_not_depend_on_the_batch(name: str, stem: str, side: int) -> None:
    """A batch of 7 images, higher than wide, and the same images one by one; then in reverse."""
    network = build_backbone(name, num_classes=13, stem=stem)
    images = random_images(7, side, side - 12)
    with torch.inference_mode():
        network.train()(images)  # moves the running statistics off 0 and 1
        network.eval()
        together = network(images)
        assert together.shape == (7, 13)
        assert together.dtype == torch.float32
        assert together.std(dim=0).min() > 0  # images are told apart: the comparison is not void
        alone = torch.cat([network(image[None]) for image in images])
        torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(network(images.flip(0)).flip(0), together, rtol=1e-4, atol=1e-4)


def test_only_batch_norm_normalises() -> None:
    for name, stem, _ in COMBINATIONS:
        for module in build_backbone(name, num_classes=2, stem=stem).modules():
            assert not isinstance(module, nn.GroupNorm | nn.LayerNorm | nn.InstanceNorm2d | nn.Dropout)
            assert not isinstance(module, nn.BatchNorm2d) or module.track_running_stats


@pytest.mark.parametrize(("name", "stem", "side"), COMBINATIONS)
def test_weights_depend_on_the_seed_alone(name: str, stem: str, side: int) -> None:
    del side
    torch.manual_seed(123)
    before = torch.get_rng_state()
    first = build_backbone(name, num_classes=5, stem=stem, seed=1).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(10)
    again = build_backbone(name, num_classes=5, stem=stem, seed=1).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    other = build_backbone(name, num_classes=5, stem=stem, seed=2).state_dict()
    weights = [key for key in first if first[key].dim() > 1]
    assert weights
    assert not any(torch.equal(first[key], other[key]) for key in weights)


@pytest.mark.parametrize("name", ["pyramidnet110", *FAST])
def test_channels_last_and_bfloat16_train(name: str) -> None:
    """Both give the gradients of float32 in the default layout, up to their precision."""
    images = random_images(4, 32, 32)

    def gradient_of_the_head(memory_format: torch.memory_format, bfloat16: bool) -> torch.Tensor:
        network = build_backbone(name, num_classes=5).to(memory_format=memory_format)
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            logits = network(images.contiguous(memory_format=memory_format))
        assert logits.dtype == (torch.bfloat16 if bfloat16 else torch.float32)
        nn.functional.cross_entropy(logits.float(), torch.arange(4)).backward()
        assert all(parameter.grad is not None for parameter in network.parameters())
        return network.classifier.weight.grad

    plain = gradient_of_the_head(torch.contiguous_format, False)
    torch.testing.assert_close(
        gradient_of_the_head(torch.channels_last, False), plain, rtol=1e-3, atol=1e-4 * plain.abs().max().item()
    )
    difference = (gradient_of_the_head(torch.channels_last, True) - plain).norm() / plain.norm()
    assert difference < 0.1


@pytest.mark.parametrize("name", ["pyramidnet110", *FAST])
def test_channels_last_is_kept(name: str) -> None:
    network = build_backbone(name, num_classes=5).to(memory_format=torch.channels_last)
    outputs: list[torch.Tensor] = []
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    network(random_images(2, 32, 32).contiguous(memory_format=torch.channels_last))
    assert len(outputs) > 5
    assert all(output.is_contiguous(memory_format=torch.channels_last) for output in outputs)


@pytest.mark.parametrize("name", BACKBONES)
def test_unknown_stem_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"no stem 'mnist'.*'cifar'.*'imagenet'"):
        build_backbone(name, num_classes=5, stem="mnist")


@pytest.mark.parametrize(("name", "stem"), [("pyramidnet110", "imagenet"), ("resnet50", "cifar")])
def test_unsupported_stem_is_refused_with_an_alternative(name: str, stem: str) -> None:
    assert stem in STEMS
    with pytest.raises(ValueError, match=rf"stem '{stem}': choose '.*\.$"):
        build_backbone(name, num_classes=5, stem=stem)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no backbone 'vgg': choose one of pyramidnet110, pyramidnet200, .*resnet50"):
        build_backbone("vgg", num_classes=5)
    with pytest.raises(ValueError, match="at least one class"):
        build_backbone("tiny", num_classes=0)
    for depth in (2, 100):
        with pytest.raises(ValueError, match="depth 9 n"):
            PyramidNet(depth=depth, alpha=64, num_classes=5)


@pytest.mark.parametrize(
    ("name", "stem", "shapes"),
    [
        ("pyramidnet110", "cifar", [(148, 32, 32), (236, 16, 16)]),
        ("preactresnet18", "cifar", [(64, 32, 32), (128, 16, 16), (256, 8, 8)]),
        ("wrn16_8", "cifar", [(128, 32, 32), (256, 16, 16)]),
        ("resnext29_4_24", "cifar", [(256, 32, 32), (512, 16, 16)]),
        ("small", "cifar", [(32, 16, 16), (64, 8, 8)]),
        ("small", "imagenet", [(32, 4, 4), (64, 2, 2)]),
        ("resnet50", "imagenet", [(256, 8, 8), (512, 4, 4), (1024, 2, 2)]),
    ],
)
def test_stages_end_at_the_last_layer_of_each_size(name: str, stem: str, shapes: list[tuple[int, ...]]) -> None:
    network = build_backbone(name, num_classes=3, stem=stem).eval()
    found: list[tuple[int, ...]] = []
    for end in network.stage_ends:
        network.get_submodule(end).register_forward_hook(lambda _m, _i, out: found.append(tuple(out.shape[1:])))
    with torch.inference_mode():
        network(random_images(1, 32, 32))
    assert found == shapes


def test_preactivation_blocks_are_those_of_the_paper() -> None:
    """Rebuild both forms of a block with torch's functions: parameter counts cannot see the order of the layers."""
    for name, index, shared in (("preactresnet18", 1, True), ("wrn16_8", 1, False)):
        block = build_backbone(name, num_classes=3).stages[index][0].eval()
        x = torch.randn(2, block.activation[0].num_features, 8, 6, generator=torch.Generator().manual_seed(0))
        a = torch.relu(nn.functional.batch_norm(x, torch.zeros(x.shape[1]), torch.ones(x.shape[1])))
        first, norm, _, second = block.residual
        strides = (2, 1) if shared else (1, 2)
        y = nn.functional.conv2d(a, first.weight, first.bias, stride=strides[0], padding=1)
        y = torch.relu(nn.functional.batch_norm(y, norm.running_mean, norm.running_var))
        y = nn.functional.conv2d(y, second.weight, second.bias, stride=strides[1], padding=1)
        shortcut = nn.functional.conv2d(a if shared else x, block.shortcut.weight, block.shortcut.bias, stride=2)
        torch.testing.assert_close(block(x), y + shortcut)


DROPPING = ["pyramidnet110", "preactresnet18", "wrn16_8", "resnext29_4_24", "small"]


@pytest.mark.parametrize("name", DROPPING)
def test_drops_act_in_training_alone_and_have_no_weights(name: str) -> None:
    plain = build_backbone(name, num_classes=5)
    dropping = build_backbone(name, num_classes=5, drop=Drop(stochastic_depth=0.5, drop_block=0.2, block_size=3))
    assert plain.state_dict().keys() == dropping.state_dict().keys()
    assert all(torch.equal(dropping.state_dict()[key], value) for key, value in plain.state_dict().items())
    images = random_images(4, 32, 32)
    with torch.inference_mode():
        assert torch.equal(plain.eval()(images), dropping.eval()(images))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            passes = [dropping.train()(images) for _ in range(3)]
    assert not torch.equal(passes[0], passes[1]) and not torch.equal(passes[1], passes[2])


def test_stochastic_depth_grows_linearly_and_skips_whole_batches() -> None:
    from torchvision.ops import StochasticDepth

    network = build_backbone("preactresnet18", num_classes=5, drop=Drop(stochastic_depth=0.4))
    layers = [module for module in network.modules() if isinstance(module, StochasticDepth)]
    assert [layer.p for layer in layers] == pytest.approx([0.05 * i for i in range(1, 9)])
    block = network.stages[0][1]  # without a shortcut convolution: what is skipped is the identity
    x = torch.rand(6, 64, 4, 4, generator=torch.Generator().manual_seed(0))
    skipped = 0
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(0)
        for _ in range(400):
            same = (block(x) == x).flatten(1).all(dim=1)
            assert same.all() or not same.any()
            skipped += bool(same.all())
    assert 20 <= skipped <= 65  # 40 expected, six standard deviations


def test_drop_block_drops_squares_in_the_last_stage() -> None:
    from torchvision.ops import DropBlock2d

    network = build_backbone("preactresnet18", num_classes=5, drop=Drop(drop_block=0.1, block_size=3))
    layers = [sum(isinstance(module, DropBlock2d) for module in stage.modules()) for stage in network.stages]
    assert layers == [0, 0, 0, 2]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = network.stages[-1][0].residual[-1]
        dropped = layer(torch.ones(64, 16, 9, 9)) == 0
    assert 0.05 < dropped.float().mean() < 0.15
    eroded = nn.functional.pad(-nn.functional.max_pool2d(-dropped.float(), 3, 1), (2, 2, 2, 2))
    opened = nn.functional.max_pool2d(eroded, 3, 1)
    assert torch.equal(opened.bool(), dropped)  # an opening by 3x3 squares changes nothing: only squares are missing


def test_bad_drops_are_refused() -> None:
    for values in ({"stochastic_depth": 1.0}, {"drop_block": -0.1}, {"block_size": 0}, {"block_size": 4}):
        with pytest.raises(ValueError, match=next(iter(values))):
            Drop(**values)
    with pytest.raises(ValueError, match=r"resnet50 is torchvision's .*leave stochastic depth"):
        build_backbone("resnet50", num_classes=5, stem="imagenet", drop=Drop(stochastic_depth=0.2))
