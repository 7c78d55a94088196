"""Checkpoints of the published code: networks with its names, written here, against ours with the same weights."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import draw_pixels
from torch import nn
from torch.nn import functional as F

import search
from darts_space import GENOTYPES, load_network
from nas_kmix.analysis import convert
from nas_kmix.analysis.classifiers import load_classifier
from nas_kmix.backbones import pyramid_widths

# -- the published names: what registers a module under which name, and what is computed with it -----------------------


class Inside(nn.Module):
    """Layers under the name `op`."""

    def __init__(self, *layers):
        super().__init__()
        self.op = nn.Sequential(*layers)

    def forward(self, x):
        return self.op(x)


class Halving(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv_1 = nn.Conv2d(inputs, outputs // 2, 1, stride=2, bias=False)
        self.conv_2 = nn.Conv2d(inputs, outputs // 2, 1, stride=2, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x):
        x = F.relu(x)
        return self.bn(torch.cat([self.conv_1(x), self.conv_2(x[:, :, 1:, 1:])], 1))


def depthwise(c, kernel, stride, dilation):
    padding = dilation * (kernel - 1) // 2
    yield from (nn.ReLU(), nn.Conv2d(c, c, kernel, stride, padding, dilation, groups=c, bias=False))
    yield from (nn.Conv2d(c, c, 1, bias=False), nn.BatchNorm2d(c))


def operation(name, c, stride):
    if name.startswith("sep_conv"):
        return Inside(*depthwise(c, int(name[-1]), stride, 1), *depthwise(c, int(name[-1]), 1, 1))
    if name.startswith("dil_conv"):
        return Inside(*depthwise(c, int(name[-1]), stride, 2))
    if name == "skip_connect":
        return nn.Identity() if stride == 1 else Halving(c, c)
    pool = nn.MaxPool2d(3, stride, 1) if name == "max_pool_3x3" else nn.AvgPool2d(3, stride, 1, count_include_pad=False)
    return pool


class TheirCell(nn.Module):
    def __init__(self, edges, before, last, c, reduces, reduced):
        super().__init__()
        self.edges = edges
        self.preprocess0 = Halving(before, c) if reduced else TheirCell.narrowed(before, c)
        self.preprocess1 = TheirCell.narrowed(last, c)
        strides = [2 if reduces and source < 2 else 1 for _, source in edges]
        self._ops = nn.ModuleList(operation(name, c, stride) for (name, _), stride in zip(edges, strides, strict=True))

    @staticmethod
    def narrowed(inputs, outputs):
        return Inside(nn.ReLU(), nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x, y):
        states = [self.preprocess0(x), self.preprocess1(y)]
        for i in range(0, 8, 2):
            states.append(sum(self._ops[j](states[self.edges[j][1]]) for j in (i, i + 1)))
        return torch.cat(states[2:], 1)


class TheirNetwork(nn.Module):
    def __init__(self, genotype, kind, c, layers, classes, auxiliary):
        super().__init__()
        width = 3 * c if kind == "cifar" else c
        if kind == "cifar":
            self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))
        else:
            first = nn.Conv2d(3, c // 2, 3, 2, 1, bias=False), nn.BatchNorm2d(c // 2)
            self.stem0 = nn.Sequential(*first, nn.ReLU(), nn.Conv2d(c // 2, c, 3, 2, 1, bias=False), nn.BatchNorm2d(c))
            self.stem1 = nn.Sequential(nn.ReLU(), nn.Conv2d(c, c, 3, 2, 1, bias=False), nn.BatchNorm2d(c))
        self.cells, before, last, reduced = nn.ModuleList(), width, width, kind == "imagenet"
        for i in range(layers):
            reduces = i in (layers // 3, 2 * layers // 3)
            c *= 2 if reduces else 1
            edges = genotype.reduce if reduces else genotype.normal
            self.cells.append(TheirCell(edges, before, last, c, reduces, reduced))
            before, last, reduced = last, 4 * c, reduces
            if auxiliary and i == 2 * layers // 3:
                norm = [nn.BatchNorm2d(768)] if kind == "cifar" else []
                self.auxiliary_head = nn.Module()
                self.auxiliary_head.features = nn.Sequential(
                    *(nn.ReLU(), nn.AvgPool2d(5, 3), nn.Conv2d(last, 128, 1, bias=False), nn.BatchNorm2d(128)),
                    *(nn.ReLU(), nn.Conv2d(128, 768, 2, bias=False), *norm, nn.ReLU()),
                )
                self.auxiliary_head.classifier = nn.Linear(768, classes)
        self.classifier = nn.Linear(last, classes)

    def forward(self, x):
        x = y = self.stem(x) if hasattr(self, "stem") else self.stem0(x)
        y = self.stem1(y) if hasattr(self, "stem1") else y
        for cell in self.cells:
            x, y = y, cell(x, y)
        return self.classifier(y.mean((2, 3)))


class TheirBlock(nn.Module):
    def __init__(self, inputs, width, stride):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, width, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn3, self.conv3 = nn.BatchNorm2d(width), nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn4, self.stride = nn.BatchNorm2d(4 * width), stride

    def forward(self, x):
        out = self.conv2(F.relu(self.bn2(self.conv1(self.bn1(x)))))
        out = self.bn4(self.conv3(F.relu(self.bn3(out)))).clone()
        x = F.avg_pool2d(x, 2, ceil_mode=True) if self.stride == 2 else x
        out[:, : x.shape[1]] += x
        return out


class TheirPyramidNet(nn.Module):
    def __init__(self, classes, depth=110, alpha=64):
        super().__init__()
        widths, inputs, n = pyramid_widths(depth=depth, alpha=alpha), 16, (depth - 2) // 9
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        for stage in range(3):
            blocks = []
            for i, width in enumerate(widths[n * stage : n * (stage + 1)]):
                blocks.append(TheirBlock(inputs, width, 2 if stage and not i else 1))
                inputs = 4 * width
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.bn_final, self.fc = nn.BatchNorm2d(inputs), nn.Linear(inputs, classes)

    def forward(self, x):
        x = self.layer3(self.layer2(self.layer1(self.bn1(self.conv1(x)))))
        return self.fc(F.relu(self.bn_final(x)).mean((2, 3)))


def weights_drawn(model, seed=0):
    """Every weight and statistic its own, so that no two can be exchanged unseen; positive variances."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            drawn = torch.randn(value.shape, generator=generator)
            value.copy_(0.5 + drawn.abs() if name.endswith("running_var") else 0.3 * drawn)
    return model.eval()


