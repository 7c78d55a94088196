"""The bilevel step against plain PyTorch loops, exact second derivatives, and interrupted runs."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from darts_space import unrolled
from darts_space.bilevel import Search
from darts_space.fast.supernet import SuperNet
from darts_space.plain import PlainSuperNet
from darts_space.search_network import ARCHITECTURE_NAMES, SearchNetwork
from darts_space.settings import BilevelConfig, learning_rate, scaled_lr


class SmoothNet(nn.Module):
    """A two-path network without kinks, so that its second derivatives exist everywhere."""

    def __init__(self, generator: torch.Generator):
        super().__init__()
        self.alpha = nn.Parameter(torch.randn(2, generator=generator, dtype=torch.float64))
        self.norm = nn.BatchNorm2d(3, dtype=torch.float64)
        self.one = nn.Parameter(torch.randn(4, 48, generator=generator, dtype=torch.float64))
        self.two = nn.Parameter(torch.randn(4, 48, generator=generator, dtype=torch.float64))

    def forward(self, images):
        x = self.norm(images).flatten(1) / 7
        weights = self.alpha.softmax(0)
        return weights[0] * torch.tanh(x @ self.one.T) + weights[1] * torch.sin(x @ self.two.T)

    def arch_parameters(self):
        return [self.alpha]

    def weight_parameters(self):
        return [self.one, self.two, self.norm.weight, self.norm.bias]  # as `named_parameters` orders them


def smooth_net() -> SmoothNet:
    return SmoothNet(torch.Generator().manual_seed(0))


def supernet(
    seed: int = 0, dtype: torch.dtype = torch.float64, kind: type[SearchNetwork] = SuperNet, **arguments
) -> SearchNetwork:
    generator = torch.Generator().manual_seed(seed)
    return kind(**{"channels": 4, "num_classes": 4, "layers": 3, **arguments}, generator=generator).to(dtype)


def draw_batch(seed: int, images: int = 4, size: int = 4, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(images, 3, size, size, generator=generator, dtype=dtype)
    return pixels, torch.randint(4, (images,), generator=generator)


def config(**arguments) -> BilevelConfig:
    """No frozen epochs, so that a test sees both steps at once."""
    return BilevelConfig(**{"rest_steps": 0, "arch_steps": 8, "epoch_steps": 2, **arguments})


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def arch_gradients(search: Search) -> list[torch.Tensor]:
    """The gradients of the first architecture step, recovered from Adam's first moment (weight decay must be 0)."""
    moment_share = 1 - search.config.arch_betas[0]
    return [search.arch_optimizer.state[p]["exp_avg"] / moment_share for p in search.arch]


# --- First order


@pytest.mark.parametrize("arch_grad_clip", [None, 1e-3])
def test_first_order_is_the_published_loop(arch_grad_clip):
    """Three steps against a plain loop: backward everywhere, then step one optimiser at a time."""
    settings = config(arch_steps=10, epoch_steps=1, grad_clip=0.5, arch_grad_clip=arch_grad_clip)
    model = supernet()
    oracle = copy.deepcopy(model)
    arch = [getattr(oracle, name) for name in ARCHITECTURE_NAMES]
    weights = [p for p in oracle.parameters() if not any(p is a for a in arch)]
    sgd = torch.optim.SGD(weights, lr=0.1, momentum=0.9, weight_decay=3e-4)
    adam = torch.optim.Adam(arch, lr=6e-4, betas=(0.5, 0.999), weight_decay=1e-3)
    search = Search(model, settings)
    for step in range(3):
        train_batch, val_batch = draw_batch(2 * step), draw_batch(2 * step + 1)
        result = search.step(train_batch, val_batch)

        sgd.param_groups[0]["lr"] = 0.05 * (1 + math.cos(math.pi * step / 10))
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


def test_alpha_and_beta_rest_while_the_weights_move():
    model = supernet()
    search = Search(model, config(rest_steps=2))
    start = snapshot(model)
    for step in range(2):
        assert search.resting and search.step(draw_batch(step), None).val_loss is None
    assert all(torch.equal(start[name], getattr(model, name)) for name in ARCHITECTURE_NAMES)
    assert not torch.equal(start["classifier.weight"], model.classifier.weight)
    assert int(model.stem0[1].num_batches_tracked) == 2, "one forward pass per step"
    with pytest.raises(ValueError, match="Step 2 moves the architecture and needs a validation batch"):
        search.step(draw_batch(2), None)
    search.step(draw_batch(2), draw_batch(3))
    assert not any(torch.equal(start[name], getattr(model, name)) for name in ARCHITECTURE_NAMES)


