"""The bilevel step against plain PyTorch loops, exact second derivatives, and interrupted runs."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from darts_space.bilevel import BilevelConfig, Search, cosine_lr, scaled_lr
from darts_space.supernet import ARCHITECTURE_NAMES, SuperNet


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """On tensors this small further threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class SmoothNet(nn.Module):
    """A two-path network without kinks, so that its second derivatives exist everywhere."""

    def __init__(self, generator: torch.Generator):
        super().__init__()
        self.alpha = nn.Parameter(torch.randn(2, generator=generator, dtype=torch.float64))
        self.norm = nn.BatchNorm2d(3, dtype=torch.float64)
        self.one = nn.Parameter(torch.randn(4, 12, generator=generator, dtype=torch.float64))
        self.two = nn.Parameter(torch.randn(4, 12, generator=generator, dtype=torch.float64))

    def forward(self, images):
        x = self.norm(images).flatten(1)
        weights = self.alpha.softmax(0)
        return weights[0] * torch.tanh(x @ self.one.T) + weights[1] * torch.sin(x @ self.two.T)

    def arch_parameters(self):
        return [self.alpha]

    def weight_parameters(self):
        return [self.norm.weight, self.norm.bias, self.one, self.two]


def smooth_net() -> SmoothNet:
    return SmoothNet(torch.Generator().manual_seed(0))


def supernet(seed: int = 0, dtype: torch.dtype = torch.float64, **arguments) -> SuperNet:
    generator = torch.Generator().manual_seed(seed)
    return SuperNet(**{"channels": 4, "num_classes": 4, "layers": 3, **arguments}, generator=generator).to(dtype)


