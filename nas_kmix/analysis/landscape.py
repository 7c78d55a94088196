"""The loss around trained networks: curvature, a surface, a slice and the effect of noise. Checkpoints in, plots out.

    python -m nas_kmix.analysis.landscape runs/plain runs/dcutmix --out runs/landscape
    python -m nas_kmix.analysis.landscape runs/net/best.pt --data cifar100 --images 2000 --points 41

A RUN is the folder of a training (its last.pt) or a checkpoint, also the scorer.pt of a search. The loss is the mean
cross-entropy, in evaluation mode, on a seeded part of the test images. The first and the last of the three views are
those of the paper's Figure 3 and of Figure 1 in its supplement:

- the surface over the two Hessian eigenvectors with the largest eigenvalues, each of unit norm;
- a slice along one random direction, filter by filter as long as the network's weights (Li et al. 2018);
- the mean and standard deviation of the loss over draws of Gaussian noise, added to all parameters (Zhang et al. 2018).

Writes NAME.npz for each RUN, landscape.png and landscape.svg. The same command again resumes after an interruption and
ends in the same files.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from torch import Tensor

from nas_kmix.analysis.classifiers import Classifier
from nas_kmix.analysis.figures import save_figure
from nas_kmix.analysis.landscape_picture import draw_landscapes
from nas_kmix.analysis.objective import (
    LANCZOS_VECTORS,
    Objective,
    cross_entropy_objective,
    filter_normalised_direction,
    top_eigenpairs,
)
from nas_kmix.analysis.runs import InputConfig, load_images, open_runs, subset
from nas_kmix.engine import cli, files
from nas_kmix.engine.cli import Flat, parse_flags
from nas_kmix.engine.compute import DeviceConfig
from nas_kmix.engine.data import ImageData
from nas_kmix.engine.keys import check_key, stage_key
from nas_kmix.engine.run import Run, checkpoint_name, open_run
from nas_kmix.pipeline.stage import obtain

FORMAT = "nas_kmix/landscape"
STAGE = "landscape"
LANCZOS, SLICE, NOISE = 2, 3, 4  # random streams, beside runs.SUBSET


@dataclass(frozen=True)
class Views:
    """What is computed of each network."""

    radius: float = 0.5
    """The surface spans [-radius, radius] along both eigenvectors."""
    points: int = 21
    """Grid points along each side of the surface, odd, so that the network itself is one of them."""
    slice_radius: float = 1.0
    """The slice spans [-slice_radius, slice_radius] times its direction."""
    slice_points: int = 41
    """Points of the slice, odd."""
    sigmas: tuple[float, ...] = (0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05)
    """Standard deviations of the noise."""
    draws: int = 10
    """Draws of the noise, at least 2, the same at each sigma."""
    tolerance: float = 1e-3
    """Relative tolerance of the eigenvalues."""
    seed: int = 0
    """Seed of the choice of images, of the directions and of the noise."""

    def __post_init__(self):
        for name in ("points", "slice_points"):
            if getattr(self, name) < 3 or getattr(self, name) % 2 == 0:
                flag = name.replace("_", "-")
                raise ValueError(
                    f"--{flag} must be odd, so that the network is one of them, and at least 3, not "
                    f"{getattr(self, name)}."
                )
        if not (self.radius > 0.0 and self.slice_radius > 0.0 and self.tolerance > 0.0):
            raise ValueError("--radius, --slice-radius and --tolerance must be positive.")
        if self.draws < 2 or self.seed < 0 or not self.sigmas or not min(self.sigmas) > 0.0:
            raise ValueError("--draws must be at least 2, --seed at least 0, and --sigmas some positive numbers.")

    @property
    def axis(self) -> np.ndarray:
        """(points,)"""
        return np.linspace(-self.radius, self.radius, self.points)

    @property
    def slice_axis(self) -> np.ndarray:
        """(slice_points,)"""
        return np.linspace(-self.slice_radius, self.slice_radius, self.slice_points)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the losses, in the order in which they are computed."""
        return {
            "surface": (self.points, self.points),
            "slice": (self.slice_points,),
            "noise": (self.draws, len(self.sigmas)),
        }


