"""The supernet against its plain form: values, every gradient, running statistics, whole searches."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from darts_space.bilevel import BilevelConfig, Search
from darts_space.fast import kernels
from darts_space.fast.conversion import from_plain, to_plain
from darts_space.fast.supernet import SuperNet
from darts_space.plain import PlainSuperNet
from darts_space.search_network import ARCHITECTURE_NAMES


def build_both(dtype: torch.dtype = torch.float64, **arguments) -> tuple[PlainSuperNet, SuperNet]:
    """The same small network in both forms; its alpha and beta differ enough to matter."""
    arguments = {"channels": 8, "num_classes": 7, "layers": 5, **arguments}
    both = [kind(**arguments, generator=torch.Generator().manual_seed(0)) for kind in (PlainSuperNet, SuperNet)]
    for model in both:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name in ARCHITECTURE_NAMES:
                parameter = getattr(model, name)
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return tuple(model.to(dtype) for model in both)


def draw_batch(images: int = 4, size: int = 16, seed: int = 2, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(images, 3, size, size, generator=generator, dtype=torch.float64)
    return pixels.to(dtype), torch.randint(7, (images,), generator=generator)


def gradients(model: nn.Module, batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits, and the gradient of the loss by every parameter under its name in the plain form."""
    logits = model(batch[0])
    found = torch.autograd.grad(F.cross_entropy(logits, batch[1]), list(model.parameters()), allow_unused=True)
    names = [name for name, _ in model.named_parameters()]
    found = {name: grad for name, grad in zip(names, found, strict=True) if grad is not None}
    if isinstance(model, SuperNet):
        found = to_plain({**model.state_dict(), **found})
    plain = {name for name in found if "running" not in name and "num_batches" not in name}
    return logits.detach(), {name: found[name] for name in plain}


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float, scale: float, what: str) -> None:
    """Within `tolerance` of the largest expected value, or of `scale` if only rounding errors are expected."""
    difference = (found - expected).abs().max().item()
    assert difference <= tolerance * max(expected.abs().max().item(), 1e-3 * scale), f"{what} differs by {difference}"


@pytest.mark.parametrize("partial", [1, 2, 4, 8])
@pytest.mark.parametrize(("stem", "images", "size"), [("cifar", 4, 16), ("imagenet", 4, 64)])
def test_values_gradients_and_statistics_are_the_plain_network_s(partial, stem, images, size):
    plain, fast = build_both(partial=partial, stem=stem)
    batch = draw_batch(images, size)
    expected_logits, expected = gradients(plain, batch)
    logits, found = gradients(fast, batch)
    assert_close(logits, expected_logits, 1e-10, 1.0, "logits")
    found = {name: grad for name, grad in found.items() if name in expected}
    assert found.keys() == expected.keys()
    scale = max(grad.abs().max().item() for grad in expected.values())
    for name, grad in expected.items():
        assert_close(found[name], grad, 1e-10, scale, name)
    state, converted = plain.state_dict(), to_plain(fast.state_dict())
    assert state.keys() == converted.keys()
    for name, value in state.items():
        assert_close(converted[name].double(), value.double(), 1e-10, 1.0, name)
    with torch.no_grad():
        assert_close(fast.eval()(batch[0]), plain.eval()(batch[0]), 1e-10, 1.0, "logits in evaluation")


@pytest.mark.parametrize(
    ("arguments", "images", "size"),
    [({"edge_normalisation": False}, 4, 16), ({}, 3, 12), ({}, 1, 20), ({"stem": "imagenet", "layers": 3}, 2, 224)],
)
def test_so_they_are_without_edge_normalisation_and_at_odd_sizes(arguments, images, size):
    plain, fast = build_both(**arguments)
    batch = draw_batch(images, size)
    expected_logits, expected = gradients(plain, batch)
    logits, found = gradients(fast, batch)
    assert_close(logits, expected_logits, 1e-10, 1.0, "logits")
    scale = max(grad.abs().max().item() for grad in expected.values())
    for name, grad in expected.items():
        assert_close(found[name], grad, 1e-10, scale, name)


@pytest.mark.parametrize("case", [(4, "cifar", 4, 16), (1, "cifar", 2, 12), (2, "imagenet", 2, 96)])
def test_so_they_are_on_the_path_of_other_devices(case, monkeypatch):
    """Which takes PyTorch's BatchNorm and one group for all pointwise convolutions."""
    monkeypatch.setattr(kernels, "OURS", set())
    test_values_gradients_and_statistics_are_the_plain_network_s(*case)


