"""Scorers that others have trained: the right outputs, the right preparation, and one sentence where they do not fit.

No weights are downloaded: they are drawn, and put where the libraries look for them.
"""

import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision import models
from torchvision.datasets.imagenette import Imagenette

import search
from nas_kmix.engine.data import DataConfig, load_data
from nas_kmix.engine.decoding import decode_all
from nas_kmix.pretrained import WNIDS, class_outputs, is_published, published_scorer, scorer_of_file
from nas_kmix.scores import ScoreTable
from nas_kmix.scoring import ScoringConfig, score_dataset

NAMES = tuple(models.ResNet18_Weights.DEFAULT.meta["categories"])
SIDE = 72
FLAGS = shlex.split(
    f"--no-report --threads 1 --device cpu -j 0 --image-size {SIDE} --stop-after scores --scoring.k 2 --scoring.draws 2"
)


def draw_weights(**arguments):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return models.resnet18(weights=None, **arguments).state_dict()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """torchvision's cache, with weights for resnet18, and no network."""

    def refuse(*_, **__):
        raise URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "urlopen", refuse)
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(draw_weights(), folder / models.ResNet18_Weights.DEFAULT.url.rpartition("/")[2])
    return folder


@pytest.fixture
def photographs(image_folder):
    """Two of ImageNet's classes, one by its WordNet id and one by its name."""
    return image_folder(classes=("n03000684", "tench"), per_class=3, sizes=((90, 100), (120, 95)), suffix=".jpg")


def load(folder, **options):
    return load_data(DataConfig(data=str(folder), image_size=SIDE), **options)


class ByHand(nn.Module):
    """resnet18 on images of its own 224 px, and two of its logits."""

    def __init__(self, outputs):
        super().__init__()
        self.network, self.outputs = models.resnet18(weights=None), outputs
        self.network.load_state_dict(draw_weights())

    def forward(self, images):
        images = F.interpolate(images, (224, 224), mode="bilinear", antialias=True)
        return self.network(images)[:, self.outputs]


def test_a_torchvision_network_scores_as_score_dataset_does_by_hand(cache, photographs, tmp_path, capsys):
    out = tmp_path / "run"
    argv = [*FLAGS, "--data", str(photographs), "--out", str(out), "--scorer", "torchvision:resnet18:IMAGENET1K_V1"]
    assert search.main(argv) == 0, capsys.readouterr().err
    table = ScoreTable.load(out / "scores.npz")

    data = load(photographs)
    resize = round(SIDE * 256 / 224)  # as the weights were trained to be evaluated
    images = decode_all(data.source, SIDE, resize, threads=0, bad=data.bad)
    data = replace(data, images=images, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    by_hand = score_dataset(ByHand([NAMES.index("chain saw"), 0]), data, ScoringConfig(k=2, draws=2))
    np.testing.assert_allclose(table.losses, by_hand.losses, rtol=1e-5)
    assert np.ptp(table.losses) > 0

    bill = json.loads((out / "cost.json").read_text())["stages"]
    assert bill["scorer"]["skipped"] and bill["scorer"]["images_backward"] == 0
    assert bill["scoring"]["images_forward"] == 6 * (2 + 1) and not (out / "scorer.pt").exists()
    assert "resnet18:IMAGENET1K_V1, which comes from elsewhere" in capsys.readouterr().out


def test_a_file_of_weights_is_the_same_network(cache, photographs, tmp_path):
    path, data = tmp_path / "weights.pth", load(photographs)
    state = {"state_dict": {f"module.{name}": value for name, value in draw_weights().items()}, "epoch": 3}
    images = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    one, view = published_scorer("torchvision:resnet18", data)
    two, same_view = scorer_of_file(path, state, "torchvision:resnet18", data)
    assert torch.equal(one(images), two(images)) and one(images).shape == (2, 2)
    assert (view.mean, view.resize) == (same_view.mean, same_view.resize) and torch.equal(view.images, same_view.images)


def test_weights_trained_on_these_classes_keep_their_order(image_folder):
    data = load_data(DataConfig(data=str(image_folder(classes=("b", "a"), per_class=2))))
    network, view = scorer_of_file(Path("w.pth"), draw_weights(num_classes=2), "torchvision:resnet18", data)
    assert network(torch.zeros(1, 3, 8, 8)).shape == (1, 2)
    ours, same = scorer_of_file(Path("w.pth"), network_of("tiny", 2).state_dict(), "tiny", data)
    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ours(images), network_of("tiny", 2).eval()(images))
    alphabetical = dict(sorted(network_of("tiny", 2).state_dict().items()))  # as safetensors gives them
    assert torch.equal(scorer_of_file(Path("w.pth"), alphabetical, "tiny", data)[0](images), ours(images))
    assert same.mean == data.mean != view.mean


def network_of(name, classes):
    from nas_kmix.backbones import build_backbone

    return build_backbone(name, num_classes=classes, seed=5)


# -- classes -----------------------------------------------------------------------------------------------------------