@dataclass(frozen=True)
class Config:
    """Which networks to look at, and how."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders or checkpoints, drawn in one figure."""
    out: Path = Path("runs/landscape")
    """Folder for the results."""
    batch_size: int = 250
    """Images in a forward pass; it bounds the memory, of which Hessian products need most."""
    fresh: bool = False
    """Remove what an earlier command left in --out and start over."""
    input: Annotated[InputConfig, Flat] = field(default_factory=InputConfig)
    views: Annotated[Views, Flat] = field(default_factory=Views)
    device: Annotated[DeviceConfig, Flat] = field(default_factory=DeviceConfig)


def displacements(objective: Objective, eigenvectors: Tensor, views: Views) -> Iterator[Tensor]:
    """Where to evaluate the loss, relative to the network: vectors (P,) in the order of `Views.shapes`."""
    first, second = eigenvectors
    for a, b in itertools.product(views.axis.tolist(), repeat=2):
        yield a * first + b * second
    rng = np.random.default_rng([views.seed, SLICE])
    direction = filter_normalised_direction(objective.unravel(objective.centre), rng=rng)
    for t in views.slice_axis.tolist():
        yield t * direction
    for draw in range(views.draws):
        rng = np.random.default_rng([views.seed, NOISE, draw])
        noise = torch.from_numpy(rng.standard_normal(len(direction), dtype=np.float32)).to(direction)
        for sigma in views.sigmas:
            yield sigma * noise


