"""Attacks against closed forms and exact bounds, transfer, natural and out-of-distribution images, the command."""

import copy
import csv
import shlex
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
from sklearn.metrics import average_precision_score
from torch import nn
from torch.nn import functional as F

import train_eval
from nas_kmix.analysis import robustness
from nas_kmix.analysis.attacks import PixelClassifier, fgsm, linf_ball, pgd, random_starts
from nas_kmix.analysis.classifiers import load_classifier
from nas_kmix.analysis.measures import attacked_accuracy, natural_accuracy, of_known_classes, ood_aupr, to_pixels
from nas_kmix.analysis.robustness import AttackConfig, make_attack
from nas_kmix.analysis.runs import InputConfig, load_images, subset
from nas_kmix.engine.data import ImageData
from nas_kmix.engine.datasets import open_class_folders

EPS = 8 / 255
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


def draw_pixels(n=6, size=8, seed=0):
    """k/255 as images have them, all values among them, black and white too."""
    values = torch.randint(0, 256, (n, 3, size, size), generator=torch.Generator().manual_seed(seed))
    values[0, 0].view(-1)[:2] = torch.tensor([0, 255])
    return values.float() / 255


def seeded(build, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build()


def linear(size=8, classes=4):
    """Logits linear in normalised pixels, behind the normalisation."""
    model = seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * size * size, classes)))
    return PixelClassifier(model, MEAN, STD)


def convolutional():
    """With BatchNorm whose running statistics are far from a batch's, and dropout."""

    def build():
        layers = nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(216, 4)
        )
        layers[1].running_mean.uniform_(-2, 2)
        layers[1].running_var.uniform_(0.2, 5)
        return layers

    return PixelClassifier(seeded(build), MEAN, STD)


# -- attacks -----------------------------------------------------------------------------------------------------------


def test_fgsm_on_a_linear_model_is_the_closed_form():
    """In pixels, d CE / d x = W' (softmax - onehot) / std; computed here by hand in float64."""
    model, pixels = linear(), draw_pixels()
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    weight, bias = (p.detach().double().numpy() for p in model.model[1].parameters())
    x = pixels.double().numpy()
    mean, std = (np.array(c).reshape(3, 1, 1) for c in (MEAN, STD))
    logits = ((x - mean) / std).reshape(6, -1) @ weight.T + bias
    softmax = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    gradient = ((softmax - np.eye(4)[labels]) @ weight).reshape(x.shape) / std
    expected = np.clip(x + EPS * np.sign(gradient), 0.0, 1.0)
    found = fgsm(model, pixels, labels, eps=EPS)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-7)
    # The perturbation is eps in pixels: inside [0, 1] every one of them moves by eps, whatever the normalisation.
    inner = (pixels > EPS) & (pixels < 1 - EPS)
    torch.testing.assert_close((found - pixels).abs()[inner], torch.full_like(pixels[inner], EPS), rtol=0, atol=1e-7)


def test_one_step_of_pgd_from_the_image_is_fgsm_and_steps_follow_the_projected_gradient():
    model, pixels, labels = convolutional().eval(), draw_pixels(), torch.tensor([0, 1, 2, 3, 0, 1])
    first = pgd(model, pixels, labels, eps=EPS, step=1.0, steps=1)
    torch.testing.assert_close(first, fgsm(model, pixels, labels, eps=EPS), rtol=0, atol=0)
    start = random_starts(np.arange(6), (3, 8, 8), seed=(0,))
    found = pgd(model, pixels, labels, eps=EPS, step=2 / 255, steps=4, start=start)
    x = (pixels.double() + EPS * start.double()).clamp(0, 1)
    model = copy.deepcopy(model).double()
    for _ in range(4):
        x.requires_grad_()
        F.cross_entropy(model(x), labels).backward()
        x = (x + 2 / 255 * x.grad.sign()).detach()
        x = pixels.double() + (x - pixels.double()).clamp(-EPS, EPS)
        x = x.clamp(0, 1)
    assert ((found.double() - x).abs() < 1e-6).double().mean() > 0.999  # a gradient at zero may take either sign