def test_state_dicts_convert_both_ways():
    plain, fast = build_both()
    state = plain.state_dict()
    converted = from_plain(state)
    assert converted.keys() == fast.state_dict().keys()
    assert all(torch.equal(value, converted[name]) for name, value in fast.state_dict().items())
    back = to_plain(converted)
    assert back.keys() == state.keys()
    assert all(torch.equal(value, back[name]) for name, value in state.items())
    gradients = to_plain(dict(fast.named_parameters()))  # any tensors of these names and shapes
    assert gradients.keys() == dict(plain.named_parameters()).keys()


@pytest.mark.slow
@pytest.mark.parametrize("unrolled", [False, True])
def test_twenty_steps_stay_with_the_plain_search(unrolled):
    """Alpha, beta, weights, statistics and the final genotype."""
    config = BilevelConfig(rest_steps=0, arch_steps=20, epoch_steps=5, unrolled=unrolled)
    both = [Search(model, config) for model in build_both()]
    for step in range(20):
        for search in both:
            search.step(draw_batch(4, 8, seed=2 * step), draw_batch(4, 8, seed=2 * step + 1))
    plain, fast = (search.model for search in both)
    converted = to_plain(fast.state_dict())
    for name, value in plain.state_dict().items():
        assert_close(converted[name].double(), value.double(), 1e-8, 1.0, name)
    assert fast.genotype() == plain.genotype()


@pytest.mark.slow
def test_float32_is_as_accurate_as_the_plain_network():
    """The error against float64 of logits, weights' and architecture's gradients: its ratio in the median batch."""
    ratios = []
    for seed in range(5):
        single = dict(zip(("plain", "fast"), build_both(torch.float32), strict=True))
        exact_logits, exact = gradients(build_both()[0], draw_batch(16, 16, seed))
        errors = {}
        for name, model in single.items():
            logits, found = gradients(model, draw_batch(16, 16, seed, torch.float32))
            groups = [
                [(logits, exact_logits)],
                [(found[key], exact[key]) for key in exact if key not in ARCHITECTURE_NAMES],
                [(found[key], exact[key]) for key in ARCHITECTURE_NAMES],
            ]
            errors[name] = torch.tensor([relative_error(pairs) for pairs in groups])
        ratios.append(errors["fast"] / errors["plain"])
    ratios = torch.stack(ratios)
    assert (ratios.median(0).values <= 2).all(), ratios


def relative_error(pairs) -> float:
    """Norm of the differences over the norm of the exact values."""
    differences, exact = (
        torch.cat([values.flatten().double() for values in column])
        for column in zip(*[(found.double() - exact, exact) for found, exact in pairs], strict=True)
    )
    return (differences.norm() / exact.norm()).item()


def test_frozen_weights_leave_the_architecture_s_gradients_as_they_are():
    _, fast = build_both()
    _, expected = gradients(fast, draw_batch())
    for weight in fast.weight_parameters():
        weight.requires_grad_(False)
    images, labels = draw_batch()
    loss = F.cross_entropy(fast(images), labels)
    found = torch.autograd.grad(loss, [getattr(fast, name) for name in ARCHITECTURE_NAMES])
    for name, grad in zip(ARCHITECTURE_NAMES, found, strict=True):
        torch.testing.assert_close(grad, expected[name], rtol=1e-12, atol=1e-15)


def test_bf16_autocast_stays_near_float32():
    plain, fast = build_both(torch.float32)
    images, _ = draw_batch(8, dtype=torch.float32)
    expected = plain(images)
    with torch.autocast("cpu", torch.bfloat16):
        logits = fast(images)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), expected, rtol=0.1, atol=0.1)
    logits.float().sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in fast.parameters())


def test_one_pixel_cannot_be_normalised():
    _, fast = build_both(layers=3, dtype=torch.float32)
    with pytest.raises(ValueError, match="single pixel"):
        fast(torch.zeros(1, 3, 4, 4))
    assert fast.eval()(torch.zeros(1, 3, 4, 4)).shape == (1, 7)


def test_a_second_derivative_is_refused():
    _, fast = build_both(layers=3)
    images, _ = draw_batch()
    for weight in fast.weight_parameters():
        weight.requires_grad_(False)  # the gradient of the sum of the logits then has no derivative of its own
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(fast(images).sum(), fast.alphas_normal, create_graph=True)


def test_copies_are_independent():
    _, fast = build_both(layers=3)
    other = copy.deepcopy(fast)
    batch = draw_batch()
    before = fast.eval()(batch[0])
    Search(other, BilevelConfig(rest_steps=0)).step(batch, batch)
    assert torch.equal(fast.eval()(batch[0]), before)
