"""The supervised loop against a plain one in PyTorch, and interrupted runs that must end with the same bytes."""

import itertools
import math
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import draw_pixels
from torch import nn
from torch.nn import functional as F

from nas_kmix.engine import data as data_module
from nas_kmix.engine import files
from nas_kmix.engine.augment import Augmentation, augment_batch
from nas_kmix.engine.compute import Compute
from nas_kmix.engine.data import DataConfig, ImageData, load_data
from nas_kmix.engine.feed import AUGMENT, ORDER, epoch_batches
from nas_kmix.engine.keys import StageMismatchError, stage_key
from nas_kmix.engine.learner import OptimConfig
from nas_kmix.engine.meter import Meter, NonFiniteLossError
from nas_kmix.engine.progress import Progress, duration, measures
from nas_kmix.engine.run import Run, StoppedError
from nas_kmix.engine.sources import Source
from nas_kmix.engine.training import learning_rate, train

CLASSES, SIZE = 3, 8
CONFIG = OptimConfig(epochs=3, batch_size=8, lr=0.1, milestones=(0.4, 0.7), weight_decay=1e-2)
STEPS = 3  # per epoch: 8, 8 and 5 images
KEY = stage_key("scorer", {"epochs": 3}, {"data": "x"})


def make_data(n=21):
    pixels, labels = draw_pixels(n, SIZE, SIZE, 3), np.arange(n) % CLASSES
    source = Source("generated", "train", labels, tuple("abc"), arrays=pixels)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    return ImageData(source, SIZE, (0.5,) * 3, (0.3,) * 3, torch.device("cpu"), images)


class Net(nn.Module):
    """A convolution, batch normalisation and a linear layer; remembers the layout of its input."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.conv, self.norm, self.linear = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, CLASSES)
        self.seen = []

    def forward(self, images):
        x = self.conv(images)
        self.seen.append((images.is_contiguous(memory_format=torch.channels_last), x.dtype))
        return self.linear(F.relu(self.norm(x)).mean(dim=(2, 3)))


def mix(images, labels, rng):
    """Blends every image with a random other one."""
    partner, weight = torch.as_tensor(rng.permutation(len(images))), float(rng.uniform(0.5, 1.0))
    one_hot = F.one_hot(labels, CLASSES).float()
    return torch.lerp(images[partner], images, weight), torch.lerp(one_hot[partner], one_hot, weight)


def run_training(folder, *, data=None, mix=mix, config=CONFIG, key=KEY, seed=5, **options):
    """One invocation with a fresh model and fresh data, as the command line makes them."""
    model, data = Net(), data or make_data()
    with Run(folder, stages=("scorer",), compute=Compute(**options)) as run:
        train(
            run.compute.layout(model),
            data,
            config,
            Augmentation(),
            mix=mix,
            seed=seed,
            run=run,
            stage="scorer",
            key=key,
        )
    return model


def results(folder):
    """What a finished run leaves: the checkpoint's hash, its optimizer and the metrics."""
    state = files.load_tensors(folder / "checkpoints" / "scorer.pt")
    momenta = {str(i): s["momentum_buffer"] for i, s in state["optimizer"]["state"].items()}
    bill = files.read_json(folder / "cost.json")["stages"]["scorer"]
    passes = bill["images_forward"], bill["images_backward"]
    return files.hash_tensors(state["model"]), files.hash_tensors(momenta), (folder / "metrics.csv").read_text(), passes


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    run_training(folder)
    return results(folder)


# -- the schedule ------------------------------------------------------------------------------------------------------


def test_step_schedule_is_the_papers():
    rates = [learning_rate(OptimConfig(), epoch) for epoch in range(300)]
    np.testing.assert_allclose(rates, [0.25] * 225 + [0.025] * 45 + [0.0025] * 30)
    assert learning_rate(OptimConfig(epochs=1, milestones=(0.5, 0.75)), 0) == 0.25, "every training begins at its rate"


def test_a_warm_up_leaves_half_of_a_short_training():
    rates = [learning_rate(OptimConfig(epochs=5, lr=1.0, milestones=()), epoch, warmup_epochs=9) for epoch in range(5)]
    assert rates == [0.5, 1.0, 1.0, 1.0, 1.0]