@pytest.mark.parametrize("eps", [8.0, 2.0, 0.5, 255.0, 7.3])
def test_every_example_lies_within_eps_and_the_unit_interval_exactly(eps):
    """In exact arithmetic, also for pixels that are no multiples of 1/255."""
    pixels = torch.cat([draw_pixels(3), torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))])
    labels, radius = torch.tensor([0, 1, 2, 3, 0, 1]), eps / 255
    model = convolutional()
    start = random_starts(np.arange(6), (3, 8, 8), seed=(0,))
    for found in (
        fgsm(model, pixels, labels, eps=radius),
        pgd(model, pixels, labels, eps=radius, step=2 / 255, steps=7, start=start),
        pgd(model, pixels, labels, eps=radius, step=1.0, steps=1),
    ):
        assert (found != pixels).any() and found.dtype == torch.float32
        for mine, old in zip(found.flatten().tolist(), pixels.flatten().tolist(), strict=True):
            assert 0.0 <= mine <= 1.0 and abs(Fraction(mine) - Fraction(old)) <= Fraction(radius)


def test_the_bounds_are_the_outermost_floats():
    """Of a radius that is itself a float, the greatest one up to eps."""
    pixels, radius = draw_pixels(), Fraction(float(np.nextafter(np.float32(EPS), np.float32(0))))
    assert radius <= Fraction(EPS)
    for bound, outwards in zip(linf_ball(pixels, EPS), (-1.0, 2.0), strict=True):
        beyond = bound.nextafter(torch.tensor(outwards))
        for mine, old in zip(beyond.flatten().tolist(), pixels.flatten().tolist(), strict=True):
            assert abs(Fraction(mine) - Fraction(old)) > radius or not 0.0 <= mine <= 1.0


def test_attacks_use_and_leave_the_network_as_it_is():
    """Handed over in training mode, BatchNorm and dropout must still act as in evaluation."""
    model, pixels, labels = convolutional(), draw_pixels(), torch.tensor([0, 1, 2, 3, 0, 1])
    evaluating, before = copy.deepcopy(model).eval(), copy.deepcopy(model.state_dict())
    for attack in (
        lambda model: fgsm(model, pixels, labels, eps=EPS),
        lambda model: pgd(model, pixels, labels, eps=EPS, step=2 / 255, steps=3),
    ):
        model.train()
        assert torch.equal(attack(model), attack(evaluating)) and model.training
        whole = attack(evaluating)
        x = pixels[:1]
        alone = fgsm(evaluating, x, labels[:1], eps=EPS)  # an image's example does not depend on its batch
        assert torch.equal(alone, fgsm(evaluating, pixels, labels, eps=EPS)[:1]) and whole.shape == pixels.shape
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_starts_are_uniform_and_belong_to_the_image():
    starts = random_starts(np.array([4, 9]), (3, 40, 40), seed=(0, 2))
    assert torch.equal(random_starts(np.array([9]), (3, 40, 40), seed=(0, 2))[0], starts[1])
    assert not torch.equal(random_starts(np.array([9]), (3, 40, 40), seed=(1, 2))[0], starts[1])
    assert starts.min() >= -1 and starts.max() <= 1 and starts.dtype == torch.float32
    assert starts.mean().abs() < 0.03 and starts.var().item() == pytest.approx(1 / 3, rel=0.05)


# -- images ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A tiny network on the digits, and, hardly trained, the same of another seed and another architecture."""
    folder = tmp_path_factory.mktemp("digits")
    flags = shlex.split("--device cpu --threads 1 -j 0 --epochs 2 --val-share 0 --channels-last --data digits --out")
    for name, extra in (
        ("a", "--backbone tiny --seed 0"),
        ("b", "--backbone tiny --seed 1 --limit-steps 10"),
        ("other", "--backbone small --limit-steps 5"),
    ):
        train_eval.run(train_eval.parse([*flags, str(folder / name), *extra.split()]))
    return folder


