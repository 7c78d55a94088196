"""Section `mixes`: what the scorer, or the trained network, saw: mixed images with their soft labels."""

from __future__ import annotations

import numpy as np
import torch

from nas_kmix.analysis.report.extras import is_run
from nas_kmix.analysis.report.markup import Markup, join, percent, picture, sentence, tag
from nas_kmix.analysis.report.names import spoken
from nas_kmix.analysis.report.parts import UNREADABLE, show
from nas_kmix.analysis.report.record import Record
from nas_kmix.mixers import K_IMAGES, MixConfig, make_mix

SAMPLES, BATCH = 8, 16
SIDE = 128  # pixels at most
LABELS, LEAST = 4, 0.005  # named under a mix, and what share of it is worth a name
SAMPLE_STREAM, MIX_STREAM = 91, 92  # of random numbers, apart from those of the run


def applies(record: Record) -> bool:
    """Whether this run trained on mixed images: not where it mixed none, or features, or trained no scorer."""
    try:
        trained = is_run(record) and (record.trains or record.costs["scorer"].wall_s > 0)
        return trained and record.mixing.mix not in ("none", "manifold_mixup")
    except UNREADABLE:
        return True  # the section says what is wrong


def section(record: Record) -> Markup:
    """Eight newly drawn mixes with this run's settings."""
    return show(record, mixed_images=_mixes)


def _mixes(record: Record) -> Markup:
    settings = record.mixing
    who = "network" if record.trains else "scorer"
    images, soft, names = _draw(record, settings)
    samples = [
        _sample(image.permute(1, 2, 0).numpy(), label.numpy(), names) for image, label in zip(images, soft, strict=True)
    ]
    sources = settings.mix_k if settings.mix in K_IMAGES else 2
    how = (
        f"{settings.mix}, K = {sources}, alpha = {settings.mix_alpha:.3g}, applied to a batch with probability "
        f"{settings.mix_prob:g}: batches like these trained the {who}. The bar is the soft label."
    )
    return join([sentence(how), tag("div", *samples, class_="samples")])


def _draw(record: Record, settings: MixConfig) -> tuple[torch.Tensor, torch.Tensor, tuple[str, ...]]:
    """Mixed images uint8 (8, 3, S, S), their soft labels (8, classes) and the classes' names."""
    data, seed = record.shown_data(), record.seed
    rng = np.random.default_rng([seed, SAMPLE_STREAM])
    batch = data.fetch(rng.choice(len(data), size=min(BATCH, len(data)), replace=False))
    mix = make_mix(settings, data.num_classes, torch.nn.Identity())  # which manifold_mixup alone would look at
    images, soft = batch.images.cpu().float() / 255, None
    for attempt in range(1000):  # a batch that the settings leave unmixed shows nothing
        mixed, soft = mix(images, batch.labels.cpu(), np.random.default_rng([seed, MIX_STREAM, attempt]))
        if mixed is not images:
            break
    return (mixed[:SAMPLES] * 255).round().clamp(0, 255).to(torch.uint8), soft[:SAMPLES], spoken(data)


def _sample(pixels: np.ndarray, soft: np.ndarray, names: tuple[str, ...]) -> Markup:
    order = np.argsort(-soft, kind="stable")[:LABELS]
    parts = [(names[c], float(soft[c])) for c in order.tolist() if soft[c] >= LEAST]
    text = ", ".join(f"{name} {percent(share, 0)}" for name, share in parts)
    bar = tag("div", *(tag("i", style=f"width:{100 * s:.1f}%", class_=f"s{i}") for i, (_, s) in enumerate(parts)))
    lines = [
        tag("span", tag("i", class_=f"s{i}"), tag("em", name), tag("b", percent(share, 0)))
        for i, (name, share) in enumerate(parts)
    ]
    return tag("div", picture(pixels, f"Mix of {text}", side=SIDE, class_="pixels"), bar, *lines, class_="sample")
