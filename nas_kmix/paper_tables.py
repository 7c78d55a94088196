"""The classification results of the paper as plain data: Tables 1-3 and SM Tables 1 and 2.

`PAPER[name]` holds the settings that `train_eval.py --preset name` starts from, and the error that the paper reports.
Names read network-data-method, after `table2` or `sm` where a network has several settings.

There are three training recipes, as published: CutMix's for Table 1 (and SM Table 2), Co-Mixup's for Table 2 (and SM
Table 1), and CutMix's ImageNet recipe for Table 3. Where the paper gives neither K nor alpha (Table 2), K is 4 for
PreActResNet18's DCutMix, as its 20.50 is that of SM Table 1, and otherwise 3 or 5 as in Table 1; alpha is 1/K if the
paper's grid {1/3, 1/4, 1/5, 1/7, 1} has it, else 1.

The authors' released commands for PyramidNet-200 decay the weights by 4e-5 and the rate after .75 and .9 of the epochs,
as the paper's text says of PyramidNet-110 alone. The presets follow the text, so that a row of a table is what the
paper says it is; `--weight-decay 4e-5 --milestones .75 .9` are the released commands.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Settings = Mapping[str, Any]

# CutMix (Yun et al. 2019) on CIFAR; PyramidNet-110 with DCutMix or DMixup has its own settings.
CIFAR = {"epochs": 300, "batch_size": 64, "lr": 0.25, "weight_decay": 1e-4, "milestones": (0.5, 0.75)}
PYRAMIDNET110 = {**CIFAR, "weight_decay": 4e-5, "milestones": (0.75, 0.9)}
# Co-Mixup (Kim et al. 2021) on CIFAR-100.
CO_MIXUP = {"epochs": 300, "batch_size": 100, "lr": 0.2, "weight_decay": 1e-4, "milestones": (1 / 3, 2 / 3)}
# CutMix on ImageNet.
IMAGENET = {"epochs": 300, "batch_size": 256, "lr": 0.1, "weight_decay": 1e-4, "milestones": (0.25, 0.5, 0.75)}
IMAGENET_AUGMENTATION = {"color_jitter": (0.4, 0.4, 0.4, 0.0), "lighting": 0.1}

NONE = {"mix": "none"}
MIXUP = {"mix": "mixup", "mix_alpha": 1.0}
MANIFOLD_MIXUP = {"mix": "manifold_mixup", "mix_alpha": 1.0}
CUTMIX = {"mix": "cutmix", "mix_alpha": 1.0, "mix_prob": 0.5}


def k_images(mix: str, k: int, alpha: float, p: float = 1.0) -> Settings:
    return {"mix": mix, "mix_k": k, "mix_alpha": alpha, "mix_prob": p}


@dataclass(frozen=True)
class PaperResult:
    """One result: the fields of `train_eval.Config` that differ from the defaults, and what the paper reports."""

    table: str
    row: str
    """As in the paper, without the citation."""
    error: float
    """Top-1 test error in per cent."""
    network: Settings
    input: Settings
    optim: Settings
    mix: Settings
    augmentation: Settings = field(default_factory=dict)
    recipe: Settings = field(default_factory=dict)
    top5: float | None = None
    """Top-5 error in per cent, if reported."""
    baseline: str | None = None
    """Name of the result for the same network and data without mixing; None for that one itself."""
    time_ratio: float | None = None
    """Training time relative to the baseline's, as reported (Table 2)."""

    @property
    def doc(self) -> str:
        """One line for a help text."""
        top5 = "" if self.top5 is None else f", top-5 {self.top5:.2f} %"
        return f"{self.table}, {self.row}: top-1 error {self.error:.2f} %{top5}"