@pytest.fixture(scope="module")
def thousand(request, digits, tmp_path_factory):
    """A trained network and 1,000 images: CIFAR-100's training images where there are some, else digits."""
    try:
        path = request.getfixturevalue("real_cifar100")
    except pytest.skip.Exception:
        run, config = digits / "a", InputConfig(split="train")
    else:
        run, config = tmp_path_factory.mktemp("cifar") / "net", InputConfig(split="train")
        flags = shlex.split("--device cpu --threads 1 -j 0 --backbone tiny --epochs 4 --val-share 0 --channels-last")
        train_eval.run(train_eval.parse([*flags, "--data", str(path), "--out", str(run)]))
    classifier = load_classifier(run / "last.pt")
    data = load_images(config, classifier, device=torch.device("cpu"), workers=0)
    return PixelClassifier(classifier.model, classifier.mean, classifier.std).eval(), data, subset(data, 1000, seed=0)


def test_pgd_is_stronger_than_fgsm_and_more_steps_are_no_weaker(thousand):
    model, data, indices = thousand
    attacks = {"fgsm": make_attack("fgsm", AttackConfig(eps=2.0), seed=0)}
    for steps in (1, 3, 10):
        attacks[f"pgd-{steps}"] = make_attack("pgd", AttackConfig(eps=2.0, step=1.0, steps=steps), seed=0)
    found = attacked_accuracy({"net": model}, data, indices, attacks, batch_size=250)["net"]
    assert len(indices) == 1000 and found["clean"] > 0.1
    assert found["clean"] > found["fgsm"] >= found["pgd-10"]
    assert found["pgd-1"] >= found["pgd-3"] >= found["pgd-10"]


def test_accuracies_are_those_of_a_slow_loop(thousand):
    model, data, indices = thousand
    indices, hits = indices[:30], {"clean": 0, "fgsm": 0}
    for index in indices:
        pixels, label = data.images[index : index + 1].float() / 255, torch.tensor([int(data.labels[index])])
        for name, shown in (("clean", pixels), ("fgsm", fgsm(model, pixels, label, eps=EPS))):
            normalised = (shown - torch.tensor(data.mean).view(3, 1, 1)) / torch.tensor(data.std).view(3, 1, 1)
            hits[name] += int(model.model(normalised).argmax() == label)
    attacks = {"fgsm": make_attack("fgsm", AttackConfig(), seed=0)}
    found = attacked_accuracy({"net": model}, data, indices, attacks, batch_size=7)["net"]
    assert found == {name: pytest.approx(count / 30) for name, count in hits.items()}


def test_examples_of_a_substitute_are_shown_to_all(digits):
    models = {}
    for name in ("a", "b", "other"):
        classifier = load_classifier(digits / name / "last.pt")
        models[name] = PixelClassifier(classifier.model, classifier.mean, classifier.std).eval()
    data = load_images(InputConfig(), classifier, device=torch.device("cpu"), workers=0)
    indices = np.arange(60)
    attacks = {"fgsm": make_attack("fgsm", AttackConfig(eps=20.0), seed=0)}
    found = attacked_accuracy(models, data, indices, attacks, substitute=models["b"], batch_size=25)
    batch = data.fetch(indices)
    examples = fgsm(models["b"], to_pixels(batch.images), batch.labels, eps=20 / 255)
    for name, model in models.items():
        with torch.no_grad():
            expected = (model(examples).argmax(dim=1) == batch.labels).float().mean().item()
        assert found[name]["fgsm"] == pytest.approx(expected)
    white = attacked_accuracy({"b": models["b"]}, data, indices, attacks, batch_size=25)
    assert white["b"] == found["b"]


# -- out of distribution -----------------------------------------------------------------------------------------------


def precision_recall_area(scores, positive):
    """Sum of precision times the gain in recall, at each different score, ties taken together."""
    area = recall = 0.0
    for threshold in sorted(set(scores), reverse=True):
        chosen = [p for s, p in zip(scores, positive, strict=True) if s >= threshold]
        now = sum(chosen) / sum(positive)
        area, recall = area + (now - recall) * sum(chosen) / len(chosen), now
    return area


def test_aupr_on_ties():
    rng = np.random.default_rng(0)
    inside, outside = (torch.from_numpy(rng.integers(0, 3, (n, 4)).astype(np.float32)) for n in (40, 25))
    confidence = torch.cat([inside, outside]).double().softmax(dim=1).amax(dim=1)
    scores, positive = (-confidence).tolist(), [0] * 40 + [1] * 25
    assert len(set(scores)) < 25  # many ties
    found = ood_aupr(inside, outside)
    assert found == pytest.approx(precision_recall_area(scores, positive), abs=1e-12)
    assert found == average_precision_score(positive, scores)


