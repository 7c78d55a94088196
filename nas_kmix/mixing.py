"""K-image mixing: batches of images and labels in, mixed images and soft labels out.

DCutMix (eqs. 1-5 of the paper) breaks a stick of length one into K pieces `phi ~ Dir(alpha, ..., alpha)`
and pastes K - 1 nested boxes, the k-th inside the (k-1)-th, so that source k shows in a share `phi_k` of the
pixels. DMixup (eq. 2) is the weighted sum `sum_k phi_k x_k`.

Drawing is apart from applying: `draw_phi`, `stick_lengths` and `nested_boxes` are NumPy on the CPU, where a plan
is small and equal for every device; `owner_map`, `paste` and `blend` are torch where the images are. The
`MixPlan` between them is what scoring, pictures and tests share.

Three deviations from the paper's Algorithm 1, each a mistake there: sources are always the unmixed images (it
shuffles images that are already mixed, whose labels are then wrong), the last source's weight is counted for
K = 2 too, and `v_k ~ Beta(a, (K-k) a)` as a finite Dirichlet demands, not Beta(1, alpha).
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

Size = tuple[int, int]  # height, width in pixels
FEW_SOURCES = 3  # up to here, masks paste faster than a gather
INTEGER_OF_BYTES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


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


def draw_phi(n: int, k: int, alpha: float, *, rng: np.random.Generator) -> np.ndarray:
    """Draw `n` rows of `phi ~ Dir(alpha, ..., alpha)` over `k` sources: float64 (N, K), rows sum to one."""
    _check_mix(k, alpha)
    return rng.dirichlet(np.full(k, float(alpha)), size=n)


def stick_lengths(phi: np.ndarray) -> np.ndarray:
    """Turn shares into stick lengths, eq. (3): `v_k = phi_k / prod_{j<k} (1 - v_j)`, float64 (N, K-1) in [0, 1].

    The product telescopes to `sum_{j>=k} phi_j`, the stick that is left. Once nothing is left the length is one: the
    boxes that follow are empty.
    """
    phi = np.asarray(phi, dtype=np.float64)
    left = phi[:, ::-1].cumsum(axis=1)[:, :0:-1]  # (N, K-1), before source k breaks off its piece
    return np.divide(phi[:, :-1], left, out=np.ones_like(left), where=left > 0.0).clip(max=1.0)


def nested_boxes(
    v: np.ndarray, size: Size, *, rng: np.random.Generator, centers: np.ndarray | None = None
) -> np.ndarray:
    """Place box k inside box k-1 (box 0 is the image), eqs. (4) and (5): int64 (N, K-1, 4) as y, x, h, w.

    Sides are `round(previous side * sqrt(1 - v_k))`, half to even. Without `centers` the offset is uniform over
    all legal integer positions, both ends included. With `centers`, (N, K-1, 2) as y, x, the box is centred
    there and then shifted, never shrunk, by as little as keeps it inside box k-1.
    """
    v = np.asarray(v, dtype=np.float64)
    if centers is None:
        return boxes_from_uniforms(v, size, rng.random((*v.shape, 2)))
    sides = _box_sides(v, size)
    origins = np.zeros_like(sides)
    for k in range(v.shape[1]):
        wanted = np.asarray(centers)[:, k] - sides[:, k + 1] // 2
        origins[:, k + 1] = wanted.clip(origins[:, k], origins[:, k] + sides[:, k] - sides[:, k + 1])
    return np.concatenate([origins, sides], axis=2)[:, 1:]


def boxes_from_uniforms(v: np.ndarray, size: Size, uniforms: np.ndarray) -> np.ndarray:
    """`nested_boxes` with its randomness given: `uniforms` (N, K-1, 2) in [0, 1) choose the offsets y, x."""
    sides = _box_sides(v, size)
    room = sides[:, :-1] - sides[:, 1:]  # (N, K-1, 2), the largest legal offset
    origins = np.floor(uniforms * (room + 1)).astype(np.int64).cumsum(axis=1)
    return np.concatenate([origins, sides[:, 1:]], axis=2)


def _box_sides(v: np.ndarray, size: Size) -> np.ndarray:
    """Heights and widths of box 0 (the image) to box K-1: int64 (N, K, 2)."""
    sides = np.empty((v.shape[0], v.shape[1] + 1, 2), dtype=np.int64)
    sides[:, 0] = size
    for k, shrink in enumerate(np.sqrt(1.0 - v).T):
        sides[:, k + 1] = np.rint(sides[:, k] * shrink[:, None])
    return sides


def owner_map(boxes: np.ndarray, size: Size, *, device: torch.device | str | None = None) -> Tensor:
    """Which source each pixel shows: uint8 (N, H, W), 0 the outermost source and K-1 the innermost.

    As the boxes are nested, the owner of a pixel is the number of boxes that contain it.
    """
    boxes = torch.as_tensor(boxes, device=device)
    y, x, h, w = boxes.unsqueeze(-1).unbind(2)  # (N, K-1, 1) each
    rows = torch.arange(size[0], device=boxes.device)
    columns = torch.arange(size[1], device=boxes.device)
    inside_rows = ((rows >= y) & (rows < y + h)).float()  # (N, K-1, H)
    inside_columns = ((columns >= x) & (columns < x + w)).float()  # (N, K-1, W)
    # A sum over k of outer products is a batched matrix product; small integers are exact in float32.
    return torch.bmm(inside_rows.transpose(1, 2), inside_columns).to(torch.uint8)


def pixel_shares(boxes: np.ndarray, size: Size) -> np.ndarray:
    """The exact share of pixels that each source shows: float64 (N, K), rows sum to one."""
    areas = boxes[..., 2] * boxes[..., 3]  # (N, K-1)
    whole = np.full((len(boxes), 1), size[0] * size[1])
    none = np.zeros((len(boxes), 1), dtype=np.int64)
    outer, inner = np.concatenate([whole, areas], axis=1), np.concatenate([areas, none], axis=1)
    return (outer - inner) / (size[0] * size[1])


def paste(sources: Tensor, plan: MixPlan) -> Tensor:
    """Show source `partners[n, owner[n, y, x]]` at every pixel: (P, C, H, W) to (N, C, H, W).

    The sources may come from anywhere (the batch, a pool); dtype and memory format are kept.
    """
    p, c, h, w = sources.shape
    k = plan.partners.shape[1]
    if k <= FEW_SOURCES and not _is_channels_last(sources):
        return _paste_masked(sources, plan)
    shown = plan.partners.gather(1, plan.owner.flatten(1).long())  # (N, H * W), rows into the sources
    if _is_channels_last(sources):
        # The channels of a pixel lie together, so whole pixels are fetched.
        pixels = shown * (h * w) + torch.arange(h * w, device=sources.device)
        mixed = sources.permute(0, 2, 3, 1).reshape(p * h * w, c).index_select(0, pixels.flatten())
        return mixed.view(-1, h, w, c).permute(0, 3, 1, 2)
    return sources.flatten(2).gather(0, shown[:, None].expand(-1, c, -1)).view(-1, c, h, w)


def _paste_masked(sources: Tensor, plan: MixPlan) -> Tensor:
    """Source by source, by bit masks: whole images are fetched, which is faster than single pixels while K is small."""
    bits = sources.view(INTEGER_OF_BYTES[sources.element_size()])
    mixed = bits.index_select(0, plan.partners[:, 0])
    for k in range(1, plan.partners.shape[1]):
        mask = (plan.owner == k).to(bits.dtype).neg_().unsqueeze(1)  # all bits set where source k shows
        difference = bits.index_select(0, plan.partners[:, k]).bitwise_xor_(mixed)
        mixed.bitwise_xor_(difference.bitwise_and_(mask))
    return mixed.view(sources.dtype)


def blend(sources: Tensor, plan: MixPlan) -> Tensor:
    """Weighted sum of the sources, eq. (2): (P, C, H, W) to (N, C, H, W), in the dtype of the sources.

    Summed in float32 at least; integer images are rounded half to even.
    """
    work = torch.promote_types(sources.dtype, torch.float32)
    weights = plan.weights.to(work)[:, :, None, None, None]
    mixed = weights[:, 0] * sources.index_select(0, plan.partners[:, 0])
    for k in range(1, plan.partners.shape[1]):
        mixed += weights[:, k] * sources.index_select(0, plan.partners[:, k])
    if not sources.is_floating_point():
        mixed = mixed.round_()
    memory_format = torch.channels_last if _is_channels_last(sources) else torch.contiguous_format
    return mixed.to(sources.dtype).contiguous(memory_format=memory_format)


def mix_labels(labels: Tensor, partners: Tensor, weights: Tensor, num_classes: int) -> Tensor:
    """Soft labels of a mix: labels (P,), partners (N, K), weights (N, K) to float32 (N, num_classes).

    Sources of the same class add up.
    """
    labels = torch.as_tensor(labels)
    partners, weights = (torch.as_tensor(values, device=labels.device) for values in (partners, weights))
    if labels.ndim != 1 or labels.is_floating_point():
        raise ValueError(f"labels must be a 1-D tensor of class indices, not {labels.dtype} {tuple(labels.shape)}.")
    _check_range(labels, num_classes)
    # One source after another: within one, no element of a row is met twice, so that a GPU too sums in a fixed order.
    soft = torch.zeros(len(partners), num_classes, device=labels.device)
    for label, weight in zip(labels.long()[partners].split(1, dim=1), weights.float().split(1, dim=1), strict=True):
        soft.scatter_add_(1, label, weight)
    return soft


class _Mixer:
    """The call that DCutMix and DMixup share, after torchvision's contract for CutMix and MixUp.

    k: number of sources; alpha: Dirichlet concentration of each; p: probability that a batch is mixed at all,
    one draw per batch; seed: of the generator used where the call brings none.
    """

    def __init__(self, *, k: int, alpha: float, num_classes: int, p: float = 1.0, seed: int = 0):
        _check_mix(k, alpha)
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"p is the probability of mixing a batch and must lie in [0, 1], not {p}.")
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, not {num_classes}.")
        if seed < 0:
            raise ValueError(f"seed must be 0 or more, not {seed}.")
        self.k, self.alpha, self.num_classes, self.p, self.seed = k, alpha, num_classes, p, seed
        self._own_rng: np.random.Generator | None = None
        self._own_worker: int | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}(k={self.k}, alpha={self.alpha:g}, p={self.p:g})"

    def __call__(
        self, images: Tensor, labels: Tensor, *, rng: np.random.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mix images (N, C, H, W) with one another: returns (N, C, H, W) and soft labels float32 (N, classes).

        The inputs are left as they are. Raises ValueError for images or labels of the wrong shape or range.
        """
        self._check_batch(images, labels)
        rng = self._generator() if rng is None else rng
        if rng.random() >= self.p:
            return images, F.one_hot(labels.long(), self.num_classes).float()
        plan = self.plan(len(images), images.shape[-2:], rng=rng, device=images.device)
        mixed = blend(images, plan) if plan.owner is None else paste(images, plan)
        return mixed, mix_labels(labels, plan.partners, plan.weights, self.num_classes)

    def _check_batch(self, images: Tensor, labels: Tensor) -> None:
        if images.ndim != 4 or len(images) == 0:
            raise ValueError(f"images must be (N, C, H, W) with N of at least 1, not {tuple(images.shape)}.")
        if labels.shape != (len(images),) or labels.is_floating_point():
            raise ValueError(
                f"labels must be {len(images)} class indices, one per image, not {labels.dtype} {tuple(labels.shape)}."
            )
        _check_range(labels, self.num_classes)

    def _generator(self) -> np.random.Generator:
        """This process's own generator: another in every DataLoader worker, and in a worker of every epoch.

        Workers are copies of the main process, so a generator made before the fork would repeat itself in each
        of them and again in the next epoch. A worker's seed differs in both and follows torch's global seed.
        """
        worker = torch.utils.data.get_worker_info()
        key = None if worker is None else worker.seed
        if self._own_rng is None or key != self._own_worker:
            self._own_rng = np.random.default_rng(self.seed if key is None else [self.seed, key])
            self._own_worker = key
        return self._own_rng

    def _partners(self, n: int, rng: np.random.Generator) -> np.ndarray:
        """Column 0 is the image itself, every other one a permutation of the batch."""
        return np.stack([np.arange(n)] + [rng.permutation(n) for _ in range(self.k - 1)], axis=1)


