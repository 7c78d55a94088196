"""What the benchmarks share: a stopwatch that waits for the device, generated images, and how figures are reported."""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from nas_kmix.engine.data import ImageData
from nas_kmix.engine.sources import Source


def seconds(work: Callable[[], object], device: torch.device | str) -> float:
    """Seconds that `work` takes until the device has finished it."""
    device = torch.device(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def in_turn(works: Sequence[Callable[[], object]], times: int, device: torch.device | str) -> list[list[float]]:
    """Seconds of each work, one after the other, `times` times, after one run of each to warm up."""
    rows = [[seconds(work, device) for work in works] for _ in range(1 + times)]
    return rows[1:]


def generated_images(n: int, size: int, classes: int, device: torch.device, *, rng: np.random.Generator) -> ImageData:
    """A resident set of `n` noise images of `size` x `size` pixels with random labels."""
    pixels = rng.integers(0, 256, (n, size, size, 3), dtype=np.uint8)
    names = tuple(map(str, range(classes)))
    source = Source("generated", "train", rng.integers(0, classes, n), names, arrays=pixels)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().to(device)
    return ImageData(source, size, (0.5,) * 3, (0.25,) * 3, device, images)


def report(figures: dict[str, float], json_file: Path | None, device: torch.device | str) -> None:
    """Print the figures and the machine, and write them to `json_file`; `-` prints JSON and nothing else."""
    if json_file != Path("-"):
        for name, value in figures.items():
            print(f"{name:<44}{value:10.4g}")
        print(machine(device))
    if json_file is not None:
        write_json(figures, json_file)


def write_json(figures: dict[str, float], file: Path) -> None:
    """Write the figures to the file, or print them for `-`."""
    text = json.dumps(figures, indent=2)
    if file == Path("-"):
        print(text)
    else:
        file.write_text(f"{text}\n", encoding="utf-8")


def machine(device: torch.device | str) -> str:
    return f"torch {torch.__version__}, {platform.machine()}, {device}, {torch.get_num_threads()} threads"


def command_line() -> list[str]:
    """The arguments of this process, in which a last --json without a file stands for `--json -`."""
    arguments = sys.argv[1:]
    return [*arguments, "-"] if arguments[-1:] == ["--json"] else arguments