def test_cosine_schedule_begins_at_the_rate_and_would_end_at_zero():
    config = OptimConfig(epochs=20, lr=0.4, schedule="cosine")
    rates = [learning_rate(config, epoch) for epoch in range(20)]
    assert rates[0] == 0.4 and math.isclose(rates[10], 0.2) and 0 < rates[19] < 0.01
    np.testing.assert_allclose(rates, [0.2 * (1 + math.cos(math.pi * epoch / 20)) for epoch in range(20)])
    assert learning_rate(config, 20) == pytest.approx(0.0)


# -- the loop ----------------------------------------------------------------------------------------------------------


def test_training_is_the_plain_loop(tmp_path):
    ours, theirs, data = run_training(tmp_path), Net().train(), make_data()
    rates, losses, hits = [0.1, 0.01, 0.001], [], []
    velocity = {name: torch.zeros_like(p) for name, p in theirs.named_parameters()}
    for epoch in range(3):
        total = right = 0.0
        for step, indices in enumerate(epoch_batches(np.arange(21), 8, STEPS, seed=(5, ORDER, epoch))):
            rng = np.random.default_rng([5, AUGMENT, epoch, step])
            images = augment_batch(data.images[indices], data, Augmentation(), rng=rng)
            images, labels = mix(images, torch.from_numpy(data.labels[indices]), rng)
            logits = theirs(images)
            loss = -(labels * logits.log_softmax(1)).sum(1).mean()
            right += int((logits.argmax(1) == labels.argmax(1)).sum())
            theirs.zero_grad()
            loss.backward()
            with torch.no_grad():
                for name, p in theirs.named_parameters():
                    gradient = p.grad + 1e-2 * p
                    velocity[name] = 0.9 * velocity[name] + gradient
                    p -= rates[epoch] * (gradient + 0.9 * velocity[name])
            total += float(loss.detach()) * len(indices)
        losses.append(total / 21)
        hits.append(right / 21)
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)
    rows = [line.split(",") for line in (tmp_path / "metrics.csv").read_text().splitlines()]
    assert rows[0] == ["stage", "epoch", "lr", "loss", "accuracy"] and [r[:3] for r in rows[1:]] == [
        ["scorer", str(epoch), f"{rate:g}"] for epoch, rate in enumerate(rates)
    ]
    np.testing.assert_allclose([float(row[3]) for row in rows[1:]], losses, rtol=1e-4)
    np.testing.assert_allclose([float(row[4]) for row in rows[1:]], hits, rtol=1e-6)


def test_a_second_run_ends_with_the_same_bytes(tmp_path, uninterrupted):
    run_training(tmp_path)
    assert results(tmp_path) == uninterrupted and uninterrupted[3] == (63, 63)


def test_another_seed_is_another_run(tmp_path, uninterrupted):
    run_training(tmp_path, seed=6)
    assert results(tmp_path)[0] != uninterrupted[0]


# -- interruptions -----------------------------------------------------------------------------------------------------


def stop_at(step):
    """A mix during whose `step`-th call (from 0, over all epochs of this invocation) a signal comes in."""
    calls = itertools.count()

    def stopping(images, labels, rng):
        if next(calls) == step:
            signal.raise_signal(signal.SIGTERM)
        return mix(images, labels, rng)

    return stopping


@pytest.mark.parametrize("step", range(3 * STEPS))
def test_stopped_at_any_step_and_resumed_it_ends_with_the_same_bytes(tmp_path, uninterrupted, step):
    with pytest.raises(StoppedError) as stopped:
        run_training(tmp_path, mix=stop_at(step))
    state = files.load_tensors(tmp_path / "checkpoints" / "scorer.pt")
    assert stopped.value.signum == signal.SIGTERM
    assert (state["epoch"], state["step"]) == divmod(step + 1, STEPS)  # the step was finished, none was begun
    run_training(tmp_path)
    assert results(tmp_path) == uninterrupted


def test_stopped_at_every_step_it_ends_with_the_same_bytes(tmp_path, uninterrupted):
    for _ in range(3 * STEPS):
        with pytest.raises(StoppedError):
            run_training(tmp_path, mix=stop_at(0))
    run_training(tmp_path)
    assert results(tmp_path) == uninterrupted


@pytest.mark.parametrize("step", [0, 1, 4, 5, 8])
def test_killed_between_checkpoints_it_ends_with_the_same_model(tmp_path, uninterrupted, monkeypatch, step):
    """No signal: the process dies in the middle of a step, with checkpoints after some earlier steps."""
    calls = itertools.count()
    monkeypatch.setattr(Run, "checkpoint_due", lambda run: run.ledger.costs["scorer"].images_forward % 2 == 0)

    def killed(images, labels, rng):
        if next(calls) == step:
            raise SystemError
        return mix(images, labels, rng)

    with pytest.raises(SystemError):
        run_training(tmp_path, mix=killed)
    run_training(tmp_path)
    assert results(tmp_path)[:3] == uninterrupted[:3]