def draw_batch(seed: int, images: int = 4, size: int = 4, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(images, 3, size, size, generator=generator, dtype=dtype)
    return pixels, torch.randint(4, (images,), generator=generator)


def config(**arguments) -> BilevelConfig:
    """No frozen epochs, so that a test sees both steps at once."""
    return BilevelConfig(**{"epochs": 4, "frozen_epochs": 0, **arguments})


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def arch_gradients(search: Search) -> list[torch.Tensor]:
    """The gradients of the first architecture step, read off Adam's first moment (weight decay must be 0)."""
    moment_share = 1 - search.config.arch_betas[0]
    return [search.arch_optimizer.state[p]["exp_avg"] / moment_share for p in search.arch]


# --- First order


@pytest.mark.parametrize("arch_grad_clip", [None, 1e-3])
def test_first_order_is_the_published_loop(arch_grad_clip):
    """Three steps against the loop as one would write it down: backward everywhere, step one optimiser at a time."""
    settings = config(epochs=10, grad_clip=0.5, arch_grad_clip=arch_grad_clip)
    model = supernet()
    oracle = copy.deepcopy(model)
    arch = [getattr(oracle, name) for name in ARCHITECTURE_NAMES]
    weights = [p for p in oracle.parameters() if not any(p is a for a in arch)]
    sgd = torch.optim.SGD(weights, lr=0.1, momentum=0.9, weight_decay=3e-4)
    adam = torch.optim.Adam(arch, lr=6e-4, betas=(0.5, 0.999), weight_decay=1e-3)
    search = Search(model, settings)
    for epoch in range(3):
        train_batch, val_batch = draw_batch(2 * epoch), draw_batch(2 * epoch + 1)
        search.start_epoch(epoch)
        result = search.step(train_batch, val_batch)

        sgd.param_groups[0]["lr"] = 0.05 * (1 + math.cos(math.pi * epoch / 10))
        oracle.zero_grad()
        val_loss = F.cross_entropy(oracle(val_batch[0]), val_batch[1])
        val_loss.backward()
        if arch_grad_clip:
            nn.utils.clip_grad_norm_(arch, arch_grad_clip)
        adam.step()
        oracle.zero_grad()
        logits = oracle(train_batch[0])
        train_loss = F.cross_entropy(logits, train_batch[1])
        train_loss.backward()
        nn.utils.clip_grad_norm_(weights, 0.5)
        sgd.step()

        torch.testing.assert_close(result.val_loss, val_loss.detach(), rtol=1e-9, atol=0)
        torch.testing.assert_close(result.train_loss, train_loss.detach(), rtol=1e-9, atol=0)
        assert result.train_correct == sum(
            row.argmax() == label for row, label in zip(logits, train_batch[1], strict=True)
        )
    torch.testing.assert_close(model.state_dict(), oracle.state_dict(), rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("unrolled", [False, True])
def test_the_architecture_step_leaves_the_weights_bitwise(unrolled):
    model = supernet(dtype=torch.float32)
    search = Search(model, config(unrolled=unrolled))
    float_batches = [draw_batch(seed, dtype=torch.float32) for seed in range(2)]
    search.step(*float_batches)  # from here on there is momentum
    before = snapshot(model)
    seen = []

    def look(*_):
        assert all(weight.grad is None for weight in search.weights)
        seen.append(snapshot(model))

    search.arch_optimizer.register_step_post_hook(look)
    search.step(*float_batches)
    (after,) = seen
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    statistics = {name for name in before if "running" in name or "num_batches" in name}
    assert changed == set(ARCHITECTURE_NAMES) | (set() if unrolled else statistics)


def test_the_weight_step_leaves_alpha_and_beta_bitwise():
    model = supernet()
    search = Search(model, config())
    seen = []
    search.arch_optimizer.register_step_post_hook(lambda *_: seen.append(snapshot(model)))
    search.step(draw_batch(0), draw_batch(1))
    assert all(torch.equal(seen[0][name], getattr(model, name)) for name in ARCHITECTURE_NAMES)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(not torch.equal(seen[0][name], value) for name, value in model.state_dict().items() if "weight" in name)


def test_frozen_epochs_move_the_weights_alone():
    model = supernet()
    search = Search(model, config(frozen_epochs=2))
    start = snapshot(model)
    for epoch in range(2):
        search.start_epoch(epoch)
        assert search.frozen and search.step(draw_batch(epoch), None).val_loss is None
    assert all(torch.equal(start[name], getattr(model, name)) for name in ARCHITECTURE_NAMES)
    assert not torch.equal(start["classifier.weight"], model.classifier.weight)
    assert int(model.stem0[1].num_batches_tracked) == 2, "one forward pass per step"
    search.start_epoch(2)
    with pytest.raises(ValueError, match="Epoch 2 moves the architecture and needs a validation batch"):
        search.step(draw_batch(2), None)
    search.step(draw_batch(2), draw_batch(3))
    assert not any(torch.equal(start[name], getattr(model, name)) for name in ARCHITECTURE_NAMES)


def test_only_the_weights_are_clipped_by_grad_clip():
    search = Search(supernet(), config(grad_clip=1e-4, momentum=0.0, weight_decay=0.0, arch_weight_decay=0.0))
    free = Search(supernet(), config(grad_clip=1e4, momentum=0.0, weight_decay=0.0, arch_weight_decay=0.0))
    norms = []
    for one in (search, free):
        before = [weight.detach().clone() for weight in one.weights]
        one.step(draw_batch(0), draw_batch(1))
        moved = [weight.detach() - start for weight, start in zip(one.weights, before, strict=True)]
        norms.append(torch.cat([m.flatten() for m in moved]).norm() / one.lr)
    assert norms[0] == pytest.approx(1e-4, rel=1e-4) and norms[1] > 1e-2
    assert all(map(torch.equal, arch_gradients(search), arch_gradients(free)))


def test_an_unused_beta_stays_where_it_is():
    model = supernet(partial=1, edge_normalisation=False)
    start = snapshot(model)
    Search(model, config()).step(draw_batch(0), draw_batch(1))
    assert torch.equal(start["betas_normal"], model.betas_normal)
    assert not torch.equal(start["alphas_normal"], model.alphas_normal)


# --- Second order


def exact_gradients(search: Search, train_batch, val_batch) -> list[torch.Tensor]:
    """d/da of L_val(w - lr (momentum buffer + dL_train/dw + wd w), a), by differentiating through the step."""
    model, settings = copy.deepcopy(search.model), search.config
    arch = list(model.arch_parameters())
    weights = {n: p for n, p in model.named_parameters() if not any(p is a for a in arch)}
    buffers = [search.weight_optimizer.state[p].get("momentum_buffer") for p in search.weights]
    loss = F.cross_entropy(model(train_batch[0]), train_batch[1])
    grads = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
    ahead = {
        name: w - search.lr * (g + settings.weight_decay * w + (0 if b is None else settings.momentum * b))
        for (name, w), g, b in zip(weights.items(), grads, buffers, strict=True)
    }
    val_loss = F.cross_entropy(functional_call(model, ahead, (val_batch[0],)), val_batch[1])
    return list(torch.autograd.grad(val_loss, arch))


@pytest.mark.parametrize("build", [smooth_net, supernet])
@pytest.mark.parametrize("steps_before", [0, 2])
def test_the_second_order_gradient_is_the_derivative_through_the_weight_step(build, steps_before):
    size = 2 if build is smooth_net else 4
    batches = [draw_batch(seed, images=8, size=size) for seed in range(6)]
    search = Search(build(), config(unrolled=True, arch_weight_decay=0.0, weight_decay=0.1, frozen_epochs=1))
    search.lr = search.weight_optimizer.param_groups[0]["lr"] = 0.5  # a large step: the second order must matter
    for seed in range(steps_before):  # frozen epochs, so that Adam's first moment is still unused afterwards
        search.step(batches[seed], None)
    search.epoch = 1
    exact = exact_gradients(search, *batches[4:])
    first_order = torch.autograd.grad(
        F.cross_entropy(copy.deepcopy(search.model)(batches[5][0]), batches[5][1]), search.arch, allow_unused=True
    )
    assert all(grad is None for grad in first_order), "the copy's gradients are its own"
    search.step(*batches[4:])
    found = torch.cat([grad.flatten() for grad in arch_gradients(search)])
    exact = torch.cat([grad.flatten() for grad in exact])
    tolerance = 1e-3 if build is smooth_net else 1e-2  # the supernet has kinks (ReLU, maximum)
    print(build.__name__, steps_before, float((found - exact).norm() / exact.norm()))
    assert (found - exact).norm() < tolerance * exact.norm()
