"""K-image mixing: batches of images and labels in, mixed images and soft labels out.

DCutMix (eqs. 1-5 of the paper) breaks a stick of length one into K pieces `phi ~ Dir(alpha, ..., alpha)`
and pastes K - 1 nested boxes, the k-th inside the (k-1)-th, so that source k covers a share `phi_k` of the
pixels. Saliency-DCutMix (SM) centres every box on the most salient pixel of its source. DMixup (eq. 2) is the weighted
sum `sum_k phi_k x_k`.

Drawing and applying are separate: a mixer's `plan` draws (the geometry is in `boxes.py`); `paste` and `blend` apply the
plan in torch, on the images' device. Scoring, pictures and tests share the `MixPlan` in between.

We deviate from the paper's Algorithm 1 in three places, each a mistake there: sources are always the unmixed images (it
shuffles images that are already mixed, whose labels are then wrong), the last source's weight is counted for K = 2 too,
and `v_k ~ Beta(a, (K-k) a)`, as a finite Dirichlet requires, instead of Beta(1, alpha).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from nas_kmix.boxes import (
    Size,
    box_sides,
    centred_boxes,
    check_mix,
    draw_phi,
    nested_boxes,
    owner_map,
    pixel_shares,
    stick_lengths,
)
from nas_kmix.engine.labels import class_indices
from nas_kmix.saliency import SALIENCY, peaks

FEW_SOURCES = 3  # up to this K, pasting bytes by masks is faster than a gather


@dataclass(frozen=True)
class MixPlan:
    """What goes where: everything that is random about a batch of N mixes of K sources.

    partners: int64 (N, K), rows into the sources; column 0 is the outermost source.
    weights: float32 (N, K), label weights that sum to one: pixel shares (DCutMix) or phi (DMixup).
    owner: uint8 (N, H, W), which of the K sources each pixel shows; None for a blend.
    """

    partners: Tensor
    weights: Tensor
    owner: Tensor | None

    def split(self, size: int) -> Iterator[MixPlan]:
        """Plans of at most `size` mixes each, in order."""
        for i in range(0, len(self.partners), size):
            rows = slice(i, i + size)
            yield MixPlan(self.partners[rows], self.weights[rows], None if self.owner is None else self.owner[rows])


def paste(sources: Tensor, plan: MixPlan) -> Tensor:
    """Show source `partners[n, owner[n, y, x]]` at every pixel: (P, C, H, W) to (N, C, H, W).

    The sources may come from anywhere (the batch, a pool); dtype and memory format are kept.
    """
    p, c, h, w = sources.shape
    few = plan.partners.shape[1] <= FEW_SOURCES
    if few and sources.element_size() == 1 and not _is_channels_last(sources):
        return _paste_masked(sources, plan)
    shown = plan.partners.gather(1, plan.owner.flatten(1).long())  # (N, H * W), rows into the sources
    if _is_channels_last(sources):
        # A pixel's channels are contiguous, so fetch whole pixels.
        pixels = shown * (h * w) + torch.arange(h * w, device=sources.device)
        mixed = sources.permute(0, 2, 3, 1).reshape(p * h * w, c).index_select(0, pixels.flatten())
        return mixed.view(-1, h, w, c).permute(0, 3, 1, 2)
    return sources.flatten(2).gather(0, shown[:, None].expand(-1, c, -1)).view(-1, c, h, w)


def _paste_masked(sources: Tensor, plan: MixPlan) -> Tensor:
    """Paste bytes source by source with bit masks: fetching whole images beats single pixels while K is small."""
    mixed = sources.index_select(0, plan.partners[:, 0])
    for k in range(1, plan.partners.shape[1]):
        mask = (
            (plan.owner == k).view(torch.uint8).neg_().view(sources.dtype).unsqueeze(1)
        )  # all bits set where source k shows
        difference = sources.index_select(0, plan.partners[:, k]).bitwise_xor_(mixed)
        mixed.bitwise_xor_(difference.bitwise_and_(mask))
    return mixed


def blend(sources: Tensor, plan: MixPlan) -> Tensor:
    """Weighted sum of the sources, eq. (2): (P, C, H, W) to (N, C, H, W), in the dtype of the sources.

    Summed in float32 at least; integer images are rounded half to even.
    """
    work = torch.promote_types(sources.dtype, torch.float32)
    # One pass over the sources: images are rows of a table, and a mix is a weighted bag of rows. A permuted
    # view keeps channels_last, where a pixel's channels are contiguous.
    last = _is_channels_last(sources)
    table = sources.permute(0, 2, 3, 1) if last else sources
    mixed = F.embedding_bag(
        plan.partners, table.flatten(1).to(work), mode="sum", per_sample_weights=plan.weights.to(work)
    ).view(-1, *table.shape[1:])
    if not sources.is_floating_point():
        mixed = mixed.round_()
    mixed = mixed.to(sources.dtype)
    return mixed.permute(0, 3, 1, 2) if last else mixed


def mix_labels(labels: Tensor, partners: Tensor, weights: Tensor, num_classes: int) -> Tensor:
    """Soft labels of a mix: labels (P,), partners (N, K), weights (N, K) to float32 (N, num_classes).

    Sources of the same class add up.
    """
    labels = torch.as_tensor(labels)
    partners, weights = (torch.as_tensor(values, device=labels.device) for values in (partners, weights))
    if labels.ndim != 1 or labels.is_floating_point():
        raise ValueError(f"labels must be a 1-D tensor of class indices, not {labels.dtype} {tuple(labels.shape)}.")
    _check_range(labels, num_classes)
    # Source by source: each then adds once to a row, so that a GPU sums in a fixed order too.
    soft = torch.zeros(len(partners), num_classes, device=labels.device)
    for label, weight in zip(labels.long()[partners].split(1, dim=1), weights.float().split(1, dim=1), strict=True):
        soft.scatter_add_(1, label, weight)
    return soft


def apply_plan(images: Tensor, labels: Tensor, plan: MixPlan, num_classes: int) -> tuple[Tensor, Tensor]:
    """Mix images (P, C, H, W) and labels (P,) by a plan: images (N, C, H, W) and soft labels (N, num_classes)."""
    mixed = blend(images, plan) if plan.owner is None else paste(images, plan)
    return mixed, mix_labels(labels, plan.partners, plan.weights, num_classes)


@dataclass(kw_only=True, eq=False)
class Mixer:
    """The call that all mixers share; it follows torchvision's contract for CutMix and MixUp.

    A subclass implements `plan`, which draws what goes where, or overrides `mix`.
    """

    num_classes: int
    """Columns of the soft labels."""
    p: float = 1.0
    """Probability that a batch is mixed, drawn once per batch."""
    seed: int = 0
    """Seed of the generator that a call without `rng` uses."""
    _own_rng: np.random.Generator | None = field(default=None, init=False, repr=False)
    _own_worker: int | None = field(default=None, init=False, repr=False)

    def __post_init__(self):
        if not 0.0 <= self.p <= 1.0:
            raise ValueError(f"p is the probability of mixing a batch and must lie in [0, 1], not {self.p}.")
        if self.num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, not {self.num_classes}.")
        if self.seed < 0:
            raise ValueError(f"seed must be 0 or more, not {self.seed}.")

    def __call__(
        self, images: Tensor, labels: Tensor, *, rng: np.random.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mix images (N, C, H, W) with one another: returns (N, C, H, W) and soft labels float32 (N, classes).

        Labels are class indices (N,) or one-hot (N, classes), also arrays and lists. The inputs are not modified.
        Raises ValueError for images or labels of the wrong shape or range.
        """
        labels = self._checked_labels(images, labels)
        rng = self._generator() if rng is None else rng
        if rng.random() >= self.p:
            return images, F.one_hot(labels, self.num_classes).float()
        return self.mix(images, labels, rng)

    def mix(self, images: Tensor, labels: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Mix without the checks and the draw of `p` that the call makes."""
        return apply_plan(images, labels, self.plan(images, rng=rng), self.num_classes)

    def plan(self, images: Tensor, *, rng: np.random.Generator) -> MixPlan:
        """Draw how to mix a batch (N, C, H, W); the plan is on the images' device."""
        raise NotImplementedError

    def _checked_labels(self, images: Tensor, labels: Tensor) -> Tensor:
        if images.ndim != 4 or len(images) == 0:
            raise ValueError(f"images must be (N, C, H, W) with N of at least 1, not {tuple(images.shape)}.")
        found = class_indices(labels, device=images.device)
        if len(found) != len(images) or (np.ndim(labels) == 2 and np.shape(labels)[1] not in (1, self.num_classes)):
            raise ValueError(f"labels must be {len(images)}, one per image, not {tuple(np.shape(labels))}.")
        _check_range(found, self.num_classes)
        return found

    def _generator(self) -> np.random.Generator:
        """This process's own generator: a different one in every DataLoader worker and every epoch.

        Workers are copies of the main process, so a generator made before the fork would repeat itself in every
        worker and every epoch. A worker's seed differs in both and follows torch's global seed.
        """
        worker = torch.utils.data.get_worker_info()
        key = None if worker is None else worker.seed
        if self._own_rng is None or key != self._own_worker:
            self._own_rng = np.random.default_rng(self.seed if key is None else [self.seed, key])
            self._own_worker = key
        return self._own_rng


def permutations(n: int, k: int, rng: np.random.Generator) -> np.ndarray:
    """Partners int64 (N, K): column 0 is the image itself, every other one a permutation of the batch."""
    return np.stack([np.arange(n)] + [rng.permutation(n) for _ in range(k - 1)], axis=1)


@dataclass(kw_only=True, eq=False)
class DCutMix(Mixer):
    """K-image CutMix: nested boxes cut by stick-breaking; label weights are exact pixel shares."""

    k: int
    """Number of sources, at least 2."""
    alpha: float
    """Dirichlet concentration of each source."""

    def __post_init__(self):
        super().__post_init__()
        check_mix(self.k, self.alpha)

    def plan(self, images: Tensor, *, rng: np.random.Generator) -> MixPlan:
        """Draw phi, boxes and partners."""
        n, size = len(images), tuple(images.shape[2:])
        boxes = nested_boxes(stick_lengths(draw_phi(n, self.k, self.alpha, rng=rng)), size, rng=rng)
        return box_plan(permutations(n, self.k, rng), boxes, size, device=images.device)


@dataclass(kw_only=True, eq=False)
class SaliencyDCutMix(Mixer):
    """DCutMix whose boxes are centred on the most salient pixel of the image that they show (SM, "Saliency-DCutMix").

    Boxes keep their sizes from stick-breaking and are shifted no more than nesting requires: a peak outside the
    previous box is missed.
    """

    k: int
    """Number of sources, at least 2."""
    alpha: float
    """Dirichlet concentration of each source."""
    saliency: str = "fine_grained"
    """A key of `nas_kmix.saliency.SALIENCY`."""

    def __post_init__(self):
        super().__post_init__()
        check_mix(self.k, self.alpha)
        if self.saliency not in SALIENCY:
            raise ValueError(f"there is no saliency {self.saliency!r}: choose one of {', '.join(SALIENCY)}.")

    def plan(self, images: Tensor, *, rng: np.random.Generator) -> MixPlan:
        """Draw phi and partners, find the peaks, and place the boxes."""
        n, size = len(images), tuple(images.shape[2:])
        sides = box_sides(stick_lengths(draw_phi(n, self.k, self.alpha, rng=rng)), size)
        partners = torch.as_tensor(permutations(n, self.k, rng), device=images.device)
        centers = peaks(SALIENCY[self.saliency](images))[partners[:, 1:]]  # (N, K-1, 2)
        owner = owner_map(centred_boxes(sides, centers), size, device=images.device)
        return MixPlan(partners, _share_weights(sides[:, 1:], size, images.device), owner)


@dataclass(kw_only=True, eq=False)
class DMixup(Mixer):
    """K-image Mixup: the sum of K images, and of their labels, weighted by phi."""

    k: int
    """Number of sources, at least 2."""
    alpha: float
    """Dirichlet concentration of each source."""

    def __post_init__(self):
        super().__post_init__()
        check_mix(self.k, self.alpha)

    def plan(self, images: Tensor, *, rng: np.random.Generator) -> MixPlan:
        """Draw phi and partners."""
        phi = draw_phi(len(images), self.k, self.alpha, rng=rng)
        partners = torch.as_tensor(permutations(len(images), self.k, rng), device=images.device)
        return MixPlan(partners, torch.as_tensor(phi, dtype=torch.float32, device=images.device), None)


def box_plan(
    partners: np.ndarray, boxes: np.ndarray, size: Size, *, device: torch.device | str | None = None
) -> MixPlan:
    """The plan of a DCutMix whose partners (N, K) and boxes (N, K-1, 4) have been drawn."""
    weights = _share_weights(boxes[..., 2:], size, device)
    return MixPlan(torch.as_tensor(partners, device=device), weights, owner_map(boxes, size, device=device))


def _share_weights(sides: np.ndarray, size: Size, device: torch.device | str | None) -> Tensor:
    return torch.as_tensor(pixel_shares(sides, size), dtype=torch.float32, device=device)


def _check_range(labels: Tensor, num_classes: int) -> None:
    # On a GPU this would be a sync point; there scatter_add itself asserts.
    if labels.device.type == "cpu" and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise ValueError(f"labels must lie in [0, num_classes={num_classes}).")


def _is_channels_last(images: Tensor) -> bool:
    """Whether the layout is channels_last only; with a single channel or pixel it is also the default one."""
    return images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