def test_a_finished_run_does_nothing(tmp_path, uninterrupted):
    run_training(tmp_path)
    run_training(tmp_path, mix=None)  # would fail if it were called
    assert results(tmp_path) == uninterrupted


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    run_training(tmp_path)
    with pytest.raises(StageMismatchError, match="epochs was 3, now 4"):
        run_training(tmp_path, key=stage_key("scorer", {"epochs": 4}, {"data": "x"}))


# -- precision and layout ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("amp", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("off", torch.float32)])
def test_autocast(tmp_path, uninterrupted, amp, dtype):
    model = run_training(tmp_path, amp=amp)
    assert {seen[1] for seen in model.seen} == {dtype}
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters())
    assert (results(tmp_path)[0] == uninterrupted[0]) == (amp == "off")


def test_a_half_precision_run_resumes_with_its_loss_scale(tmp_path):
    """Large labels overflow the scaled gradients, so that the loss scale changes."""

    def heavy(mix):
        def mixed_and_heavy(*batch):
            images, labels = mix(*batch)
            return images, 20 * labels

        return mixed_and_heavy

    run_training(tmp_path / "left_alone", amp="fp16", mix=heavy(mix))
    with pytest.raises(StoppedError):
        run_training(tmp_path / "stopped", amp="fp16", mix=heavy(stop_at(4)))
    run_training(tmp_path / "stopped", amp="fp16", mix=heavy(mix))
    assert results(tmp_path / "stopped") == results(tmp_path / "left_alone")
    scales = [
        files.load_tensors(tmp_path / name / "checkpoints" / "scorer.pt")["scaler"]["scale"]
        for name in ("stopped", "left_alone")
    ]
    assert scales[0] == scales[1] < 2**16


def test_channels_last(tmp_path):
    model, plain = run_training(tmp_path / "last", channels_last=True), run_training(tmp_path / "first")
    assert all(seen[0] for seen in model.seen)
    assert model.conv.weight.is_contiguous(memory_format=torch.channels_last)
    for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


# -- losses that are not finite ----------------------------------------------------------------------------------------


def poison_at(step):
    calls = itertools.count()

    def poisoned(images, labels, rng):
        images, labels = mix(images, labels, rng)
        return images * (math.inf if next(calls) == step else 1), labels

    return poisoned


@pytest.mark.parametrize(
    ("call", "named"), [(0, "step 1 of epoch 1"), (4, "step 2 of epoch 2"), (8, "step 3 of epoch 3")]
)
def test_a_loss_that_is_not_finite_stops_with_its_step_named(tmp_path, uninterrupted, call, named):
    with pytest.raises(NonFiniteLossError, match=rf"scorer: the loss was not finite at {named}\. .*--amp off"):
        run_training(tmp_path, mix=poison_at(call))
    run_training(tmp_path)  # goes on from before that step
    assert results(tmp_path)[:3] == uninterrupted[:3]


def test_nothing_is_saved_after_a_loss_that_is_not_finite(tmp_path, uninterrupted, monkeypatch):
    monkeypatch.setattr(Run, "checkpoint_due", lambda run: True)
    with pytest.raises(NonFiniteLossError, match="step 2 of epoch 2"):
        run_training(tmp_path, mix=poison_at(4))
    state = files.load_tensors(tmp_path / "checkpoints" / "scorer.pt")
    assert (state["epoch"], state["step"]) == (1, 1) and all(v.isfinite().all() for v in state["model"].values())
    run_training(tmp_path)
    assert results(tmp_path)[:3] == uninterrupted[:3]


def test_long_epochs_stop_within_fifty_steps(tmp_path):
    poisoned, calls = poison_at(10), itertools.count()
    with pytest.raises(NonFiniteLossError, match="step 11 of epoch 1"):
        run_training(
            tmp_path,
            data=make_data(120),
            config=replace(CONFIG, batch_size=1),
            mix=lambda *batch: (next(calls), poisoned(*batch))[1],
        )
    assert next(calls) <= 61


