"""One step of SGD with every extra against plain PyTorch, and its state."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nas_kmix.engine.compute import Compute
from nas_kmix.engine.learner import Learner, OptimConfig, Recipe
from nas_kmix.mixers import MixConfig

N, CLASSES = 12, 5
CONFIG = OptimConfig(lr=0.3, weight_decay=1e-2, momentum=0.8)


class Net(nn.Module):
    """Two classifiers on a few features; `drop_path` (1, 1, N) scales the features of the first."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.features, self.norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
            self.first, self.second = nn.Linear(6, CLASSES), nn.Linear(6, CLASSES)

    def forward(self, images, drop_path=None):
        x = self.norm(self.features(images)).relu().mean(dim=(2, 3))
        kept = x if drop_path is None else x * drop_path[0, 0, :, None]
        return (self.first(kept), self.second(x)) if self.training else self.first(kept)


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(N, 3, 8, 8, generator=generator, dtype=torch.float64)
    labels = torch.rand(N, CLASSES, generator=generator, dtype=torch.float64)
    return images, labels / labels.sum(dim=1, keepdim=True)


def learner(recipe, config=CONFIG):
    return Learner(Net().double(), config, recipe)


def cross_entropy(logits, labels, smoothing):
    return -((labels * (1 - smoothing) + smoothing / CLASSES) * logits.log_softmax(1)).sum(1).mean()


def assert_same(a, b):
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("momentum", [0.8, 0.0])
def test_steps_are_those_of_plain_sgd(smoothing, clip, nesterov, momentum):
    recipe = Recipe(nesterov=nesterov, grad_clip=clip, label_smoothing=smoothing, auxiliary_weight=0.4)
    config = replace(CONFIG, momentum=momentum)
    ours, theirs = learner(recipe, config), Net().double()
    velocity = {name: torch.zeros_like(p) for name, p in theirs.named_parameters()}
    for step in range(3):
        images, labels = batch(step)
        mask = torch.rand(1, 1, N, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        loss, hits = ours.step(images, labels, mask)
        logits, auxiliary = theirs(images, mask)
        expected = cross_entropy(logits, labels, smoothing)
        theirs.zero_grad()
        (expected + 0.4 * cross_entropy(auxiliary, labels, smoothing)).backward()
        assert float(loss) == pytest.approx(float(expected.detach()), rel=1e-12)
        assert int(hits) == sum(int(a.argmax() == b.argmax()) for a, b in zip(logits, labels, strict=True))
        norm = sum(float(p.grad.square().sum()) for p in theirs.parameters()) ** 0.5
        scale = 1.0 if clip is None else min(1.0, clip / (norm + 1e-6))
        assert clip is None or scale < 1.0  # otherwise clipping would not be seen
        with torch.no_grad():
            for name, p in theirs.named_parameters():
                gradient = scale * p.grad + 1e-2 * p
                velocity[name] = momentum * velocity[name] + gradient
                p -= 0.3 * (gradient + momentum * velocity[name] if nesterov else velocity[name])
    assert_same(ours.model, theirs)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_of_co_mixup_is_a_binary_cross_entropy_per_class(smoothing):
    ours = learner(Recipe(loss="softmax_bce", label_smoothing=smoothing, auxiliary_weight=0.0))
    images, labels = batch()
    probabilities = ours.model(images)[0].softmax(dim=1)
    targets = labels * (1 - smoothing) + smoothing / CLASSES
    terms = [
        -t * math.log(p) - (1 - t) * math.log(1 - p)
        for t, p in zip(targets.flatten().tolist(), probabilities.flatten().tolist(), strict=True)
    ]
    assert float(ours.step(images, labels)[0]) == pytest.approx(sum(terms) / len(terms), rel=1e-9)


@pytest.mark.parametrize("parts", [2, 3, 5, 100])
def test_accumulated_parts_are_the_whole_batch_where_batchnorm_does_not_tell(parts):
    """Also parts of unequal size, and more parts than images."""
    whole, divided = learner(Recipe()), learner(Recipe(accumulate=parts))
    images, labels = batch()
    losses = []
    for one in (whole, divided):
        one.model.norm.eval()
        losses.append(tuple(map(float, one.step(images, labels, torch.linspace(0, 2, N).double().view(1, 1, N)))))
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    assert_same(whole.model, divided.model)


def test_the_average_is_that_of_all_steps_and_what_is_evaluated():
    plain, averaging = learner(Recipe()), learner(Recipe(ema=0.7))
    expected = None
    for step in range(4):
        for one in (plain, averaging):
            one.step(*batch(step))
        state = copy.deepcopy(plain.model.state_dict())
        state.pop("norm.num_batches_tracked")
        if expected is None:  # the average begins with the first step's result
            expected = state
        else:
            expected = {name: 0.7 * expected[name] + 0.3 * state[name] for name in state}
    assert_same(plain.model, averaging.model)
    assert plain.evaluated is plain.model and averaging.evaluated is not averaging.model
    found = averaging.evaluated.state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("ema", [None, 0.9])
def test_a_state_continues_as_if_nothing_had_happened(tmp_path, ema):
    one, other = (learner(Recipe(ema=ema, grad_clip=1.0)) for _ in range(2))
    for step in range(2):
        one.step(*batch(step))
    torch.save(one.state_dict(), tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for step in range(2, 4):
        for learner_ in (one, other):
            learner_.step(*batch(step))
    for a, b in ((one.model, other.model), (one.evaluated, other.evaluated)):
        assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_the_loss_is_taken_in_the_labels_precision():
    """Logits of bfloat16 are too coarse for a loss."""
    model = Learner(Net(), CONFIG, Recipe(), Compute(amp="bf16"))
    images, labels = batch()
    loss, _ = model.step(images.float(), labels.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, _ = Net()(images.float())
    assert loss.dtype == torch.float32 and logits.dtype == torch.bfloat16
    assert float(loss) == float(F.cross_entropy(logits.float(), labels.float()).detach())


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"drop_path": 1.0}, "--drop-path"),
        ({"label_smoothing": -0.1}, "--label-smoothing"),
        ({"auxiliary_weight": float("nan")}, "--auxiliary-weight"),
        ({"grad_clip": 0.0}, "--grad-clip"),
        ({"ema": 1.0}, "--ema"),
        ({"accumulate": 0}, "--accumulate"),
        ({"limit_steps": 0}, "--limit-steps"),
    ],
)
def test_values_that_make_no_sense_are_refused(fields, named):
    with pytest.raises(ValueError, match=named):
        Recipe(**fields)


@pytest.mark.parametrize("milestones", [(150.0, 225.0), (0.0,), (float("nan"),)])
def test_milestones_are_fractions_not_epochs(milestones):
    with pytest.raises(ValueError, match="--milestones are fractions"):
        OptimConfig(milestones=milestones)


@pytest.mark.parametrize(
    ("fields", "named"), [({"mix_k": 1}, "k"), ({"mix_alpha": -1.0}, "alpha"), ({"mix_prob": 2.0}, "prob")]
)
def test_a_mix_that_cannot_be_is_refused_with_its_flag(fields, named):
    with pytest.raises(ValueError, match=f"--mix-{named} must"):
        MixConfig(**fields)