def compute(objective: Objective, views: Views, *, images: int, name: str, key: Mapping, run: Run) -> dict[str, Any]:
    """Eigenvalues and all losses of one network, resuming from the run's checkpoint `name`.

    Returns `loss`, `eigenvalues` (2,) and one array for each of `Views.shapes`. Raises StoppedError (its state saved),
    StageMismatchError, and ValueError where the eigenvalues do not converge.
    """
    with run.stage(STAGE) as cost:
        with run.resumed(checkpoint_name(name), key) as state:
            losses = [] if state is None else state["losses"]
        if state is None:
            progress = run.progress(f"{name}, eigenvectors, at least", LANCZOS_VECTORS, unit="product")

            def count() -> None:
                cost.images_forward += images
                cost.images_backward += 2 * images
                progress.update()
                run.raise_if_stopping()

            rng = np.random.default_rng([views.seed, LANCZOS])
            values, vectors = top_eigenpairs(objective, rng=rng, tolerance=views.tolerance, on_product=count)
            progress.close()
            state = {"values": torch.from_numpy(values), "vectors": torch.from_numpy(vectors), "losses": losses}
            run.save_checkpoint(checkpoint_name(name), key, state)
        vectors = state["vectors"].to(objective.centre.dtype).to(objective.centre.device)
        total = sum(math.prod(shape) for shape in views.shapes.values())
        progress = run.progress(f"{name}, losses", total, done=len(losses), unit="point")
        for displacement in itertools.islice(displacements(objective, vectors, views), len(losses), None):
            losses.append(objective.value(objective.centre + displacement))
            cost.images_forward += images
            progress.update()
            if run.checkpoint_due() and len(losses) < total:
                run.save_checkpoint(checkpoint_name(name), key, state)
                run.raise_if_stopping()
        progress.close()
    found = {"eigenvalues": state["values"].numpy()}
    start = 0
    for view, shape in views.shapes.items():
        found[view] = np.array(losses[start : start + math.prod(shape)]).reshape(shape)
        start += math.prod(shape)
    found["loss"] = found["surface"][(views.points // 2,) * 2]
    return found


def read_landscape(path: Path) -> dict[str, Any]:
    """The arrays of a finished NAME.npz, and its `meta`. Raises ValueError naming the file.

    `loss` is the network's own; `surface[i, j]` that at `axis[i]` times the first plus `axis[j]` times the second
    eigenvector, `slice[i]` that at `slice_axis[i]`, `noise[m, i]` that of draw m at `sigmas[i]`.
    """
    arrays: dict[str, Any] = files.read_npz(path)
    try:
        arrays["meta"] = json.loads(str(arrays["meta"]))
        if arrays["meta"]["format"] != FORMAT:
            raise KeyError("format")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a landscape of nas_kmix; choose another --out, so that it is kept.") from error
    return arrays


def run(config: Config) -> dict[str, dict[str, Any]]:
    """All networks' landscapes by name, as `read_landscape` gives them; computes and writes those that are missing.

    Raises ValueError (bad input, with the remedy), StageMismatchError, StoppedError, OSError.
    """
    if config.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, not {config.batch_size}.")
    if config.device.amp != "off":
        raise ValueError("Curvature needs the parameters' own precision; leave --amp out.")
    classifiers = open_runs(config.runs)
    found = {}
    results = tuple(f"{name}.npz" for name in classifiers)
    with open_run(config.out, asdict(config), config.device, stages=(STAGE,), results=results) as run:
        device = run.compute.device
        data = load_images(config.input, *classifiers.values(), device=device, workers=config.device.workers)
        indices = subset(data, config.input.images, seed=config.views.seed)
        if config.fresh:
            run.clear()
        run.say(f"{data.source.name}: {len(indices)} of {len(data)} {data.source.split} images on {device}")
        for name, classifier in classifiers.items():
            stage = _Landscape(name, config.batch_size)
            found[name] = obtain(stage, config.views, classifier, classifier.prepare(data), indices, run=run)
        figure = draw_landscapes(found)
        for suffix in (".png", ".svg"):
            save_figure(figure, config.out / f"landscape{suffix}")
    return found


class _Landscape:
    """The landscape of one network, as a stage. `chunk_size` images at once bound its memory."""

    def __init__(self, name: str, chunk_size: int):
        self.NAME, self.FILE, self.chunk_size = name, f"{name}.npz", chunk_size

    def key(self, views: Views, classifier: Classifier, data: ImageData, indices: np.ndarray) -> dict[str, Any]:
        inputs = {"weights": files.hash_tensors(classifier.model.state_dict()), "data": data.fingerprint}
        return stage_key(STAGE, asdict(views), {**inputs, "images": files.hash_arrays(indices)})

    def load(self, path: Path, views: Views, *inputs: Any, run: Run, key: Mapping[str, Any] | None) -> dict[str, Any]:
        found = read_landscape(path)
        check_key(path, found["meta"].get("key"), key)
        return found

    def make(
        self,
        path: Path,
        views: Views,
        classifier: Classifier,
        data: ImageData,
        indices: np.ndarray,
        *,
        run: Run,
        key: Mapping[str, Any],
    ) -> dict[str, Any]:
        model = run.compute.layout(classifier.model.to(run.compute.device))
        objective = cross_entropy_objective(model, data, indices, chunk_size=self.chunk_size)
        found = compute(objective, views, images=len(indices), name=self.NAME, key=key, run=run)
        meta = {"format": FORMAT, "key": key, "network": classifier.network, "images": len(indices)}
        axes = {"axis": views.axis, "slice_axis": views.slice_axis, "sigmas": np.array(views.sigmas)}
        files.write_npz(path, {**found, **axes, "meta": np.array(json.dumps(meta))})
        return read_landscape(path)


def table(landscapes: Mapping[str, Mapping[str, Any]]) -> str:
    """A line per network: its loss, both eigenvalues, the surface's mean rise, the loss under the most noise."""
    columns = "{:24}{:>10}{:>14}{:>14}{:>16}{:>24}"
    lines = [columns.format("network", "loss", "eigenvalue 1", "eigenvalue 2", "surface's rise", "noise")]
    for name, found in landscapes.items():
        noise = found["noise"][:, -1]
        spread = f"{noise.mean():.3f} ± {noise.std(ddof=1):.3f} at {found['sigmas'][-1]:g}"
        rise = f"{found['surface'].mean() - found['loss']:.3f}"
        lines.append(
            columns.format(name, f"{found['loss']:.4f}", *(f"{v:.4g}" for v in found["eigenvalues"]), rise, spread)
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: those of `cli.exit_code`."""

    def work() -> None:
        print(table(run(parse_flags(Config, argv, __doc__))))

    return cli.exit_code(work, lambda error: "Start over with --fresh, or choose another --out.")


if __name__ == "__main__":
    sys.exit(main())