def test_a_perfect_detector_gives_one_and_a_blind_one_the_share_of_positives():
    sure, unsure = 9.0 * torch.eye(4), torch.zeros(4, 4)
    assert ood_aupr(sure, unsure) == 1.0
    assert ood_aupr(sure[[0, 0, 0]], sure[:1]) == pytest.approx(1 / 4)
    assert ood_aupr(unsure, sure) < 0.6


class Reading(nn.Module):
    """Recognises an image by its brightness: logits are minus the distances to 0.1, 0.3, 0.5, …."""

    def __init__(self, classes):
        super().__init__()
        self.levels = torch.arange(classes) * 0.2 + 0.1

    def forward(self, x):
        return -20 * (x.mean(dim=(1, 2, 3))[:, None] - self.levels).abs()


def write_grey(folder, levels, size=10):
    from PIL import Image

    folder.mkdir(parents=True)
    for i, level in enumerate(levels):
        Image.new("RGB", (size, size), (round(255 * level),) * 3).save(folder / f"{i}.png")


def test_natural_images_are_matched_by_the_names_of_their_folders(tmp_path):
    """Of the classes a to d, folders show d and b, and z, which is unknown."""
    write_grey(tmp_path / "d", [0.7, 0.7, 0.3, 0.1])
    write_grey(tmp_path / "b", [0.3, 0.5])
    write_grey(tmp_path / "z", [0.3])
    names = ("a", "b", "c", "d")
    source = of_known_classes(open_class_folders(tmp_path), names, known=True)
    assert source.labels.tolist() == [1, 1, 3, 3, 3, 3] and source.class_names == names
    data = ImageData(source, 8, (0.0,) * 3, (1.0,) * 3, torch.device("cpu"), None)
    among_all, among_present = natural_accuracy(PixelClassifier(Reading(4), data.mean, data.std), data, batch_size=4)
    assert among_all == pytest.approx(3 / 6)
    assert among_present == pytest.approx(3 / 6)  # c's image is read as b or d: 0.5 lies between, the first wins
    others = of_known_classes(open_class_folders(tmp_path), names, known=False)
    assert others.paths == ("z/0.png",)
    with pytest.raises(ValueError, match="no images of any other classes"):
        of_known_classes(open_class_folders(tmp_path), (*names, "z"), known=False)


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_table_and_the_file_tell_the_same_and_the_checkpoints_stay(digits, tmp_path, capsys):
    before = {path: path.read_bytes() for path in digits.rglob("*") if path.is_file()}
    out = tmp_path / "table" / "grey.csv"
    runs = [str(digits / name) for name in ("a", "b", "other")]
    argv = [*runs, *shlex.split("--attack fgsm pgd --steps 2 --images 40 --batch-size 16 --device cpu --out"), str(out)]
    assert robustness.main([*argv, "--substitute", str(digits / "b")]) == 0
    rows = list(csv.DictReader(out.open()))
    assert [row["run"] for row in rows] == ["a", "b", "other"]
    assert [row["threat"] for row in rows] == ["grey", "white", "black"]
    assert {row["eps"] for row in rows} == {"8/255"} and {row["images"] for row in rows} == {"40"}
    lines = capsys.readouterr().out.splitlines()[-3:]
    for row, line in zip(rows, lines, strict=True):
        shown = [f"{100 * float(row[f'{kind}_accuracy']):.2f} %" for kind in ("clean", "fgsm", "pgd")]
        assert line.split()[0] == row["run"] and all(number in line for number in shown)
    assert robustness.main(argv) == 0
    assert {row["threat"] for row in csv.DictReader(out.open())} == {"white"}
    assert {path: path.read_bytes() for path in digits.rglob("*") if path.is_file()} == before


