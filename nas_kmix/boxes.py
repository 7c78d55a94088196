"""Sticks and boxes: how much of a mixed image each of its K sources shows, and where.

Shares `phi` become stick lengths `v` (eq. 3), and stick lengths become K - 1 nested boxes (eqs. 4 and 5), the k-th
inside the (k-1)-th; a source shows between two of them. Plans are small and drawn with NumPy on the CPU, the same for
every device. Only what depends on the images (`centred_boxes`) or has a value per pixel (`owner_map`) is torch.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

Size = tuple[int, int]  # height, width in pixels


def draw_phi(n: int, k: int, alpha: float, *, rng: np.random.Generator) -> np.ndarray:
    """Draw `n` rows of `phi ~ Dir(alpha, ..., alpha)` over `k` sources: float64 (N, K), rows sum to one."""
    check_mix(k, alpha)
    return rng.dirichlet(np.full(k, float(alpha)), size=n)


def stick_lengths(phi: np.ndarray) -> np.ndarray:
    """Turn shares into stick lengths, eq. (3): `v_k = phi_k / prod_{j<k} (1 - v_j)`, float64 (N, K-1) in [0, 1].

    The product telescopes to `sum_{j>=k} phi_j`, the rest of the stick. Once nothing is left, the length is one and
    the boxes that follow are empty.
    """
    phi = np.asarray(phi, dtype=np.float64)
    left = phi[:, ::-1].cumsum(axis=1)[:, :0:-1]  # (N, K-1), before source k breaks off its piece
    return np.divide(phi[:, :-1], left, out=np.ones_like(left), where=left > 0.0).clip(max=1.0)


def nested_boxes(v: np.ndarray, size: Size, *, rng: np.random.Generator) -> np.ndarray:
    """Place box k inside box k-1 (box 0 is the image), eqs. (4) and (5): int64 (N, K-1, 4) as y, x, h, w.

    Sides are `round(previous side * sqrt(1 - v_k))`, half to even; the offset is uniform over all legal integer
    positions, both ends included.
    """
    v = np.asarray(v, dtype=np.float64)
    return boxes_from_uniforms(v, size, rng.random((*v.shape, 2)))


def boxes_from_uniforms(v: np.ndarray, size: Size, uniforms: np.ndarray) -> np.ndarray:
    """`nested_boxes` with its randomness given: `uniforms` (N, K-1, 2) in [0, 1) choose the offsets y, x."""
    sides = box_sides(v, size)
    room = sides[:, :-1] - sides[:, 1:]  # (N, K-1, 2), the largest legal offset
    origins = np.floor(uniforms * (room + 1)).astype(np.int64).cumsum(axis=1)
    return np.concatenate([origins, sides[:, 1:]], axis=2)


def centred_boxes(sides: np.ndarray, centers: Tensor) -> Tensor:
    """Nested boxes around given pixels: sides (N, K, 2) of `box_sides`, centers (N, K-1, 2) as y, x, to (N, K-1, 4).

    A box is centred on its pixel and then shifted, never shrunk, just enough to lie inside the previous one. All of it
    stays on the device of `centers`.
    """
    side = torch.as_tensor(sides, device=centers.device)
    room = side[:, :-1] - side[:, 1:]
    wanted = centers - side[:, 1:] // 2
    origins, origin = [], torch.zeros_like(side[:, 0])
    for k in range(room.shape[1]):
        origin = wanted[:, k].clamp(origin, origin + room[:, k])
        origins.append(origin)
    return torch.cat([torch.stack(origins, dim=1), side[:, 1:]], dim=2)


def box_sides(v: np.ndarray, size: Size) -> np.ndarray:
    """Heights and widths of box 0 (the image) to box K-1: int64 (N, K, 2)."""
    sides = np.empty((v.shape[0], v.shape[1] + 1, 2), dtype=np.int64)
    sides[:, 0] = size
    for k, shrink in enumerate(np.sqrt(1.0 - v).T):
        sides[:, k + 1] = np.rint(sides[:, k] * shrink[:, None])
    return sides


def owner_map(boxes: np.ndarray | Tensor, size: Size, *, device: torch.device | str | None = None) -> Tensor:
    """Which source each pixel shows: uint8 (N, H, W), 0 the outermost source and K-1 the innermost.

    As the boxes are nested, the owner of a pixel is the number of boxes that contain it.
    """
    boxes = torch.as_tensor(boxes, device=device)
    y, x, h, w = boxes.unsqueeze(-1).unbind(2)  # (N, K-1, 1) each
    rows = torch.arange(size[0], device=boxes.device)
    columns = torch.arange(size[1], device=boxes.device)
    inside_rows = ((rows >= y) & (rows < y + h)).view(torch.uint8).unsqueeze(3)  # (N, K-1, H, 1)
    inside_columns = ((columns >= x) & (columns < x + w)).view(torch.uint8).unsqueeze(2)  # (N, K-1, 1, W)
    owner = inside_rows[:, 0] & inside_columns[:, 0]
    for k in range(1, boxes.shape[1]):
        owner += inside_rows[:, k] & inside_columns[:, k]
    return owner


def pixel_shares(sides: np.ndarray, size: Size) -> np.ndarray:
    """The exact share of pixels that each source shows: sides h, w (N, K-1, 2) of the boxes to float64 (N, K).

    Rows sum to one; the last source owns the whole innermost box.
    """
    areas = sides.prod(axis=2)  # (N, K-1)
    whole = np.full((len(sides), 1), size[0] * size[1])
    none = np.zeros((len(sides), 1), dtype=np.int64)
    outer, inner = np.concatenate([whole, areas], axis=1), np.concatenate([areas, none], axis=1)
    return (outer - inner) / (size[0] * size[1])


def check_mix(k: int, alpha: float) -> None:
    if not 2 <= k <= 256:  # a byte tells which image a pixel shows
        raise ValueError(f"k is the number of images to mix and must lie in [2, 256], not {k}.")
    if not 0.0 < alpha < float("inf"):
        raise ValueError(f"alpha is the Dirichlet concentration and must be positive and finite, not {alpha}.")