def _table1() -> dict[str, PaperResult]:
    results = {}

    def add(name, row, error, network, data, optim, mix=NONE, augmentation=None, recipe=None, drop=None):
        baseline = f"{network}-{data}" if name else None
        results[f"{network}-{data}" + (f"-{name}" if name else "")] = PaperResult(
            "Table 1", row, error, {"backbone": network, **(drop or {})}, {"data": data}, optim, mix,
            augmentation or {}, recipe or {}, baseline=baseline,
        )  # fmt: skip

    small, deep = "pyramidnet110", "pyramidnet200"
    add("", "PyramidNet-110", 19.85, small, "cifar100", CIFAR)
    add("mixup", "PyramidNet-110 + Mixup", 18.92, small, "cifar100", CIFAR, MIXUP)
    add("cutmix", "PyramidNet-110 + CutMix", 17.97, small, "cifar100", CIFAR, CUTMIX)
    add("dmixup", "PyramidNet-110 + DMixup", 18.60, small, "cifar100", PYRAMIDNET110, k_images("dmixup", 3, 1 / 3))
    add("dcutmix", "PyramidNet-110 + DCutMix", 16.95, small, "cifar100", PYRAMIDNET110, k_images("dcutmix", 5, 0.2))

    add("", "PyramidNet-200", 16.45, deep, "cifar100", CIFAR)
    add("stochdepth", "PyramidNet-200 + StochDepth", 15.86, deep, "cifar100", CIFAR, drop={"stochastic_depth": 0.25})
    smooth = {"label_smoothing": 0.1}
    add("smoothing", "PyramidNet-200 + Label Smoothing", 16.73, deep, "cifar100", CIFAR, recipe=smooth)
    add("cutout", "PyramidNet-200 + Cutout", 16.53, deep, "cifar100", CIFAR, augmentation={"cutout": 16})
    add("dropblock", "PyramidNet-200 + DropBlock", 15.73, deep, "cifar100", CIFAR, drop={"drop_block": 0.1})
    add("mixup", "PyramidNet-200 + Mixup", 15.63, deep, "cifar100", CIFAR, MIXUP)
    add("manifold-mixup", "PyramidNet-200 + Manifold Mixup", 15.09, deep, "cifar100", CIFAR, MANIFOLD_MIXUP)
    add("cutmix", "PyramidNet-200 + CutMix", 14.47, deep, "cifar100", CIFAR, CUTMIX)
    add("dmixup", "PyramidNet-200 + DMixup", 15.07, deep, "cifar100", CIFAR, k_images("dmixup", 3, 1.0))
    add("dcutmix", "PyramidNet-200 + DCutMix", 13.86, deep, "cifar100", CIFAR, k_images("dcutmix", 5, 1.0, 0.5))

    add("", "PyramidNet-200", 3.85, deep, "cifar10", CIFAR)
    add("cutout", "PyramidNet-200 + Cutout", 3.10, deep, "cifar10", CIFAR, augmentation={"cutout": 16})
    add("mixup", "PyramidNet-200 + Mixup", 3.09, deep, "cifar10", CIFAR, MIXUP)
    add("manifold-mixup", "PyramidNet-200 + Manifold Mixup", 3.15, deep, "cifar10", CIFAR, MANIFOLD_MIXUP)
    add("cutmix", "PyramidNet-200 + CutMix", 2.88, deep, "cifar10", CIFAR, CUTMIX)
    add("dmixup", "PyramidNet-200 + DMixup", 2.90, deep, "cifar10", CIFAR, k_images("dmixup", 5, 0.2))
    add("dcutmix", "PyramidNet-200 + DCutMix", 2.42, deep, "cifar10", CIFAR, k_images("dcutmix", 3, 1 / 3))
    return results


def _table2() -> dict[str, PaperResult]:
    """The ratios are training times relative to the baseline's. PuzzleMix and Co-Mixup are not implemented."""
    results = {}
    rows = {
        "preactresnet18": ("PreActResNet18", (23.59, 22.43, 21.29, 21.68, 20.50), (1.0, 1.04, 1.1, 1.14, 1.07), 4),
        "wrn16_8": ("WRN16-8", (21.70, 20.08, 20.55, 19.13, 18.64), (1.0, 1.02, 1.04, 1.02, 1.01), 5),
        "resnext29_4_24": ("ResNeXt29-4-24", (21.79, 21.70, 22.28, 20.09, 20.48), (1.0, 1.02, 1.05, 1.02, 1.02), 5),
    }
    for backbone, (title, errors, ratios, k) in rows.items():
        short = backbone.replace("_", "-")
        methods = {
            "vanilla": NONE,
            "mixup": MIXUP,
            "cutmix": {**CUTMIX, "mix_prob": 1.0},
            "dmixup": k_images("dmixup", 3, 1 / 3),
            "dcutmix": k_images("dcutmix", k, 1 / k),
        }
        for (name, mixing), error, ratio in zip(methods.items(), errors, ratios, strict=True):
            baseline = None if name == "vanilla" else f"table2-{short}-vanilla"
            row = f"{title}, {name}"
            results[f"table2-{short}-{name}"] = _co_mixup("Table 2", row, error, backbone, mixing, baseline, ratio)
    return results


