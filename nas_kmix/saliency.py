"""Where an image draws the eye: batches of images (N, C, H, W) in, maps float32 (N, H, W) in [0, 1] and peaks out.

Saliency-DCutMix centres its patches on the most salient pixel (SM, "Saliency-DCutMix"). Maps by name, in `SALIENCY`:

`fine_grained` (Montabone & Soto, Image and Vision Computing 2010): how much brighter or darker a pixel is than the mean
of its surround, over OpenCV's six scales; SaliencyMix took this map from OpenCV.
`spectral_residual` (Hou & Zhang, CVPR 2007): how far the log spectrum of an image exceeds its own local average.

Both process whole batches on their device. They give the same map for bytes and fractions, as shifting the brightness
or scaling it by a positive number does not change the map. Normalising the channels by constants of their own weighs
them differently, which moves about one peak in a hundred on CIFAR.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

LUMA = (0.299, 0.587, 0.114)  # red, green, blue (ITU-R BT.601)
REACHES = (12, 24, 48, 28, 56, 112)  # pixels that a surround extends to each side, one per scale
SPECTRAL_SIDE = 64  # pixels; Hou & Zhang reduce images to this side
SPECTRAL_BLUR = 2.5 / 64  # standard deviation as a share of the side, as in the authors' program


@torch.no_grad()
def fine_grained(images: Tensor) -> Tensor:
    """Centre-surround differences over six scales: (N, C, H, W) to float32 (N, H, W), the maximum 1 unless flat.

    A surround is the square around a pixel, without the pixel, clipped at the border. On-centre (brighter) and
    off-centre (darker) differences are summed over the scales separately, and each sum is divided by its maximum.
    """
    grey = _smooth(_grey(images), *(_binomial(side, images.device) for side in images.shape[2:]))
    means = _surround_means(grey)  # (N, S, H, W)
    differences = grey.unsqueeze(1) - means
    on = differences.clamp(min=0.0).sum(dim=1)
    off = on - differences.sum(dim=1)
    return _to_unit(_to_unit(on) + _to_unit(off.clamp_(min=0.0)))


@torch.no_grad()
def spectral_residual(images: Tensor) -> Tensor:
    """Energy of the spectral residual: (N, C, H, W) to float32 (N, H, W), the maximum 1 unless flat.

    Sides above 64 px are reduced to 64 px first, and the map is enlarged again.
    """
    size = images.shape[2:]
    side = tuple(min(length, SPECTRAL_SIDE) for length in size)
    grey = _grey(images)
    if side != tuple(size):
        grey = F.interpolate(grey.unsqueeze(1), side, mode="bilinear", antialias=True).squeeze(1)
    spectrum = torch.fft.fft2(grey)
    spectrum[:, 0, 0] = 0.0
    amplitude = spectrum.abs()
    top = amplitude.amax(dim=(1, 2))
    # A frequency that an image lacks has a logarithm of minus infinity, which would spoil its neighbours' averages. The
    # mean brightness must not matter, so it enters those averages with the largest amplitude of the others.
    log_amplitude = (amplitude + 1e-6 * top[:, None, None]).clamp(min=1e-30).log()
    log_amplitude[:, 0, 0] = top.clamp(min=1e-30).log()
    average = F.avg_pool2d(F.pad(log_amplitude.unsqueeze(1), (1, 1, 1, 1), mode="circular"), 3, stride=1).squeeze(1)
    residual = torch.polar((log_amplitude - average).exp() * (amplitude > 0.0), spectrum.angle())
    energy = torch.fft.ifft2(residual).abs().square()
    maps = _smooth(energy, *(_gaussian(length, images.device) for length in side))
    if side != tuple(size):
        maps = F.interpolate(maps.unsqueeze(1), size, mode="bilinear").squeeze(1)
    return _to_unit(maps)


SALIENCY: dict[str, Callable[[Tensor], Tensor]] = {
    "fine_grained": fine_grained,
    "spectral_residual": spectral_residual,
}


def peaks(maps: Tensor) -> Tensor:
    """The most salient pixel of each map (N, H, W): int64 (N, 2) as y, x; ties go to the first, row by row."""
    width = maps.shape[2]
    at = maps.flatten(1).argmax(dim=1)
    return torch.stack([at.div(width, rounding_mode="floor"), at % width], dim=1)


def _grey(images: Tensor) -> Tensor:
    """Brightness less that of the first pixel, float32 (N, H, W): sums keep their precision, a flat image is zero."""
    images = images.float()
    if images.shape[1] == len(LUMA):
        red, green, blue = images.unbind(1)
        grey = (LUMA[0] * red).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])
    else:
        grey = images.mean(dim=1)
    return grey - grey[:, :1, :1]


def _surround_means(grey: Tensor) -> Tensor:
    """Mean of every pixel's surround at each scale: (N, H, W) to (N, S, H, W).

    The sum over a square is a product with a band of ones from each side: (S, H, H) and (S, W, W).
    """
    rows, columns = (_bands(side, grey.device) for side in grey.shape[1:])
    n, height, width = grey.shape
    with torch.autocast(grey.device.type, enabled=False):
        sums = (rows.flatten(0, 1) @ grey).view(n, len(REACHES), height, width) @ columns
    others = rows.sum(dim=2)[:, :, None] * columns.sum(dim=1)[:, None, :] - 1.0  # (S, H, W)
    return (sums - grey.unsqueeze(1)) / others.clamp(min=1.0)


def _smooth(maps: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Filter maps (N, H, W) by symmetric filters given as matrices (H, H) and (W, W)."""
    with torch.autocast(maps.device.type, enabled=False):
        return rows @ maps @ columns.T


def _to_unit(maps: Tensor) -> Tensor:
    """Divide each non-negative map of (N, H, W) by its maximum; a map of zeros stays."""
    top = maps.amax(dim=(1, 2), keepdim=True)
    return maps / torch.where(top > 0.0, top, 1.0)


@lru_cache(maxsize=16)
def _bands(side: int, device: torch.device) -> Tensor:
    """Which pixels lie within each reach of which: float32 (S, side, side)."""
    at = torch.arange(side, device=device)
    reaches = torch.tensor(REACHES, device=device)
    return ((at[:, None] - at).abs() <= reaches[:, None, None]).float()


@lru_cache(maxsize=16)
def _binomial(side: int, device: torch.device) -> Tensor:
    """Smoothing by 1 4 6 4 1, twice 1 2 1, with the image mirrored at its border: float32 (side, side)."""
    return _filter_matrix(torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]), side).to(device)


@lru_cache(maxsize=16)
def _gaussian(side: int, device: torch.device) -> Tensor:
    """Smoothing by a Gaussian of `SPECTRAL_BLUR`, with the same mirroring: float32 (side, side)."""
    deviation = SPECTRAL_BLUR * side
    reach = math.ceil(3 * deviation)
    offsets = torch.arange(-reach, reach + 1)
    return _filter_matrix(torch.exp(-0.5 * (offsets / deviation) ** 2), side).to(device)


def _filter_matrix(taps: Tensor, side: int) -> Tensor:
    """The matrix (side, side) of a filter with an odd number of taps, normalised, without repeating the border."""
    reach = len(taps) // 2
    period = max(1, 2 * (side - 1))
    at = torch.arange(side)[:, None] + torch.arange(-reach, reach + 1)  # (side, taps)
    mirrored = at.remainder(period)
    mirrored = torch.minimum(mirrored, period - mirrored) if side > 1 else torch.zeros_like(at)
    return torch.zeros(side, side).scatter_add_(1, mirrored, (taps / taps.sum()).expand(side, -1))
