"""Stage two: how much an image's loss varies under mixing. A trained classifier and images in, a `ScoreTable` out.

Each image in turn is the *anchor*: with its share fixed at phi_anchor it is the outer ring of a DCutMix, and the rest
of phi, drawn from the conditional Dirichlet distribution, goes to K - 1 partners pasted on it. M draws of phi, boxes
and partners give M losses against the mixed label (eq. 8); their coefficient of variation std / mean is the score (SM,
"Data Subsampling"). Images are not augmented and the network is in eval mode, so nothing else varies.

Every draw is a function of (seed, image index, draw) alone, through Philox with the index as its counter. Scores
therefore do not depend on batch size, order, workers or shards, and more draws extend fewer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from scipy import special
from torch import Tensor, nn
from torch.nn import functional as F

from nas_kmix.boxes import boxes_from_uniforms
from nas_kmix.engine import files
from nas_kmix.engine.compute import Compute
from nas_kmix.engine.data import Batch, ImageData
from nas_kmix.engine.distributed import World
from nas_kmix.engine.keys import stage_key
from nas_kmix.engine.meter import NonFiniteLossError
from nas_kmix.mixing import MixPlan, box_plan, mix_labels, paste
from nas_kmix.scores import ScoreTable

PHI, BOXES, PARTNERS, POOL = 1, 2, 3, 4  # one random stream per quantity
DOUBLES_PER_COUNTER = 4  # a Philox counter yields four 64-bit numbers
IMAGES_PER_SHARD = 512
BYTES_IN_CACHE = 400_000  # of mixed images: 130 at 32 px


@dataclass(frozen=True)
class ScoringConfig:
    """The anchor-mix. Defaults are the paper's (SM, "Data Subsampling") and, where it is silent, neutral choices."""

    draws: int = 10
    """M, mixes per image; at least 2, and 4 or more for a reliability."""
    k: int = 3
    """Images in a mix, the anchor included: the paper has two partners."""
    alpha: float = 2 / 9
    """Concentration of each partner's share of the rest."""
    phi_anchor: float = 0.5
    """The anchor's share, in (0, 1); 0.5 was the paper's best."""
    loss: Literal["mixed", "minus_entropy", "anchor"] = "mixed"
    """Cross-entropy against the mixed label (eq. 8), the same less the label's entropy, or against the anchor's label.
    The label's own entropy is noise in the ranking; without it ten draws agree better between seeds."""
    partners: Literal["fresh", "fixed", "common"] = "fresh"
    """New partners at every draw, the same for all draws of an image, or, with the same phi and boxes too, the same
    for all images at one draw."""
    batch_size: int = 512
    """Mixed images in a forward pass."""
    pool_size: int = 4096
    """Possible partners of a streamed set; a resident set draws from all its images."""
    seed: Annotated[int, tyro.conf.Suppress] = 0
    """Of every draw."""

    def __post_init__(self):
        if self.draws < 2:
            raise ValueError(f"--scoring.draws is {self.draws}; a variation needs two or more.")
        if self.k < 2:
            raise ValueError(f"--scoring.k is {self.k}; a mix needs two images or more.")
        if not 0.0 < self.phi_anchor < 1.0:
            raise ValueError(f"--scoring.phi-anchor must lie strictly between 0 and 1, not {self.phi_anchor}.")
        if not 0.0 < self.alpha < math.inf:
            raise ValueError(f"--scoring.alpha must be positive and finite, not {self.alpha}.")
        if self.pool_size < self.k:
            raise ValueError(f"--scoring.pool-size must be at least --scoring.k, {self.k}, not {self.pool_size}.")
        if self.batch_size < 1:
            raise ValueError(f"--scoring.batch-size must be at least 1, not {self.batch_size}.")


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

    Shards of 512 images are handed to `on_shard` as they are done; `ScoreTable.merge` puts shards together. The model
    is in eval mode meanwhile and as before afterwards. `compute` gives precision and memory layout (default: float32),
    `world` the processes that the shards are dealt out to; each of them ends with the whole table. Files that cannot be
    read are noted in `data.bad` and have no row. Raises ValueError for too few images to mix, and
    NonFiniteLossError.
    """
    key = scoring_key(model, data, config)
    sources = _Sources.of(data, config)
    if len(sources.pool) < config.k:
        raise ValueError(f"Scoring mixes {config.k} different images, but only {len(sources.pool)} can be read.")
    wanted = data.good() if indices is None else np.unique(np.asarray(indices, dtype=np.int64))
    compute, world = compute or Compute(), world or World()
    shards = [wanted[i : i + IMAGES_PER_SHARD] for i in range(0, len(wanted), IMAGES_PER_SHARD)]
    shards += [wanted[:0]] * (-len(shards) % world.size)  # every process has as many, and shares each one it has done
    shards = shards[world.rank :: world.size]
    was_training = model.training
    model.eval()
    try:
        tables = [ScoreTable(wanted[:0], wanted[:0], np.empty((0, config.draws), dtype=np.float32), key, data.bad)]
        for shard, batch in zip(shards, data.batches(shards), strict=True):
            losses = np.empty((0, config.draws), dtype=np.float32)
            if len(batch.indices):  # else not one file of it can be read
                sources.take_anchors(batch)
                draws = _draw(batch.indices, sources.pool, (data.image_size,) * 2, config)
                parts = draws.batches(config.batch_size)
                losses = [_anchor_losses(model, data, sources, part, config, compute) for part in parts]
                losses = torch.cat(losses).view(-1, config.draws).cpu().numpy()
            if not np.isfinite(losses).all():
                bad = batch.indices[~np.isfinite(losses).all(axis=1)][0]
                raise NonFiniteLossError(
                    f"scoring: the loss of image {bad} is not finite, so the scorer has diverged; train it anew with a "
                    f"lower --scorer.lr and --fresh."
                )
            bad = {index: data.bad[index] for index in shard.tolist() if index in data.bad}
            own = ScoreTable(batch.indices, data.labels[batch.indices], losses, key, bad)
            tables.append(_shared(own, world))
            data.bad.update(tables[-1].bad)
            on_shard(tables[-1])
    finally:
        model.train(was_training)
    return ScoreTable.merge(tables)


def redraw(table: ScoreTable, data: ImageData, index: int) -> tuple[Tensor, Tensor]:
    """The M mixes that image `index` was scored by, in the order of its losses.

    Returns uint8 (M, 3, S, S) and soft labels float32 (M, classes). Reads this image and its partners only. Raises
    ValueError for a table that does not say how it was made, and where one of the images cannot be read any more.
    """
    try:
        config = ScoringConfig(**{name: value for name, value in table.key["config"].items() if name != "pool"})
        pool = np.asarray(table.key.get("pool", range(len(data))), dtype=np.int64)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"The scores do not say how they were drawn ({error}).") from error
    pool = np.setdiff1d(pool, list(table.bad))
    draws = _draw(np.array([index]), pool, (data.image_size,) * 2, config)
    indices = np.concatenate([[index], pool[draws.partners].ravel()])
    batch = data.fetch(indices)
    if len(batch.indices) < len(indices):
        raise ValueError(next(iter(data.bad.values())))
    partners = np.arange(1, len(indices)).reshape(draws.partners.shape)
    anchor = np.zeros((len(partners), 1), dtype=np.int64)
    plan = box_plan(np.hstack([anchor, partners]), draws.boxes, (data.image_size,) * 2, device=data.device)
    return paste(batch.images, plan), mix_labels(batch.labels, plan.partners, plan.weights, data.num_classes)


def _shared(own: ScoreTable, world: World) -> ScoreTable:
    """The shards that the processes have just done, as one: the same bits as if a single process had done all."""
    if world.size == 1:
        return own
    indices = [np.frombuffer(payload, dtype=np.int64) for payload in world.gather(own.index.tobytes())]
    labels = [np.frombuffer(payload, dtype=np.int64) for payload in world.gather(own.label.tobytes())]
    draws = own.losses.shape[1]
    losses = [np.frombuffer(p, dtype=np.float32).reshape(-1, draws) for p in world.gather(own.losses.tobytes())]
    bads = [json.loads(payload) for payload in world.gather(json.dumps(own.bad).encode())]
    tables = [
        ScoreTable(index, label, loss, own.key, {int(i): text for i, text in bad.items()})
        for index, label, loss, bad in zip(indices, labels, losses, bads, strict=True)
    ]
    return ScoreTable.merge(tables)


@dataclass(frozen=True)
class _Draws:
    """Everything random about the mixes of some anchors; row i * M + m is draw m of anchor i.

    anchor: (R,) rows into the batch of anchors; partners: (R, K-1) rows into the pool; boxes: (R, K-1, 4).
    """

    anchor: np.ndarray
    partners: np.ndarray
    boxes: np.ndarray

    def batches(self, size: int) -> Iterator[_Draws]:
        for i in range(0, len(self.anchor), size):
            rows = slice(i, i + size)
            yield _Draws(self.anchor[rows], self.partners[rows], self.boxes[rows])


def _anchor_losses(model, data, sources: _Sources, draws: _Draws, config, compute: Compute) -> Tensor:
    """Losses float32 (R,) of the given mixes."""
    anchors = sources.anchor_rows[draws.anchor]
    partners = np.column_stack([anchors, sources.first_partner + draws.partners])
    plan = box_plan(partners, draws.boxes, tuple(sources.images.shape[-2:]), device=data.device)

    images = _mixed_images(data, sources, plan)
    with compute.autocast():
        logits = model(compute.layout(images))
    log_probabilities = F.log_softmax(logits.float(), dim=1)
    if config.loss == "anchor":
        return F.nll_loss(log_probabilities, sources.labels[plan.partners[:, 0]], reduction="none")
    losses = -(plan.weights * log_probabilities.gather(1, sources.labels[plan.partners])).sum(dim=1)
    if config.loss == "minus_entropy":
        soft = mix_labels(sources.labels, plan.partners, plan.weights, data.num_classes)
        losses = losses + torch.special.xlogy(soft, soft).sum(dim=1)
    return losses


def _mixed_images(data: ImageData, sources: _Sources, plan: MixPlan) -> Tensor:
    """The mixes, normalised: on a CPU in parts that stay in its cache between the steps."""
    n, shape = len(plan.partners), sources.images.shape[1:]
    at_once = max(1, BYTES_IN_CACHE // shape.numel()) if data.device.type == "cpu" else n
    images = torch.empty(n, *shape, device=data.device)
    for part, out in zip(plan.split(at_once), images.split(at_once), strict=True):
        data.normalise(paste(sources.images, part), out)
    return images


def _draw(indices: np.ndarray, pool_rows: np.ndarray, size: tuple[int, int], config: ScoringConfig) -> _Draws:
    """All M draws for the images `indices`; `pool_rows` are the dataset indices of the possible partners."""
    n, free = len(indices), config.k - 1
    sticks = np.empty((n, config.draws, free))
    boxes = np.empty((n, config.draws, free, 2))
    partners = np.empty((n, config.draws, free), dtype=np.int64)
    for m in range(config.draws):
        sticks[:, m, 1:] = _uniforms(PHI, m, indices, free - 1, config)
        boxes[:, m] = _uniforms(BOXES, m, indices, 2 * free, config).reshape(n, free, 2)
        draw = 0 if config.partners == "fixed" else m
        partners[:, m] = _draw_partners(_uniforms(PARTNERS, draw, indices, free + 1, config), indices, pool_rows)
    # The anchor takes its share off the stick. Of the rest, a Dirichlet over K - 1 partners breaks off pieces of
    # Beta(a, (K-1-k) a), here by their inverse distribution functions: a number of uniforms known beforehand.
    sticks[:, :, 0] = config.phi_anchor
    for k in range(1, free):
        sticks[:, :, k] = special.betaincinv(config.alpha, (free - k) * config.alpha, sticks[:, :, k])
    sticks = sticks.reshape(-1, free)
    return _Draws(
        np.repeat(np.arange(n), config.draws),
        partners.reshape(-1, free),
        boxes_from_uniforms(sticks, size, boxes.reshape(-1, free, 2)),
    )


def _uniforms(stream: int, draw: int, indices: np.ndarray, count: int, config: ScoringConfig) -> np.ndarray:
    """Uniform numbers (N, count) in [0, 1) that depend on (seed, stream, draw, index) alone; `indices` ascend."""
    if config.partners == "common":
        indices = np.zeros_like(indices)
    counters = -(-count // DOUBLES_PER_COUNTER)
    first, last = (int(indices[0]), int(indices[-1])) if len(indices) else (0, 0)
    philox = np.random.Philox(key=[config.seed, stream], counter=[first * counters, draw, 0, 0])
    block = np.random.Generator(philox).random((last - first + 1, counters * DOUBLES_PER_COUNTER))
    return block[indices - first, :count]


def _draw_partners(uniforms: np.ndarray, indices: np.ndarray, pool_rows: np.ndarray) -> np.ndarray:
    """K - 1 different rows of the pool per anchor, never the anchor's own: uniforms (N, K) to int64 (N, K-1).

    K different rows are drawn, the last as a spare for where the anchor comes up. So, with common uniforms, all other
    anchors meet the same partners.
    """
    rows = np.empty(uniforms.shape, dtype=np.int64)
    for k in range(uniforms.shape[1]):
        free = len(pool_rows) - k
        rows[:, k] = np.minimum((uniforms[:, k] * free).astype(np.int64), free - 1)
        for taken in np.sort(rows[:, :k], axis=1).T:  # step over the rows already taken, in ascending order
            rows[:, k] += rows[:, k] >= taken
    return np.where(pool_rows[rows[:, :-1]] == indices[:, None], rows[:, -1:], rows[:, :-1])


@dataclass
class _Sources:
    """The images that mixes are made of, anchors and partners in one tensor.

    pool: dataset indices (P,) of the possible partners, ascending; images: uint8 (R, 3, S, S) and labels: int64 (R,),
    partner p in row `first_partner + p` and the i-th of the present anchors in row `anchor_rows[i]`.
    """

    pool: np.ndarray
    images: Tensor
    labels: Tensor
    first_partner: int
    anchor_rows: np.ndarray

    @staticmethod
    def of(data: ImageData, config: ScoringConfig) -> _Sources:
        """All good images of a resident set; of a streamed one, a drawn pool with room for a shard of anchors."""
        none = np.empty(0, dtype=np.int64)
        if data.images is not None:
            pool = data.good()
            rows = torch.as_tensor(pool, device=data.device)
            images = data.images if len(pool) == len(data) else data.images[rows]
            return _Sources(pool, images, torch.as_tensor(data.labels[pool], device=data.device), 0, none)
        rows = _pool_of_streamed(len(data), config)
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
        """Make the images of `batch` the present anchors."""
        n = len(batch.indices)
        if self.first_partner == 0:  # they are in the pool already
            self.anchor_rows = np.searchsorted(self.pool, batch.indices)
            return
        self.anchor_rows = np.arange(n)
        self.images[:n], self.labels[:n] = batch.images, batch.labels


def _pool_of_streamed(n: int, config: ScoringConfig) -> np.ndarray:
    rng = np.random.default_rng([config.seed, POOL])
    return np.sort(rng.choice(n, size=min(config.pool_size, n), replace=False))


def scorer_hash(model: nn.Module, data: ImageData) -> str:
    """What scores depend on, of the scorer: its weights and statistics, and the normalisation of its images."""
    constants = {"mean": torch.tensor(data.mean), "std": torch.tensor(data.std)}
    return files.hash_tensors({**model.state_dict(), **constants})


def scoring_key(model: nn.Module, data: ImageData, config: ScoringConfig) -> dict[str, Any]:
    """What scores depend on: settings, scorer and data. The pool of a streamed set is recorded with it."""
    settings = {name: value for name, value in asdict(config).items() if name not in ("batch_size", "pool_size")}
    settings["pool"] = "all" if data.resident else config.pool_size
    key = stage_key("scoring", settings, {"data": data.fingerprint, "scorer": scorer_hash(model, data)})
    return key if data.resident else {**key, "pool": _pool_of_streamed(len(data), config).tolist()}