def test_a_search_ends_with_its_last_step():
    search = Search(smooth_net(), config(rest_steps=1, arch_steps=1))
    for seed in range(2):
        search.step(draw_batch(seed, images=8), draw_batch(seed + 2, images=8))
    with pytest.raises(ValueError, match="taken all of its 2 steps"):
        search.step(draw_batch(0, images=8), draw_batch(1, images=8))


def test_the_gradient_of_the_architecture_moves_nothing():
    search = Search(supernet(), config(arch_weight_decay=0.0))
    loss, found = search.arch_gradient(draw_batch(1))
    assert all(torch.equal(a, b) for a, b in zip(search.arch, supernet().arch_parameters(), strict=True))
    assert search.step(draw_batch(0), draw_batch(1)).val_loss == loss
    torch.testing.assert_close(list(found), arch_gradients(search), rtol=1e-12, atol=0)


def test_only_the_weights_are_clipped_by_grad_clip():
    search = Search(supernet(), config(grad_clip=1e-4, momentum=0.0, weight_decay=0.0, arch_weight_decay=0.0))
    free = Search(supernet(), config(grad_clip=1e4, momentum=0.0, weight_decay=0.0, arch_weight_decay=0.0))
    norms = []
    for one in (search, free):
        before = [weight.detach().clone() for weight in one.weights]
        one.step(draw_batch(0), draw_batch(1))
        moved = [weight.detach() - start for weight, start in zip(one.weights, before, strict=True)]
        norms.append(torch.cat([m.flatten() for m in moved]).norm() / 0.1)
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
    """d/da of L_val(w - lr (momentum buffer + dL_train/dw + wd w), a), by differentiating through the step.

    Of the two supernets only the plain one can be differentiated twice.
    """
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


def about_to_unroll(model: nn.Module, steps_before: int) -> Search:
    """A search with momentum from `steps_before` resting steps; Adam is still untouched, the next step unrolls."""
    settings = config(rest_steps=steps_before, lr=0.5, unrolled=True, arch_weight_decay=0.0, weight_decay=0.1)
    search = Search(model, settings)
    for seed in range(steps_before):
        search.step(draw_batch(seed, images=8), None)
    return search