# -- conversion --------------------------------------------------------------------------------------------------------


@pytest.fixture
def npz(tmp_path):
    """Six images of three classes, 32 px."""
    labels = np.arange(12) % 3
    names = np.array(["ant", "bee", "fly"])
    np.savez(tmp_path / "set.npz", train_images=draw_pixels(12, 32, 32, 3), train_labels=labels, class_names=names)
    return tmp_path / "set.npz"


def images(size, n=2):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


WRAPPINGS = {
    "plain": lambda state: state,
    "module": lambda state: {f"module.{name}": value for name, value in state.items()},
    "nested": lambda state: {"epoch": 3, "state_dict": {f"module.{n}": v for n, v in state.items()}, "best_err1": 16.9},
    "old": lambda state: {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize(
    ("name", "kind", "auxiliary"),
    [("DARTS_V2", "cifar", True), ("PC_DARTS_cifar", "cifar", False), ("PC_DARTS_image", "imagenet", True)],
)
def test_a_network_in_their_layout_gives_equal_logits(name, kind, auxiliary, wrapping, npz, tmp_path, monkeypatch):
    theirs = weights_drawn(TheirNetwork(GENOTYPES[name], kind, 4, 6, 3, auxiliary))
    zipped = wrapping != "old"  # PyTorch 0.3 wrote another kind of file
    torch.save(WRAPPINGS[wrapping](theirs.state_dict()), tmp_path / "their.pt", _use_new_zipfile_serialization=zipped)
    argv = [str(tmp_path / "their.pt"), "--genotype", name, "--data", str(npz), "--out", str(tmp_path / "ours.pt")]
    assert convert.main(argv) == 0
    ours, x = load_network(tmp_path / "ours.pt"), images(32 if kind == "cifar" else 128)
    with torch.no_grad():
        expected, found = theirs(x), ours(x)
    assert expected.abs().max() > 1e-3 and (found - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert ours.class_names == ("ant", "bee", "fly") and (ours.auxiliary is not None) == auxiliary
    if auxiliary:
        head = {f"features.{i}" for i in (0, 1, 3)} | ({"features.4"} if kind == "cifar" else set())
        for place in head:
            number = int(place.split(".")[1])
            expected = theirs.auxiliary_head.features[number + 2].weight
            assert torch.equal(ours.auxiliary.get_submodule(place).weight, expected)


def test_a_pyramidnet_becomes_a_scorer(npz, tmp_path, capsys):
    theirs = weights_drawn(TheirPyramidNet(3))
    torch.save(WRAPPINGS["nested"](theirs.state_dict()), tmp_path / "model_best.pth.tar")
    argv = [str(tmp_path / "model_best.pth.tar"), "--data", str(npz), "--out", str(tmp_path / "scorer.pt")]
    assert convert.main(argv) == 0 and "scorer.pt: 1," in capsys.readouterr().out
    ours = load_classifier(tmp_path / "scorer.pt")
    with torch.no_grad():
        expected, found = theirs(images(32)), ours.model(images(32))
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert ours.network["backbone"] == "pyramidnet110" and ours.mean == tuple(v / 255 for v in (125.3, 123.0, 113.9))

    flags = ["--data", str(npz), "--scorer", str(tmp_path / "scorer.pt"), "--stop-after", "scores", "--device", "cpu"]
    flags += ["--scoring.draws", "2", "--threads", "1", "--no-report", "--out", str(tmp_path / "run")]
    assert search.main(flags) == 0
    table = search.run(search.parse(flags)).table
    assert table.losses.shape == (12, 2) and np.isfinite(table.losses).all()


@pytest.mark.parametrize(
    ("change", "flags", "said"),
    [
        (
            lambda state: state,
            ["--genotype", "PC_DARTS_cifar"],
            "weights are not those of the genotype that --genotype",
        ),
        (lambda state: state, [], "no PyramidNet-110 or -200 for CIFAR; for the network of a genotype give --genotype"),
        (lambda state: {"fc.weight": torch.zeros(3, 3)}, ["--genotype", "DARTS_V2"], "no network in DARTS's layout"),
        (lambda state: [1, 2], ["--genotype", "DARTS_V2"], "holds no state dict, alone or under 'state_dict'"),
        (lambda state: {**state, "more": torch.zeros(1)}, ["--genotype", "DARTS_V2"], "more is missing, unexpected"),
        (
            lambda state: {name: value for name, value in state.items() if name != "cells.0._ops.0.op.2.weight"},
            ["--genotype", "DARTS_V2"],
            "cells.0.operations.0.2.weight is missing",
        ),
        (lambda state: {"state_dict": Path("x")}, ["--genotype", "DARTS_V2"], "holds more than tensors"),
    ],
)
def test_what_does_not_fit_is_a_sentence(change, flags, said, npz, tmp_path, capsys):
    state = TheirNetwork(GENOTYPES["DARTS_V2"], "cifar", 2, 3, 3, False).state_dict()
    torch.save(change(dict(state)), tmp_path / "their.pt")
    argv = [str(tmp_path / "their.pt"), *flags, "--data", str(npz), "--out", str(tmp_path / "ours.pt")]
    assert convert.main(argv) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "ours.pt").exists()


def test_other_classes_and_missing_files_are_named(npz, tmp_path, capsys):
    torch.save(TheirNetwork(GENOTYPES["DARTS_V2"], "cifar", 2, 3, 5, False).state_dict(), tmp_path / "their.pt")
    flags = ["--genotype", "DARTS_V2", "--data", str(npz), "--out", str(tmp_path / "ours.pt")]
    assert convert.main([str(tmp_path / "their.pt"), *flags]) == 2
    assert "is a network of 5 classes, but --data" in capsys.readouterr().err
    assert convert.main([str(tmp_path / "none.pt"), *flags]) == 2
    assert "none.pt cannot be read: No such file" in capsys.readouterr().err