def _co_mixup(table, row, error, backbone, mixing, baseline, ratio=None) -> PaperResult:
    return PaperResult(
        table, row, error, {"backbone": backbone}, {"data": "cifar100"}, CO_MIXUP, mixing, {"crop_padding": 2},
        {"loss": "softmax_bce"}, baseline=baseline, time_ratio=ratio,
    )  # fmt: skip


def _table3() -> dict[str, PaperResult]:
    results = {}

    def add(name, row, error, top5, mixing):
        results["imagenet-resnet50" + (f"-{name}" if name else "")] = PaperResult(
            "Table 3", row, error, {"backbone": "resnet50"}, {"data": "imagenet", "image_size": 224},
            IMAGENET, mixing, IMAGENET_AUGMENTATION, top5=top5, baseline="imagenet-resnet50" if name else None,
        )  # fmt: skip

    add("", "ResNet-50 (Baseline)", 23.68, 7.05, NONE)
    add("mixup", "ResNet-50 + Mixup", 22.58, 6.40, {**MIXUP, "mix_alpha": 0.2})
    add("manifold-mixup", "ResNet-50 + Manifold Mixup", 22.50, 6.21, MANIFOLD_MIXUP)
    add("cutmix", "ResNet-50 + CutMix", 21.40, 5.92, {**CUTMIX, "mix_prob": 1.0})
    add("dmixup", "ResNet-50 + DMixup", 21.88, 6.15, k_images("dmixup", 3, 1 / 3))
    add("dcutmix", "ResNet-50 + DCutMix", 21.76, 5.91, k_images("dcutmix", 3, 1 / 3))
    salient = k_images("saliency_dcutmix", 3, 1 / 3)
    add("saliency-dcutmix", "ResNet-50 + Saliency-DCutMix", 21.38, 5.87, salient)
    sweeps = {
        "dcutmix": {3: (21.62, 5.92), 4: (22.17, 6.23), 5: (22.02, 6.05), 7: (22.39, 6.17), 9: (22.58, 6.34)},
        "saliency_dcutmix": {3: (21.40, 5.87), 4: (21.55, 6.00), 5: (21.70, 5.93), 7: (21.44, 5.93)},
    }
    titles = {"dcutmix": "DCutMix", "saliency_dcutmix": "Saliency-DCutMix"}
    for mix, errors in sweeps.items():
        for k, (top1, top5) in errors.items():
            row = f"ResNet-50 + {titles[mix]}, alpha 1, K {k}"
            add(f"{mix.replace('_', '-')}-k{k}", row, top1, top5, k_images(mix, k, 1.0))
    return results


def _sm_table1() -> dict[str, PaperResult]:
    """DCutMix with K images, PreActResNet18 in Table 2's training."""
    errors = {2: 21.34, 3: 21.01, 4: 20.5, 5: 21.01, 7: 20.9, 9: 20.93}
    results = {}
    for k, error in errors.items():
        mixing = k_images("dcutmix", k, 1 / k if k in (3, 4, 5, 7) else 1.0)
        row = f"PreActResNet18, CutMix of K {k}"
        baseline = "table2-preactresnet18-vanilla"
        results[f"sm-preactresnet18-dcutmix-k{k}"] = _co_mixup(
            "SM Table 1", row, error, "preactresnet18", mixing, baseline
        )
    return results


def _sm_table2() -> dict[str, PaperResult]:
    """Sensitivity to alpha, PyramidNet-200 in Table 1's training."""
    errors = {
        "dmixup": ("DMixup", 3, 1.0, (15.68, 15.35, 15.58, 15.80, 15.07)),
        "dcutmix": ("DCutMix", 5, 0.5, (14.74, 14.18, 13.67, 14.23, 13.86)),
    }
    results = {}
    for mix, (title, k, p, row) in errors.items():
        for alpha, error in zip((0.1, 0.3, 0.5, 0.7, 1.0), row, strict=True):
            results[f"sm-pyramidnet200-{mix}-alpha{alpha:g}"] = PaperResult(
                "SM Table 2", f"PyramidNet-200 + {title}, alpha {alpha:g}", error, {"backbone": "pyramidnet200"},
                {"data": "cifar100"}, CIFAR, k_images(mix, k, alpha, p), baseline="pyramidnet200-cifar100",
            )  # fmt: skip
    return results


PAPER: dict[str, PaperResult] = {**_table1(), **_table2(), **_table3(), **_sm_table1(), **_sm_table2()}
