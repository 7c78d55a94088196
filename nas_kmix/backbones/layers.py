"""What the residual networks share: their initialisation and two regularisers that drop parts of residual paths."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Drop:
    """What is dropped from the residual paths in training; nothing by default.

    Both draw from torch's global generator, as dropout does.
    """

    stochastic_depth: float = 0.0
    """Probability that a batch skips the last residual path; it grows linearly from the first block to this value
    (Huang et al., ECCV 2016)."""
    drop_block: float = 0.0
    """Probability that a value in the maps of the last stage is dropped, in squares (Ghiasi et al., NeurIPS 2018)."""
    block_size: int = 3
    """Side of DropBlock's squares, odd and no larger than the maps of the last stage (8 px, or 4 in PreActResNet18)."""

    def __post_init__(self):
        for name in ("stochastic_depth", "drop_block"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} must be a probability below 1, not {getattr(self, name)}.")
        if self.block_size < 1 or self.block_size % 2 == 0:
            raise ValueError(
                f"block_size is the side of a square around a pixel and must be odd, not {self.block_size}."
            )


NOTHING = Drop()


def add_drops(stages: list[list[nn.Sequential]], drop: Drop) -> None:
    """Append the layers of `drop` to the residual paths of all blocks, given stage by stage."""
    if drop == NOTHING:
        return
    from torchvision.ops import DropBlock2d, StochasticDepth, drop_block2d  # here: seconds to import, rarely needed

    class DropBlock(DropBlock2d):
        def forward(self, x: Tensor) -> Tensor:
            side = min(self.block_size, *x.shape[-2:])  # of small images, the last maps are smaller than a block
            return drop_block2d(x, self.p, side - 1 + side % 2, self.inplace, training=self.training)

    paths = [path for stage in stages for path in stage]
    if drop.drop_block:
        for path in stages[-1]:
            path.append(DropBlock(drop.drop_block, drop.block_size))
    if drop.stochastic_depth:
        for index, path in enumerate(paths, start=1):
            path.append(StochasticDepth(drop.stochastic_depth * index / len(paths), mode="batch"))


def initialise_convolutions(network: nn.Module) -> None:
    """He initialisation by fan-out; BN, linear layers and biases keep torch's defaults."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