def test_meter_means_and_its_first_bad_step():
    meter = Meter(torch.device("cpu"))
    assert meter.means() == {}
    meter.add(0, 4, loss=torch.tensor(8.0), correct=torch.tensor(3))
    meter.add(1, 2, loss=torch.tensor(1.0), correct=torch.tensor(2))
    assert meter.means() == {"loss": 1.5, "correct": 5 / 6}
    meter.check("search", 0)
    copy = Meter(torch.device("cpu"))
    copy.load_state_dict(meter.state_dict())
    for step, loss in ((2, math.inf), (3, math.nan)):
        copy.add(step, 1, loss=torch.tensor(loss))
    with pytest.raises(NonFiniteLossError, match=r"search: .* step 3 of epoch 8"):
        copy.check("search", 7)
    assert meter.means()["loss"] == 1.5


# -- bad images --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_resident_gb", [4.0, 0.0])
@pytest.mark.parametrize("known", [True, False])
def test_bad_images_are_left_out(tmp_path, image_folder, monkeypatch, max_resident_gb, known):
    """Whether they are known beforehand or, as in large streamed sets, found on the way; a bad batch is skipped."""
    folder = image_folder(classes=tuple("abc"), truncated=("train/a/1.png", "train/c/3.png"))
    if not known:
        monkeypatch.setattr(data_module.augment, "measure_constants", lambda data: ((0.5,) * 3, (0.3,) * 3))
    config = DataConfig(data=str(folder), max_resident_gb=max_resident_gb, max_bad_share=0.2)
    data, seen = load_data(config), []

    def counting(images, labels, rng):
        seen.extend(labels.tolist())
        return mix(images, labels, rng)

    run_training(tmp_path / "out", data=data, mix=counting, config=replace(CONFIG, batch_size=1))
    assert sorted(seen) == [0] * 9 + [1] * 12 + [2] * 9 and set(data.bad) == {1, 11}
    assert results(tmp_path / "out")[3] == (30, 30)


def test_a_streamed_run_is_the_resident_one_also_when_resumed(tmp_path, image_folder):
    folder = image_folder(classes=tuple("abc"), per_class=7, truncated=("train/a/1.png",))

    def data(max_resident_gb):
        return load_data(DataConfig(data=str(folder), max_resident_gb=max_resident_gb))

    run_training(tmp_path / "resident", data=data(4.0))
    run_training(tmp_path / "streamed", data=data(0.0))
    with pytest.raises(StoppedError):
        run_training(tmp_path / "stopped", data=data(0.0), mix=stop_at(4))
    run_training(tmp_path / "stopped", data=data(0.0))
    assert results(tmp_path / "resident") == results(tmp_path / "streamed") == results(tmp_path / "stopped")


# -- what a person sees ------------------------------------------------------------------------------------------------


def test_a_long_stage_is_announced_and_its_time_estimated(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("nas_kmix.engine.progress.time.monotonic", lambda: now[0])
    progress = Progress("scorer", 100, done=10)
    progress.update(0)  # of a shard of which nothing could be read
    progress.update(0)
    for _ in range(30):
        now[0] += 10
        progress.update(note="epoch 1/5")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "scorer: 100 steps, resumed after 10"
    assert lines[1] == "scorer: about 14 min, judging by the first steps"  # 87 steps of ten seconds
    assert lines[2].startswith("scorer: 14/100, 14 min left, epoch 1/5") and 6 < len(lines) < 13


def test_every_evaluated_epoch_and_the_last_one_are_told(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("nas_kmix.engine.progress.time.monotonic", lambda: now[0])
    progress = Progress("search", 8)
    for step in range(8):
        now[0] += 1.0
        progress.update()
        progress.tell(f"step {step}", always=step == 1)
    said = [line for line in capsys.readouterr().out.splitlines() if "step " in line]
    assert said == ["search: step 1, 6 s left", "search: step 5, 2 s left", "search: step 7"]


def test_what_people_watch_in_a_row_of_the_log():
    row = {"lr": 0.1, "loss": 1.41, "accuracy": 0.5213, "val_loss": 0.9, "val_accuracy": 0.6, "test_accuracy": 1.0}
    assert measures(row) == "loss 1.410, accuracy 52.1 %, validation 60.0 %, test 100.0 %"
    assert measures({"step": 8, "loss": 2.0, "val_loss": 3.0}) == "loss 2.000, validation loss 3.000"


def test_durations():
    seconds = {1.4: "1 s", 89: "89 s", 600: "10 min", 3.5 * 3600: "3.5 h", 50.4 * 3600: "2.1 days"}
    assert {s: duration(s) for s in seconds} == seconds