class DCutMix(_Mixer):
    """K-image CutMix: nested boxes cut by stick-breaking; label weights are exact pixel shares."""

    def plan(
        self,
        n: int,
        size: Sequence[int],
        *,
        rng: np.random.Generator,
        device: torch.device | str | None = None,
    ) -> MixPlan:
        """Draw phi, boxes and partners for `n` images of `size` (H, W)."""
        size = (operator.index(size[0]), operator.index(size[1]))
        boxes = nested_boxes(stick_lengths(draw_phi(n, self.k, self.alpha, rng=rng)), size, rng=rng)
        return box_plan(self._partners(n, rng), boxes, size, device=device)


class DMixup(_Mixer):
    """K-image Mixup: a sum of K images weighted by phi, and of their labels likewise."""

    def plan(
        self,
        n: int,
        size: Sequence[int],
        *,
        rng: np.random.Generator,
        device: torch.device | str | None = None,
    ) -> MixPlan:
        """Draw phi and partners for `n` images; `size` is not used, as a blend has no geometry."""
        phi = draw_phi(n, self.k, self.alpha, rng=rng)
        partners = torch.as_tensor(self._partners(n, rng), device=device)
        return MixPlan(partners, torch.as_tensor(phi, dtype=torch.float32, device=device), None)


def box_plan(
    partners: np.ndarray, boxes: np.ndarray, size: Size, *, device: torch.device | str | None = None
) -> MixPlan:
    """The plan of a DCutMix whose partners (N, K) and boxes (N, K-1, 4) have been drawn."""
    shares = torch.as_tensor(pixel_shares(boxes, size), dtype=torch.float32, device=device)
    return MixPlan(torch.as_tensor(partners, device=device), shares, owner_map(boxes, size, device=device))


def _check_range(labels: Tensor, num_classes: int) -> None:
    # On a GPU this would be a sync point; there scatter_add itself asserts.
    if labels.device.type == "cpu" and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise ValueError(f"labels must lie in [0, num_classes={num_classes}).")


def _check_mix(k: int, alpha: float) -> None:
    if k < 2:
        raise ValueError(f"k is the number of images to mix and must be at least 2, not {k}.")
    if not 0.0 < alpha < float("inf"):
        raise ValueError(f"alpha is the Dirichlet concentration and must be positive and finite, not {alpha}.")


def _is_channels_last(images: Tensor) -> bool:
    """Whether the layout is channels_last and not, as with a single channel or pixel, the default one too."""
    return images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
