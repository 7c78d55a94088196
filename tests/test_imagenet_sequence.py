"""The README's commands for ImageNet on several GPUs, on two CPU processes and photographs of Imagenette's kind."""

import json
import shlex

import numpy as np
import pytest
import torch
from ranks import ROOT, ended, needs_proc, torchrun
from test_pretrained import draw_weights
from torchvision import models

from darts_space import Genotype
from nas_kmix.scores import ScoreTable

pytestmark = [needs_proc, pytest.mark.slow]
CLASSES = ("n01440764", "n02102040", "n03000684", "n03417042")
COMMON = "--preset imagenet --threads 1 --device cpu -j 0 --no-report"
SEARCH = shlex.split(
    f"{COMMON} --scorer torchvision:resnet18 --scoring.k 3 --scoring.draws 2 --scoring.pool-size 16 --ratio .5 "
    "--arch-share .5 --channels 4 --layers 3 --batch-size 8 --rest-steps 2 --arch-steps 2 --record-every 2 "
    "--sync-batchnorm --finals --finals.epochs 1 --finals.rungs 1 --finals.controls 2 --finals.channels 2 "
    "--finals.layers 3 --finals.batch-size 8"
)
TRAIN = shlex.split(f"{COMMON} --channels 2 --layers 3 --no-auxiliary --epochs 1 --batch-size 8 --warmup-epochs 0")


def test_search_with_somebody_else_s_scorer_then_train(image_folder, tmp_path, monkeypatch):
    sizes = ((240, 300), (300, 230), (256, 256))
    folder = image_folder(classes=CLASSES, per_class=8, sizes=sizes, suffix=".jpg", splits=("train", "val"))
    cache = tmp_path / "torch" / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    torch.save(draw_weights(), cache / models.ResNet18_Weights.DEFAULT.url.rpartition("/")[2])
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    found, log = tmp_path / "search", tmp_path / "log"

    process = torchrun(log, ROOT / "search.py", *SEARCH, "--data", folder, "--out", found)
    assert ended(process, log) == 0, log.read_text()
    said = log.read_text()
    assert said.count("comes from elsewhere") == 1 and "shared by 2 processes" in said and "Traceback" not in said
    table = ScoreTable.load(found / "scores.npz")
    assert len(table.index) == 32 and np.isfinite(table.losses).all()
    bill = json.loads((found / "cost.json").read_text())["stages"]
    assert bill["scorer"]["skipped"] and bill["scoring"]["images_forward"] == 32 * 2
    assert bill["search"]["images_backward"] == (4 + 2) * 8  # four steps on the weights, two on the architecture
    assert json.loads((found / "result.json").read_text())["random"]["n"] == 2

    genotype = found / "genotype.json"
    process = torchrun(
        log, ROOT / "train_eval.py", *TRAIN, "--genotype", genotype, "--data", folder, "--out", tmp_path / "net"
    )
    assert ended(process, log) == 0, log.read_text()
    result = json.loads((tmp_path / "net" / "result.json").read_text())
    assert result["train_images"] == 32 and 0.0 <= result["last"]["val_accuracy"] <= 1.0
    assert result["network"]["genotype"] == Genotype.load(genotype).to_json()