def test_folders_of_the_command(digits, tmp_path):
    """Digits: 3 and 5 are known; `x` is not. ImageNet-O's folders are named by what images are mistaken for."""
    for name in ("3", "5", "x"):
        write_grey(tmp_path / "all" / name, [0.2, 0.8])
    config = robustness.Config(
        runs=(digits / "a",), natural=tmp_path / "all", ood=tmp_path / "all", input=InputConfig(images=0)
    )
    (row,) = robustness.run(config)
    assert (row["natural_images"], row["natural_classes"]) == (4, 2)
    assert (row["ood_images"], row["in_images"]) == (2, 355) and 0.0 < row["ood_aupr"] < 1.0
    write_grey(tmp_path / "mistaken" / "3", [0.5] * 3)
    config = robustness.Config(runs=(digits / "a",), ood=tmp_path / "mistaken", ood_folders="mistaken")
    (row,) = robustness.run(config)
    assert (row["ood_images"], row["in_images"]) == (3, 36)  # against the threes of the test images


def test_what_makes_no_sense_is_refused(digits, tmp_path, capsys):
    run = str(digits / "a")
    write_grey(tmp_path / "splits" / "train" / "1", [0.5])
    (tmp_path / "nothing").mkdir()
    for argv, named in (
        ([run], "--attack fgsm"),
        ([run, "--substitute", run], "--attack fgsm"),
        ([run, "--attack", "fgsm", "--eps", "0"], "--eps"),
        ([run, "--attack", "fgsm", "--amp", "bf16"], "--amp"),
        ([run, "--attack", "fgsm", "--batch-size", "0"], "--batch-size"),
        ([run, "--attack", "fgsm", "--images", "-1"], "--images"),
        ([run, "--attack", "fgsm", "--substitute", str(tmp_path / "x.pt")], "x.pt"),
        ([run, "--natural", str(tmp_path / "nowhere")], "nowhere"),
        ([run, "--natural", str(tmp_path / "nothing"), "--attack", "pgd", "--steps", "1000000"], "no class folders"),
        ([run, "--natural", str(tmp_path / "splits")], str(Path("splits", "train"))),
        ([run, "--ood", str(tmp_path / "splits" / "train")], "--ood-folders mistaken"),
    ):
        assert robustness.main([*argv, "--device", "cpu", "--out", str(tmp_path / "out.csv")]) == 2, named
        said = capsys.readouterr().err
        assert said.startswith("error: ") and named in said
    assert not (tmp_path / "out.csv").exists()


@pytest.fixture(scope="module")
def imagenette_run(real_imagenette, tmp_path_factory):
    run = tmp_path_factory.mktemp("imagenette") / "net"
    flags = shlex.split("--device cpu --threads 1 -j 2 --backbone tiny --image-size 72 --epochs 1 --batch-size 50")
    train_eval.run(train_eval.parse([*flags, "--data", str(real_imagenette), "--out", str(run)]))
    return run


def test_an_imagenette_model_on_the_imagenet_sample(imagenette_run, real_data, tmp_path):
    """One class, tench, is shared by name; the images of the 99 others are out of distribution."""
    from conftest import _unpack

    _unpack(real_data, "imagenet_sample", tmp_path / "sample")
    sample = tmp_path / "sample" / "train"
    config = robustness.Config(runs=(imagenette_run,), natural=sample, ood=sample, input=InputConfig(images=50))
    (row,) = robustness.run(config)
    assert (row["natural_images"], row["natural_classes"], row["natural_accuracy_of_its_classes"]) == (1, 1, 1.0)
    assert (row["ood_images"], row["in_images"]) == (99, 300) and 0.1 < row["ood_aupr"] < 1.0


@pytest.mark.parametrize("flag", ["eps", "step"])
def test_units_of_the_attack_are_told_apart(flag, capsys):
    """Shares of [0, 1], as other libraries take them, would make every network look robust."""

    def given(text):
        return getattr(tyro.cli(AttackConfig, args=[f"--{flag}", text]), flag)

    assert (given("8"), given("8/255"), given("0.5/255"), given("12.75")) == (8.0, 8.0, 0.5, 12.75)
    for text, said in {"0.0314": "write 8.01/255", "8/256": "not a fraction of 255", "8px": "8px"}.items():
        with pytest.raises(SystemExit):
            given(text)
        assert said in " ".join(capsys.readouterr().err.replace("│", " ").split())