def test_wordnet_ids_are_in_the_order_of_the_outputs():
    assert len(WNIDS) == len(set(WNIDS)) == 1000 and list(WNIDS) == sorted(WNIDS)
    for wnid, names in Imagenette._WNID_TO_CLASS.items():
        assert NAMES[WNIDS.index(wnid)].replace(" ", "") in {name.replace(" ", "") for name in names}


def test_classes_are_known_by_id_or_by_name():
    names = ["n01484850", "n01440764_tench", "Great-Grey_Owl", "golf ball"]
    assert [NAMES[i] for i in class_outputs(names, NAMES, "x")] == [
        "great white shark", "tench", "great grey owl", "golf ball",
    ]  # fmt: skip
    assert class_outputs(["b", "a"], ["a", "b"], "x") == [1, 0]


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["tench", "aardvark"], "x does not know the class 'aardvark'"),
        (["goldfishes"], "the nearest is 'goldfish'"),
        (["n00000001"], "x does not know the class 'n00000001'"),
        (["cardigan"], "x knows 2 classes called 'cardigan'; call its folder n02113186 or n02963159"),
        (["tench", "n01440764"], "'tench' and 'n01440764' of --data are one class"),
    ],
)
def test_other_classes_are_refused_by_name(names, sentence):
    with pytest.raises(ValueError, match=sentence):
        class_outputs(names, NAMES, "x")


# -- refusals ----------------------------------------------------------------------------------------------------------


def refused(photographs, tmp_path, capsys, *arguments):
    code = search.main([*FLAGS, "--data", str(photographs), "--out", str(tmp_path / "run"), *map(str, arguments)])
    said = capsys.readouterr().err
    assert code in (1, 2) and said.count("\n") == 1 and said.startswith("error: "), said
    assert not (tmp_path / "run" / "scores.npz").exists()
    return code, said


@pytest.mark.parametrize(
    ("scorer", "sentence"),
    [
        ("torchvision:resnet19", "torchvision has no classifier 'resnet19'"),
        ("torchvision:resnet18:IMAGENET1K_V7", "has no weights 'IMAGENET1K_V7'"),
        ("nowhere.pth", "nowhere.pth: there is no such file"),
    ],
)
def test_names_that_do_not_exist(scorer, sentence, photographs, tmp_path, capsys):
    code, said = refused(photographs, tmp_path, capsys, "--scorer", scorer)
    assert code == 2 and sentence in said


def test_without_a_network_it_says_where_the_file_belongs(cache, photographs, tmp_path, capsys):
    code, said = refused(photographs, tmp_path, capsys, "--scorer", "torchvision:resnet34")
    name = models.ResNet34_Weights.DEFAULT.url.rpartition("/")[2]
    assert code == 1 and "no network" in said and f"put it at {cache / name}" in said


def test_a_library_that_is_not_installed(photographs, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    assert "pip install timm" in refused(photographs, tmp_path, capsys, "--scorer", "timm:resnet18")[1]


@pytest.mark.parametrize(
    ("state", "sentence"),
    [
        (lambda: draw_weights(num_classes=5), "tells 5 classes apart, but --data has 2"),
        (lambda: draw_weights() | {"conv1.weight": torch.zeros(64, 1, 7, 7)}, "another network than --scorer.backbone"),
        (lambda: draw_weights() | {"fc.weight": torch.zeros(())}, "another network than --scorer.backbone"),
        (lambda: {"epoch": 3}, "neither the scorer.pt of a search nor a state dict"),
        (dict, "neither the scorer.pt of a search nor a state dict"),
    ],
)
def test_weights_that_do_not_fit(state, sentence, photographs, tmp_path, capsys):
    torch.save(state(), tmp_path / "weights.pth")
    arguments = ["--scorer", tmp_path / "weights.pth", "--scorer.backbone", "torchvision:resnet18"]
    code, said = refused(photographs, tmp_path, capsys, *arguments)
    assert code == 2 and sentence in said


def test_a_network_without_a_last_linear_layer_is_refused(photographs, tmp_path, capsys):
    torch.save(draw_weights(), tmp_path / "weights.pth")
    arguments = ["--scorer", tmp_path / "weights.pth", "--scorer.backbone", "torchvision:squeezenet1_1"]
    assert (
        "torchvision:squeezenet1_1 does not end in a linear layer"
        in refused(photographs, tmp_path, capsys, *arguments)[1]
    )


def test_a_class_that_the_network_does_not_know_is_refused_before_any_download(cache, image_folder, tmp_path, capsys):
    folder = image_folder(classes=("tench", "aardvark"), sizes=((80, 80),))
    code, said = refused(folder, tmp_path, capsys, "--scorer", "torchvision:resnet34")
    assert code == 2 and "does not know the class 'aardvark'" in said


def test_a_published_name_is_no_file():
    assert is_published("torchvision:resnet50") and is_published(Path("timm:vit_tiny_patch16_224"))
    assert not is_published("runs/scorer.pt") and not is_published("torchvision")


def test_timm_s_networks_score_too(photographs, monkeypatch):
    timm = pytest.importorskip("timm")
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: create(name))  # without a download
    network, view = published_scorer("timm:test_resnet.r160_in1k", load(photographs))
    assert network(torch.zeros(2, 3, SIDE, SIDE)).shape == (2, 2) and view.mean != load(photographs).mean
