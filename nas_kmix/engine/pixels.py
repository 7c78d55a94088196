"""Pixels as people have them, as RGB: any mode of a PIL image, or greyscale arrays."""

from __future__ import annotations

import numpy as np
from PIL import Image

ALPHA_MODES = frozenset({"RGBA", "RGBa", "LA", "La", "PA"})


def to_rgb(images: np.ndarray) -> np.ndarray:
    """Greyscale (N, H, W) or (N, H, W, 1) is repeated to three channels."""
    if images.ndim == 3:
        images = images[..., None]
    return np.ascontiguousarray(images if images.shape[3] == 3 else images.repeat(3, axis=3))


def rgb_of(image: Image.Image) -> np.ndarray:
    """uint8 (H, W, 3), read-only. Transparent pixels are laid on white, as browsers show them.

    Pillow alone would bare whatever colour lies beneath, mostly black.
    """
    if image.mode in ALPHA_MODES or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
