"""How images become the input of a trained network, as its checkpoint holds it.

In:  a PIL image, or uint8 pixels (3, H, W) or (N, 3, H, W), of any size.
Out: float32 (3, S, S) or (N, 3, S, S): resized, the centre cropped, and normalised as in evaluation.

`Preparation.transforms` is the one place of this package that needs torchvision and Pillow, and imports them when it is
called.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

ALPHA_MODES = frozenset({"RGBA", "RGBa", "LA", "La", "PA"})


@dataclass(frozen=True)
class Preparation:
    """The classes that a network tells apart, and the images that it was trained on."""

    class_names: tuple[str, ...]
    """In the order of the logits."""
    image_size: int
    """Side in pixels of the square images that the network takes."""
    resize: int
    """Side in pixels to which the shorter side is resized before the centre is cropped to `image_size`."""
    mean: tuple[float, ...]
    """Per channel, in [0, 1]."""
    std: tuple[float, ...]
    """Per channel, in [0, 1]; positive."""

    def __post_init__(self):
        if not all(isinstance(name, str) for name in self.class_names) or len(set(self.class_names)) < len(
            self.class_names
        ):
            raise ValueError("class_names must be strings, each for one class.")
        if type(self.image_size) is not int or type(self.resize) is not int or not 1 <= self.image_size <= self.resize:
            raise ValueError(
                f"image_size and resize must be whole numbers of pixels, the second at least the first, not "
                f"{self.image_size!r} and {self.resize!r}."
            )
        constants = (*self.mean, *self.std)
        if len(self.mean) != 3 or len(self.std) != 3 or not all(isinstance(c, float) for c in constants):
            raise ValueError("mean and std must have three floats each, one per channel.")
        if not all(map(math.isfinite, constants)) or min(self.std) <= 0:
            raise ValueError(f"mean and std of the images cannot be {self.mean} and {self.std}.")

    @classmethod
    def of_checkpoint(cls, checkpoint: Mapping[str, Any]) -> Preparation | None:
        """What a checkpoint says; None if it lacks a part. Raises ValueError for impossible values."""
        found = {field.name: checkpoint.get(field.name) for field in fields(cls)}
        if any(value is None for value in found.values()):
            return None
        for name in ("class_names", "mean", "std"):
            if not isinstance(found[name], list | tuple):
                raise ValueError(f"{name} must be a list, not {type(found[name]).__name__}.")
            found[name] = tuple(found[name])
        return cls(**found)

    def to_json(self) -> dict[str, Any]:
        """As plain values, which `of_checkpoint` reads."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    def transforms(self) -> Callable[[Any], Tensor]:
        """A torchvision transform from an image to the network's input."""
        from torchvision.transforms import v2

        return v2.Compose(
            [
                _rgb_pixels,
                v2.Resize(self.resize, antialias=True),
                v2.CenterCrop(self.image_size),
                Normalise(self.mean, self.std),
            ]
        )


def _rgb_pixels(image: Any) -> Tensor:
    """A PIL image as uint8 (3, H, W), transparent pixels on white, as in training; a tensor as it is."""
    if not isinstance(image, Tensor):
        from PIL import Image
        from torchvision.transforms.v2 import functional as TF

        if image.mode == "F" or image.mode.startswith("I"):
            raise ValueError(
                f"The transforms take images of 8 bits per channel, not of Pillow's mode {image.mode}; convert them."
            )
        if image.mode in ALPHA_MODES or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = TF.pil_to_tensor(image.convert("RGB"))
    if image.dtype != torch.uint8 or image.dim() not in (3, 4) or image.shape[-3] != 3:
        raise ValueError(
            f"The transforms take PIL images or uint8 pixels (3, H, W), not {image.dtype} {tuple(image.shape)}."
        )
    return image


class Normalise(nn.Module):
    """uint8 pixels (..., 3, H, W) to float32 (x / 255 - mean) / std, bit for bit as in training."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        mean_, std_ = (torch.tensor(constants).view(-1, 1, 1) for constants in (mean, std))
        self.register_buffer("scale", 1.0 / (255.0 * std_))
        self.register_buffer("shift", mean_ / std_)

    def forward(self, pixels: Tensor) -> Tensor:
        return pixels.to(torch.float32) * self.scale - self.shift
