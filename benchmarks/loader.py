"""Throughput of the training loader against bare JPEG decoding and torchvision's reference pipeline, in one run.

    python -m benchmarks.loader                      # generated photographs of 500x375 px
    python -m benchmarks.loader --data data/imagenette --workers 2

Three ways to read the same files take turns, and ratios are medians over the rounds:

- bare: Pillow decodes whole photographs to RGB, one after the other in one process, and does nothing else;
- loader: crops are cut, decoded, resized to 224 px and collated, per worker. Flips, colour jitter and lighting follow
  on the training device. That part is counted apart, as seconds per image;
- reference: torchvision's ImageFolder, RandomResizedCrop, RandomHorizontalFlip and ToTensor, as in its own training
  script, with as many workers.

Without workers all run in this process, and its CPU time counts, so that other work on the machine matters less. With
workers it is the time on the wall.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from PIL import Image
from torch.utils.data import DataLoader, Subset
from torchvision import transforms
from torchvision.datasets import ImageFolder

from benchmarks.measure import command_line, report
from nas_kmix.engine.augment import Augmentation, augment_batch
from nas_kmix.engine.data import DataConfig, ImageData, load_data
from nas_kmix.engine.photographs import PhotoCrops

SIZE, BATCH = 224, 32
PLAIN = Augmentation()
JITTER = Augmentation(color_jitter=(0.4, 0.4, 0.4, 0.2), lighting=0.1)


@dataclass(frozen=True)
class Config:
    data: Path | None = None
    """Folder with train/CLASS/*. Default: photographs generated for this run."""
    workers: int = 0
    """Loader processes; 0 decodes in the main process."""
    images: int = 96
    """Images per round."""
    rounds: int = 15
    device: str = "cpu"
    """Device of the flips and colours."""
    profile: bool = False
    """Also print what each step of reading one image takes."""
    json: Path | None = None
    """Also write the figures to this file, as JSON."""


def main(config: Config) -> dict[str, float]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if config.data is None:
            generate(Path(folder), config.images)
        figures = measure(Path(folder) if config.data is None else config.data, config)
    report(figures, config.json, config.device)
    return figures


def measure(folder: Path, config: Config) -> dict[str, float]:
    given = DataConfig(data=str(folder), image_size=SIZE, max_resident_gb=0.0)
    data = load_data(given, workers=config.workers, device=config.device)
    pipeline = [transforms.RandomResizedCrop(SIZE), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    reference = ImageFolder(folder / "train", transforms.Compose(pipeline))
    rng, divisor = np.random.default_rng(0), max(1, config.workers)
    clock = time.process_time if config.workers == 0 else time.perf_counter
    rates = defaultdict(list)
    for epoch in range(config.rounds + 1):
        indices = rng.permutation(len(data))[: config.images]
        n, took = len(indices), {}
        start = clock()
        for index in indices.tolist():
            with Image.open(reference.samples[index][0]) as image:
                image.convert("RGB")
        bare = clock() - start
        for name, augmentation in (("", PLAIN), ("_with_jitter", JITTER)):
            took["loader" + name], took["device" + name] = read(data, indices, augmentation, epoch, clock)
        start = clock()
        for _ in DataLoader(Subset(reference, indices.tolist()), batch_size=BATCH, num_workers=config.workers):
            pass
        took["reference"] = clock() - start
        if epoch > 0:  # the first starts the workers and fills the file cache
            rates["bare_images_per_second"].append(n / bare)
            for name in ("loader", "loader_with_jitter", "reference"):
                rates[f"{name}_images_per_second_and_worker"].append(n / took[name] / divisor)
                rates[f"{name}_over_bare"].append(bare / took[name] / divisor)
            rates["loader_over_reference"].append(took["reference"] / took["loader"])
            for name in ("device", "device_with_jitter"):
                rates[f"{name}_ms_per_image"].append(took[name] / n * 1e3)
    figures = {name: statistics.median(values) for name, values in rates.items()}
    for name in ("loader_over_bare", "loader_over_reference"):
        figures |= {f"{name}_lowest": min(rates[name]), f"{name}_highest": max(rates[name])}
    return figures | (profile(data, config.images) if config.profile else {})


def read(
    data: ImageData, indices: np.ndarray, augmentation: Augmentation, epoch: int, clock: Callable[[], float]
) -> tuple[float, float]:
    """Seconds of reading the images, and of what follows on the device.

    With workers the two would overlap, so only the last batch is augmented, after all have been read.
    """
    plan, crops = np.array_split(indices, max(1, len(indices) // BATCH)), PhotoCrops(SIZE, seed=0)
    start, device = clock(), 0.0
    for batch in data.batches(plan, crops=crops, epoch=epoch, persistent=True):
        if data.workers == 0:
            device += colour(batch.images, data, augmentation, clock)
    reading = clock() - start - device
    if data.workers > 0:
        device = len(plan) * colour(batch.images, data, augmentation, clock)
    return reading, device


def colour(images: torch.Tensor, data: ImageData, augmentation: Augmentation, clock: Callable[[], float]) -> float:
    """Seconds of flips, jitter, lighting and normalisation."""
    start = clock()
    augment_batch(images, data, augmentation, rng=np.random.default_rng(0), cropped=True)
    if images.device.type == "cuda":
        torch.cuda.synchronize(images.device)
    return clock() - start


def profile(data: ImageData, images: int) -> dict[str, float]:
    """Milliseconds per image of each step, in the order in which the loader takes them."""
    crops, spent = PhotoCrops(SIZE, seed=0), defaultdict(float)
    indices = range(min(images, len(data)))
    for index in indices:
        marks = [time.process_time()]
        draws = crops.draw(index, 0)
        marks.append(time.process_time())
        with Image.open(data.source.folder / data.source.paths[index]) as image:
            image.load()
            marks.append(time.process_time())
            part = crops.cut(image, draws)
            marks.append(time.process_time())
            pixels = np.asarray(part)
            marks.append(time.process_time())
        crops.resize(pixels)
        marks.append(time.process_time())
        for name, took in zip(("draw", "decode", "cut", "to_array", "resize"), np.diff(marks), strict=True):
            spent[f"profile_{name}_ms"] += took / len(indices) * 1e3
    return dict(spent)


# -- photographs -------------------------------------------------------------------------------------------------------


def generate(folder: Path, count: int, *, height: int = 375, width: int = 500) -> None:
    """Write JPEG files of about 115 kB, as ImageNet's are, in two classes."""
    rng = np.random.default_rng(0)
    for i in range(count):
        path = folder / "train" / str(i % 2) / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photograph(height, width, rng=rng)).save(path, quality=90)


def photograph(height: int, width: int, *, rng: np.random.Generator) -> np.ndarray:
    """Noise with the 1/f amplitudes of natural images, mostly in brightness, behind discs that give it edges."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1.0
    shape = (4, *frequency.shape)
    waves = np.fft.irfft2((rng.normal(size=shape) + 1j * rng.normal(size=shape)) / frequency, s=(height, width))
    waves /= waves.std(axis=(1, 2), keepdims=True)
    image = waves[:1] + 0.25 * waves[1:]  # (3, H, W)
    y, x = np.mgrid[:height, :width]
    for radius in np.minimum(4.0 * (rng.pareto(2.0, size=60) + 1.0), 80.0):
        inside = np.hypot(y - rng.uniform(0, height), x - rng.uniform(0, width)) < radius
        image = np.where(inside, 0.5 * image + rng.normal() + 0.3 * rng.normal(size=(3, 1, 1)), image)
    return np.clip(118.0 + 55.0 * image, 0.0, 255.0).astype(np.uint8).transpose(1, 2, 0)


if __name__ == "__main__":
    main(tyro.cli(Config, args=command_line(), description=__doc__))
