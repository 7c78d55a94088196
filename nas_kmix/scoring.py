"""Stage two: every image's losses under mixing, and its EL2N. A classifier and images in, a `ScoreTable` out.

Each image in turn is the *anchor*: with its share fixed at phi_anchor it is the outer ring of a DCutMix, and the rest
of phi, drawn from the conditional Dirichlet distribution, goes to K - 1 partners pasted on it. M draws of phi, boxes
and partners give M losses, against the image's own label or the mixed one (eq. 8); the paper's score is their
coefficient of variation std / mean (SM, "Data Subsampling"). Images are not augmented and the network is in eval mode,
so nothing else varies. One more pass, of the unmixed images, measures their EL2N.

`anchors` draws everything random about the mixes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nas_kmix.anchors import Draws, ScoringConfig, draw, pool_of_streamed
from nas_kmix.baselines import el2n, entropy
from nas_kmix.engine import files
from nas_kmix.engine.compute import Compute
from nas_kmix.engine.data import Batch, ImageData
from nas_kmix.engine.distributed import World
from nas_kmix.engine.keys import identity, stage_key
from nas_kmix.engine.meter import NonFiniteLossError
from nas_kmix.mixing import MixPlan, box_plan, mix_labels, paste
from nas_kmix.scores import ScoreTable

Scores = tuple[np.ndarray, dict[str, np.ndarray]]
"""Losses float32 (N, M) and further columns (N,)."""

IMAGES_PER_SHARD = 512
BYTES_IN_CACHE = 400_000  # of mixed images: 130 at 32 px


@torch.inference_mode()
def score_dataset(
    model: nn.Module,
    data: ImageData,
    config: ScoringConfig,
    *,
    indices: np.ndarray | None = None,
    compute: Compute | None = None,
    world: World | None = None,
    on_shard: Callable[[ScoreTable], None] = lambda shard: None,
) -> ScoreTable:
    """Score the images `indices` of `data` (default: all) with a classifier (N, 3, S, S) to logits (N, classes).

    `on_shard` receives each shard of 512 images as it is done; `ScoreTable.merge` merges shards. The model scores in
    eval mode, and its mode is restored. `compute` sets precision and memory layout (default: float32). The processes of
    `world` divide the shards, and each returns the whole table. Unreadable files are noted in `data.bad` and have no
    row. Raises ValueError for too few images to mix, and NonFiniteLossError.
    """
    key = scoring_key(model, data, config)
    sources = _Sources.of(data, config)
    if len(sources.pool) < config.k:
        raise ValueError(f"Scoring mixes {config.k} different images, but only {len(sources.pool)} can be read.")
    wanted = data.good() if indices is None else np.unique(np.asarray(indices, dtype=np.int64))
    compute, world = compute or Compute(), world or World()
    shards = [wanted[i : i + IMAGES_PER_SHARD] for i in range(0, len(wanted), IMAGES_PER_SHARD)]
    shards += [wanted[:0]] * (-len(shards) % world.size)  # equally many per process, as each shard is exchanged
    shards = shards[world.rank :: world.size]
    was_training = model.training
    model.eval()
    try:
        no_losses, no_columns = _no_scores(config)
        tables = [ScoreTable(wanted[:0], wanted[:0], no_losses, key, data.bad, no_columns)]
        for shard, batch in zip(shards, data.batches(shards), strict=True):
            losses, columns = no_losses, no_columns
            if len(batch.indices):  # else not one file of it can be read
                sources.take_anchors(batch)
                losses, columns = _score_anchors(model, data, sources, batch, config, compute)
            bad = {index: data.bad[index] for index in shard.tolist() if index in data.bad}
            own = ScoreTable(batch.indices, data.labels[batch.indices], losses, key, bad, columns)
            tables.append(ScoreTable.merge(world.gather(own)))  # the same bits as from a single process
            data.bad.add(tables[-1].bad)
            on_shard(tables[-1])
    finally:
        model.train(was_training)
    return ScoreTable.merge(tables)


def redraw(table: ScoreTable, data: ImageData, index: int) -> tuple[Tensor, Tensor]:
    """The M mixes on which image `index` was scored, in the order of its losses.

    Returns uint8 (M, 3, S, S) and soft labels float32 (M, classes). Reads only this image and its partners. Raises
    ValueError if the table does not say how it was made, or one of the images can no longer be read.
    """
    try:
        named = {field.name for field in fields(ScoringConfig)}
        config = ScoringConfig(**{name: value for name, value in table.key["config"].items() if name in named})
        pool = np.asarray(table.key.get("pool", range(len(data))), dtype=np.int64)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"The scores do not say how they were drawn ({error}).") from error
    pool = np.setdiff1d(pool, list(table.bad))
    draws = draw(np.array([index]), pool, (data.image_size,) * 2, config)
    indices = np.concatenate([[index], pool[draws.partners].ravel()])
    batch = data.fetch(indices)
    if len(batch.indices) < len(indices):
        raise ValueError(data.bad.first())
    partners = np.arange(1, len(indices)).reshape(draws.partners.shape)
    anchor = np.zeros((len(partners), 1), dtype=np.int64)
    plan = box_plan(np.hstack([anchor, partners]), draws.boxes, (data.image_size,) * 2, device=data.device)
    return paste(batch.images, plan), mix_labels(batch.labels, plan.partners, plan.weights, data.num_classes)


def _no_scores(config: ScoringConfig) -> Scores:
    """The scores of no image."""
    names = ("el2n", "mixed_entropy") if config.baselines else ("el2n",)
    return np.empty((0, config.draws), dtype=np.float32), {name: np.empty(0) for name in names}


def _score_anchors(
    model: nn.Module, data: ImageData, sources: _Sources, batch: Batch, config: ScoringConfig, compute: Compute
) -> Scores:
    """The scores of the images in `batch`, the current anchors of `sources`. Raises NonFiniteLossError."""
    draws = draw(batch.indices, sources.pool, (data.image_size,) * 2, config)
    parts = [_score_mixes(model, data, sources, part, config, compute) for part in draws.batches(config.batch_size)]
    losses, predicted = (torch.cat(part).unflatten(0, (-1, config.draws)) for part in zip(*parts, strict=True))
    losses = losses.cpu().numpy()
    columns = {"el2n": _el2n(model, data, batch, config, compute)}
    if config.baselines:  # of the mean prediction, eqs. (6) and (7)
        columns["mixed_entropy"] = entropy(predicted.mean(dim=1)).cpu().double().numpy()
    finite = np.isfinite(losses).all(axis=1) & np.isfinite(columns["el2n"])
    if not finite.all():
        remedy = "train another scorer with a lower --scorer.lr" if compute.amp == "off" else "score without --amp"
        raise NonFiniteLossError(
            f"scoring: the scorer's logits of image {batch.indices[~finite][0]}, or of a mix of it, are not finite; "
            f"{remedy}."
        )
    return losses, columns


def _score_mixes(
    model: nn.Module, data: ImageData, sources: _Sources, draws: Draws, config: ScoringConfig, compute: Compute
) -> tuple[Tensor, Tensor]:
    """Losses float32 (R,) of the given mixes, and the predicted probabilities (R, classes), no columns if unwanted."""
    anchors = sources.anchor_rows[draws.anchor]
    partners = np.column_stack([anchors, sources.first_partner + draws.partners])
    plan = box_plan(partners, draws.boxes, tuple(sources.images.shape[-2:]), device=data.device)

    images = _mixed_images(data, sources, plan)
    with compute.autocast():
        logits = model(compute.layout(images))
    log_probabilities = F.log_softmax(logits.float(), dim=1)
    predicted = log_probabilities.exp() if config.baselines else logits[:, :0]
    if config.loss == "anchor":
        return F.nll_loss(log_probabilities, sources.labels[plan.partners[:, 0]], reduction="none"), predicted
    losses = -(plan.weights * log_probabilities.gather(1, sources.labels[plan.partners])).sum(dim=1)
    if config.loss == "minus_entropy":
        soft = mix_labels(sources.labels, plan.partners, plan.weights, data.num_classes)
        losses = losses + torch.special.xlogy(soft, soft).sum(dim=1)
    return losses, predicted


def _el2n(model: nn.Module, data: ImageData, batch: Batch, config: ScoringConfig, compute: Compute) -> np.ndarray:
    """EL2N of the unmixed images of `batch`, float64 (N,)."""
    found = []
    for images, labels in zip(
        batch.images.split(config.batch_size), batch.labels.split(config.batch_size), strict=True
    ):
        with compute.autocast():
            logits = model(compute.layout(data.normalise(images)))
        found.append(el2n(logits.float().softmax(dim=1), labels))
    return torch.cat(found).cpu().double().numpy()


def _mixed_images(data: ImageData, sources: _Sources, plan: MixPlan) -> Tensor:
    """The normalised mixes; on a CPU they are made in parts that stay in its cache."""
    n, shape = len(plan.partners), sources.images.shape[1:]
    at_once = max(1, BYTES_IN_CACHE // shape.numel()) if data.device.type == "cpu" else n
    images = torch.empty(n, *shape, device=data.device)
    for part, out in zip(plan.split(at_once), images.split(at_once), strict=True):
        data.normalise(paste(sources.images, part), out)
    return images


@dataclass
class _Sources:
    """The images that mixes are made of, anchors and partners in one tensor.

    pool: dataset indices (P,) of the possible partners, ascending; images: uint8 (R, 3, S, S) and labels: int64 (R,),
    partner p in row `first_partner + p` and the i-th current anchor in row `anchor_rows[i]`.
    """

    pool: np.ndarray
    images: Tensor
    labels: Tensor
    first_partner: int
    anchor_rows: np.ndarray

    @staticmethod
    def of(data: ImageData, config: ScoringConfig) -> _Sources:
        """All good images of a resident set; of a streamed one, a random pool with room for a shard of anchors."""
        none = np.empty(0, dtype=np.int64)
        if data.images is not None:
            pool = data.good()
            rows = torch.as_tensor(pool, device=data.device)
            images = data.images if len(pool) == len(data) else data.images[rows]
            return _Sources(pool, images, torch.as_tensor(data.labels[pool], device=data.device), 0, none)
        rows = pool_of_streamed(len(data), config)
        room, size = min(IMAGES_PER_SHARD, len(data)), data.image_size
        images = torch.zeros(room + len(rows), 3, size, size, dtype=torch.uint8, device=data.device)
        labels = torch.zeros(room + len(rows), dtype=torch.int64, device=data.device)
        pool, end = [], room
        for batch in data.batches(np.array_split(rows, -(-len(rows) // IMAGES_PER_SHARD))):
            pool.append(batch.indices)
            start, end = end, end + len(batch.indices)
            images[start:end], labels[start:end] = batch.images, batch.labels
        return _Sources(np.concatenate(pool), images[:end], labels[:end], room, none)

    def take_anchors(self, batch: Batch) -> None:
        """Make the images of `batch` the current anchors."""
        n = len(batch.indices)
        if self.first_partner == 0:  # they are in the pool already
            self.anchor_rows = np.searchsorted(self.pool, batch.indices)
            return
        self.anchor_rows = np.arange(n)
        self.images[:n], self.labels[:n] = batch.images, batch.labels


def scorer_hash(model: nn.Module, data: ImageData) -> str:
    """Hash of what scores depend on in the scorer: weights, running statistics, and the images' normalisation."""
    constants = {"mean": torch.tensor(data.mean), "std": torch.tensor(data.std)}
    return files.hash_tensors({**model.state_dict(), **constants})


def scoring_key(model: nn.Module, data: ImageData, config: ScoringConfig) -> dict[str, Any]:
    """What scores depend on: settings, scorer and data, with the pool of a streamed set."""
    settings = {**identity(config), "pool": "all" if data.resident else config.pool_size}
    key = stage_key("scoring", settings, {"data": data.fingerprint, "scorer": scorer_hash(model, data)})
    return key if data.resident else {**key, "pool": pool_of_streamed(len(data), config).tolist()}