@pytest.mark.parametrize("steps_before", [0, 2])
def test_the_second_order_gradient_is_the_derivative_through_the_weight_step(steps_before):
    search = about_to_unroll(smooth_net(), steps_before)
    batches = draw_batch(8, images=8), draw_batch(9, images=8)
    exact = exact_gradients(search, *batches)
    search.step(*batches)
    torch.testing.assert_close(arch_gradients(search), exact, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("steps_before", [0, 2])
def test_so_it_is_on_a_supernet_where_the_difference_crosses_no_kink(steps_before, monkeypatch):
    monkeypatch.setattr(unrolled, "DIFFERENCE_STEP", 1e-6)
    search = about_to_unroll(supernet(kind=PlainSuperNet), steps_before)
    batches = draw_batch(8, images=8), draw_batch(9, images=8)
    exact = exact_gradients(search, *batches)
    search.step(*batches)
    torch.testing.assert_close(arch_gradients(search), exact, rtol=1e-5, atol=1e-8)


def test_the_published_difference_is_taken_to_the_letter():
    """At R = 0.01 / ||v|| on a supernet, where an exact derivative differs."""
    search = about_to_unroll(supernet(kind=PlainSuperNet), 1)
    batches = draw_batch(8, images=8), draw_batch(9, images=8)
    exact = exact_gradients(search, *batches)
    model, lr = copy.deepcopy(search.model), search.lr
    arch = list(model.arch_parameters())
    w = {n: p.detach() for n, p in model.named_parameters() if n not in ARCHITECTURE_NAMES}

    def gradients(weights, batch):
        weights = {name: value.requires_grad_() for name, value in weights.items()}
        loss = F.cross_entropy(functional_call(model, weights, (batch[0],)), batch[1])
        grads = torch.autograd.grad(loss, [*arch, *weights.values()])
        return grads[:4], dict(zip(weights, grads[4:], strict=True))

    def moved(direction, length):
        return {name: (w[name] + length * direction[name]).detach() for name in w}

    _, slope = gradients(moved(w, 0.0), batches[0])
    momentum = [search.weight_optimizer.state[p]["momentum_buffer"] for p in search.weights]
    step = {n: 0.9 * b + slope[n] + 0.1 * w[n] for (n, b) in zip(w, momentum, strict=True)}
    direct, v = gradients(moved(step, -lr), batches[1])
    radius = 0.01 / math.sqrt(sum(float((value**2).sum()) for value in v.values()))
    plus, minus = (gradients(moved(v, sign * radius), batches[0])[0] for sign in (1, -1))
    expected = [d - lr * (p - m) / (2 * radius) for d, p, m in zip(direct, plus, minus, strict=True)]
    search.step(*batches)
    torch.testing.assert_close(arch_gradients(search), expected, rtol=1e-6, atol=1e-9)
    error = sum(float(((e - x) ** 2).sum()) for e, x in zip(expected, exact, strict=True))
    assert error > 0.01 * sum(float((x**2).sum()) for x in exact), "the kinks matter here"


# --- Schedules, precision, evaluation


def test_the_learning_rate_is_the_published_one():
    """The figures are those of a 50-epoch cosine at the start of an epoch."""
    cifar = BilevelConfig()
    rates = [learning_rate(cifar, 98 * epoch + step) for epoch in (0, 1, 15, 25, 49) for step in (0, 97)]
    assert rates == pytest.approx(
        [rate for rate in (0.1, 0.099901, 0.079389, 0.05, 9.87e-5) for _ in range(2)], rel=5e-4
    )
    assert learning_rate(BilevelConfig(lr_min=0.02), 98 * 25) == pytest.approx(0.06)
    imagenet = BilevelConfig(rest_steps=350, arch_steps=150, epoch_steps=10, lr=0.5, warmup_epochs=5)
    rates = [learning_rate(imagenet, step) for step in (0, 9, 10, 49, 50, 69)]
    cosine = [0.25 * (1 + math.cos(math.pi * epoch / 50)) for epoch in (5, 6)]
    assert rates == pytest.approx([0.1, 0.1, 0.2, 0.5, *cosine])
    constant = BilevelConfig(schedule="constant", warmup_epochs=2, epoch_steps=3)
    assert [learning_rate(constant, step) for step in (0, 3, 6, 4899)] == [0.05, 0.1, 0.1, 0.1]


def test_each_step_sets_its_rate():
    search = Search(smooth_net(), BilevelConfig(0, 4, lr=0.5, lr_min=0.1, epoch_steps=2))
    for expected in (0.5, 0.5, 0.3, 0.3):
        assert search.lr == pytest.approx(expected)
        search.step(draw_batch(0, images=8), draw_batch(1, images=8))
        assert search.weight_optimizer.param_groups[0]["lr"] == pytest.approx(expected)
        assert search.arch_optimizer.param_groups[0]["lr"] == 6e-4


def test_small_batches_lower_the_rate():
    rates = [scaled_lr(batch) for batch in (256, 64, 96, 1024, 1)]
    assert rates == pytest.approx([0.1, 0.025, 0.0375, 0.1, 0.1 / 256])
    assert scaled_lr(128, lr=0.2) == 0.1
    assert [scaled_lr(batch, 0.5, 1024) for batch in (64, 1024, 2048)] == [0.03125, 0.5, 0.5]
    with pytest.raises(ValueError, match="at least 1, not 0"):
        scaled_lr(0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rest_steps": 0, "arch_steps": 0}, r"need at least 1 step, not 0 \+ 0 and 98"),
        ({"epoch_steps": 0}, r"need at least 1 step, not 1470 \+ 3430 and 0"),
        ({"rest_steps": -1}, "rest_steps is -1; choose 0 or more"),
        ({"schedule": "step"}, "schedule is 'step'; use 'cosine' or 'constant'"),
        ({"warmup_epochs": -1}, "warmup_epochs is -1"),
        ({"lr": 0.0}, r"lr is 0\.0; choose a positive"),
        ({"arch_lr": float("nan")}, "arch_lr is nan"),
        ({"arch_grad_clip": -1.0}, "arch_grad_clip"),
        ({"amp": "fp8"}, "amp is 'fp8'; use one of off, bf16, fp16"),
        ({"unrolled": True, "amp": "bf16"}, "which bf16 cannot resolve"),
    ],
)
def test_impossible_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        BilevelConfig(**arguments)


def test_half_precision_on_the_cpu():
    model = supernet(dtype=torch.float32)
    reference = Search(copy.deepcopy(model), config())
    search = Search(model, config(amp="bf16"))
    batches = [draw_batch(seed, images=8, size=8, dtype=torch.float32) for seed in range(2)]
    found, expected = search.step(*batches), reference.step(*batches)
    assert found.train_loss.dtype == found.val_loss.dtype == torch.float32
    assert float(found.val_loss) == pytest.approx(float(expected.val_loss), rel=0.05)
    assert found.val_loss != expected.val_loss, "the passes did run in bf16"
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    with pytest.raises(ValueError, match="fp16' needs a CUDA device, the model is on cpu"):
        Search(model, config(amp="fp16"))


@pytest.mark.parametrize(("build", "unrolled"), [(supernet, False), (smooth_net, True)])
def test_a_step_never_reads_a_value_from_the_device(build, unrolled):
    """Tensors on "meta" have no values: whatever would wait for a GPU raises here."""
    search = Search(build().to("meta"), config(unrolled=unrolled, arch_grad_clip=5.0))
    images = torch.empty(2, 3, 4, 4, dtype=torch.float64, device="meta")
    labels = torch.empty(2, dtype=torch.int64, device="meta")
    for _ in range(2 if unrolled else 1):  # the second unrolled step has momentum
        result = search.step((images, labels), (images, labels))
    assert all(tensor.is_meta and tensor.dim() == 0 and not tensor.requires_grad for tensor in result)


# --- Resume


@pytest.mark.parametrize(("unrolled", "interrupted_after"), [(False, 1), (False, 2), (False, 3), (True, 3)])
def test_an_interrupted_search_ends_with_the_same_bits(tmp_path, unrolled, interrupted_after):
    settings = config(rest_steps=2, unrolled=unrolled)
    plan = [[draw_batch(2 * step + half, dtype=torch.float32) for half in range(2)] for step in range(5)]

    def run(search, steps):
        for train_batch, val_batch in steps:
            search.step(train_batch, val_batch)

    whole = Search(supernet(dtype=torch.float32), settings)
    run(whole, plan)
    first = Search(supernet(dtype=torch.float32), settings)
    run(first, plan[:interrupted_after])
    torch.save(first.state_dict(), tmp_path / "search.pt")
    second = Search(supernet(seed=9, dtype=torch.float32), settings)
    second.load_state_dict(torch.load(tmp_path / "search.pt", weights_only=True))
    assert second.steps_done == first.steps_done == interrupted_after and second.lr == first.lr
    run(second, plan[interrupted_after:])
    assert same(whole.model.state_dict(), second.model.state_dict())
    assert set(ARCHITECTURE_NAMES) <= set(whole.state_dict()["model"])
    for one, other in zip(whole.weights + whole.arch, second.weights + second.arch, strict=True):
        for a, b in ((whole.weight_optimizer, second.weight_optimizer), (whole.arch_optimizer, second.arch_optimizer)):
            assert all(torch.equal(value, b.state[other][key]) for key, value in a.state.get(one, {}).items())


def test_the_state_of_another_search_is_refused_and_changes_nothing():
    search = Search(supernet(), config())
    before = snapshot(search.model)
    for arguments in ({"layers": 4}, {"channels": 8}, {"num_classes": 5}):
        state = Search(supernet(**arguments), config()).state_dict()
        with pytest.raises(ValueError, match=r"another supernet: [0-9]+ tensors differ, first .*; build the model"):
            search.load_state_dict(state)
    with pytest.raises(ValueError, match="lacks weight_optimizer, scaler"):
        search.load_state_dict({"steps_done": 1, "model": {}, "arch_optimizer": {}})
    assert same(before, search.model.state_dict()) and search.steps_done == 0


def test_a_search_learns():
    """One channel's mean gives the label away: both losses fall well below chance."""
    search = Search(supernet(dtype=torch.float32), config(arch_steps=12, epoch_steps=12, lr=0.1, arch_lr=0.1))
    losses = []
    for step in range(12):
        batches = []
        for seed in (2 * step, 2 * step + 1):
            images, labels = draw_batch(seed, images=16, dtype=torch.float32)
            batches.append((images + 3 * labels[:, None, None, None], labels))
        losses.append(search.step(*batches))
    late = torch.stack([torch.stack([result.train_loss, result.val_loss]) for result in losses[-4:]]).mean(0)
    assert late.max() < 0.7 * math.log(4)
    assert search.model.diagnostics().entropy_normal < math.log(8) - 0.01
