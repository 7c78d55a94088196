"""What a run folder holds, read when a section asks for it.

Whatever is missing, damaged or of another program is a ValueError in a full sentence, which the page shows in the
place of what could not be drawn; a finished run of search.py and one of train_eval.py are read alike.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from darts_space import Genotype, read_genotype
from darts_space.cell import EDGES, PRIMITIVES
from nas_kmix.engine import files
from nas_kmix.engine.data import DataConfig, ImageData, open_data
from nas_kmix.engine.ledger import StageCost
from nas_kmix.manifest import ProxyManifest
from nas_kmix.mixers import MixConfig
from nas_kmix.proxies import locate, published
from nas_kmix.scores import ScoreTable

TABLES = {
    "alphas_normal": (EDGES, len(PRIMITIVES)),
    "betas_normal": (EDGES,),
    "alphas_reduce": (EDGES, len(PRIMITIVES)),
    "betas_reduce": (EDGES,),
}
T = TypeVar("T")


@dataclass(frozen=True)
class HistoryRow:
    """A line of genotypes.jsonl: a genotype and its diagnostics (`darts_space.derivation`).

    `at` counts architecture steps; in the runs of earlier versions, epochs.
    """

    at: int
    genotype: Genotype
    diagnostics: Mapping[str, float]


@dataclass(frozen=True, eq=False)
class Record:
    """A run folder. `given_data` are its images where the caller has them already."""

    folder: Path
    given_data: ImageData | None = None

    @property
    def name(self) -> str:
        return str(self.folder)

    # -- settings ------------------------------------------------------------------------------------------------

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json, all flags of the run."""
        return self._object("config.json")

    @cached_property
    def environment(self) -> dict[str, Any]:
        """env.json: command, packages, machine."""
        return self._object("env.json")

    @property
    def trains(self) -> bool:
        """Whether this is a run of train_eval.py and not of search.py."""
        with suppress(ValueError, KeyError):
            return self.result["kind"] == "train"
        with suppress(ValueError):
            return "network" in self.config
        return self.path("result.json").is_file()  # an earlier version's, which lacks its config.json

    @property
    def input(self) -> DataConfig:
        """The data flags."""
        with self.reading("config.json"):
            return _config_of(DataConfig, self.config["input"])

    @property
    def mixing(self) -> MixConfig:
        """How the images were mixed that the scorer, or the network, was trained on."""
        with self.reading("config.json"):
            if "training" in self.config:  # an older version's, among the flags of the optimiser
                return _config_of(MixConfig, self.config["training"])
            return _config_of(MixConfig, (self.config if self.trains else self.config["scorer"])["mix"])

    @property
    def seed(self) -> int:
        with self.reading("config.json"):
            return int(self.config["seed"])

    # -- results -------------------------------------------------------------------------------------------------

    @cached_property
    def genotype(self) -> Genotype:
        """The genotype that the search found, or that was trained."""
        if not self.trains:
            return Genotype.load(self._found("genotype.json"))
        with self.reading("config.json"):
            if self.config["network"]["genotype"] is None:
                raise ValueError(f"{self.name} trained the backbone {self.config['network']['backbone']}: no cells.")
        with self.reading("result.json"):
            if self.path("result.json").is_file():
                return Genotype.from_json(self.result["network"]["genotype"])
        return read_genotype(self.config["network"]["genotype"])

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """What the genotype of a search was made from: the config and the inputs of the stage."""
        with self.reading("genotype.json"):
            return dict(self._object("genotype.json")["provenance"])

    @cached_property
    def result(self) -> dict[str, Any]:
        """result.json; its `kind` is "search" or "train"."""
        return self._object("result.json")

    @cached_property
    def metrics(self) -> dict[str, dict[str, list[tuple[int, float]]]]:
        """metrics.csv as (epoch, value) by stage and column; (step, value) where a stage counts its steps."""
        path = self._found("metrics.csv")
        stages: dict[str, dict[str, list[tuple[int, float]]]] = {}
        with self.reading("metrics.csv"):
            for row in csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))):
                stage, epoch = stages.setdefault(row.pop("stage"), {}), int(row.pop("epoch"))
                at = int(row.get("step") or epoch)
                for column, value in row.items():
                    if value:
                        stage.setdefault(column, []).append((at, float(value)))
        return stages

    @cached_property
    def costs(self) -> dict[str, StageCost]:
        """cost.json by stage."""
        with self.reading("cost.json"):
            return {name: StageCost(**cost) for name, cost in self._object("cost.json")["stages"].items()}

    @cached_property
    def history(self) -> list[HistoryRow]:
        """genotypes.jsonl, at least one line; of several seeds, the chosen one's."""
        path = self._found(f"{self._seed}genotypes.jsonl")
        with self.reading(path.name):
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            if not rows:
                raise ValueError("it is empty")
            return [
                HistoryRow(
                    int(row.pop("arch_step") if "arch_step" in row else row.pop("epoch")),
                    Genotype.from_json(row.pop("genotype")),
                    {name: float(value) for name, value in row.items()},
                )
                for row in rows
            ]

    @cached_property
    def unit(self) -> str:
        """What `history` counts."""
        return "architecture step" if "step" in self.history[0].diagnostics else "epoch"

    @cached_property
    def tables(self) -> dict[str, np.ndarray]:
        """alphas.npz: alphas (lines of `history`, 14, 8) and betas (lines, 14) of both cells, raw."""
        path = self._found(f"{self._seed}alphas.npz")
        arrays = files.read_npz(path)
        with self.reading(path.name):
            for name, shape in TABLES.items():
                if arrays[name].shape[1:] != shape or len(arrays[name]) == 0 or not np.isfinite(arrays[name]).all():
                    raise ValueError(f"{name} is not a finite table of {shape} for every record")
            if len({len(arrays[name]) for name in TABLES}) > 1:
                raise ValueError("its tables are of different lengths")
        return arrays

    @cached_property
    def scores(self) -> ScoreTable:
        if (proxy := self._given("proxy")) is not None:
            raise ValueError(f"{self.name} was given --proxy {proxy}, so there are no scores to show.")
        return ScoreTable.load(self._found("scores.npz", given="scores"))

    @cached_property
    def proxy(self) -> ProxyManifest:
        if self.flag("proxy") == "none":
            raise ValueError(f"{self.name} searched on all images (--proxy none), so there is no proxy to show.")
        return ProxyManifest.load(self._found("proxy.json", given="proxy"))

    def selected(self, index: int) -> bool:
        """Whether the image is in the proxy; False without a proxy."""
        try:
            return bool(np.isin(index, self.proxy.indices))
        except ValueError:
            return False

    # -- images --------------------------------------------------------------------------------------------------

    @cached_property
    def data(self) -> ImageData:
        """The training images of the run's data flags; read one by one, so only what is shown is decoded."""
        if self.given_data is not None:
            return self.given_data
        settings = self.input
        try:
            return open_data(settings)
        except (ValueError, OSError) as error:
            raise ValueError(f"The images of {self.name} cannot be shown: {error}") from error

    def shown_data(self) -> ImageData:
        """`data` without DataLoader workers: a few images are read sooner than they start."""
        return replace(self.data, workers=0)

    def data_with(self, fingerprint: Any) -> ImageData:
        """`shown_data`. Raises ValueError if its fingerprint is another."""
        if self.data.fingerprint != fingerprint:
            raise ValueError(
                f"The images of {self.name} cannot be shown: {self.data.source.name} has changed since the scoring."
            )
        return self.shown_data()

    # -- files ---------------------------------------------------------------------------------------------------

    def path(self, name: str) -> Path:
        return self.folder / name

    @cached_property
    def _seed(self) -> str:
        """Subfolder of the chosen search, where there were several."""
        if not self.path("genotype.json").is_file() or "chosen" not in self.provenance:
            return ""
        if not re.fullmatch(r"seed-\d+", str(self.provenance["chosen"])):
            raise ValueError(f"{self.path('genotype.json')} names {self.provenance['chosen']!r} as the chosen search.")
        return f"{self.provenance['chosen']}/"

    def _found(self, name: str, *, given: str | None = None) -> Path:
        """The path of a file, here or, if the flag `given` said where, there: one that lies here is an older run's."""
        elsewhere = None if given is None else self._given(given)
        path = self.path(name) if elsewhere is None else elsewhere
        if not path.is_file():
            raise ValueError(
                f"There is no {name} in {self.name}."
                if elsewhere is None
                else f"There is no {path} (any more, or here)."
            )
        return path

    def flag(self, name: str) -> str | None:
        """A path among the flags of a search; None if it was not given or is not recorded."""
        try:
            given = self.config.get("given")
        except ValueError:
            return None
        value = (given if isinstance(given, dict) and name in given else self.config).get(name)  # or an older run's
        return value if isinstance(value, str) else None

    @property
    def given_scorer(self) -> str | None:
        """What a search was given as --scorer."""
        return self.flag("scorer")

    def _given(self, name: str) -> Path | None:
        """The path, unless it lies in the run's own folder, under its name of then or now."""
        value = self.flag(name)
        if value in published():
            return locate(value)
        if value is None or Path(value).parent == Path(self.flag("out") or ""):
            return None
        return None if Path(value).resolve().parent == self.folder.resolve() else Path(value)

    def _object(self, name: str) -> dict[str, Any]:
        value = files.read_json(self._found(name))
        if not isinstance(value, dict):
            raise ValueError(f"{self.path(name)} is not a JSON object.")
        return value

    @contextmanager
    def reading(self, name: str) -> Iterator[None]:
        """Turn whatever a file with unexpected content raises into a ValueError that names it."""
        try:
            yield
        except (KeyError, TypeError, AttributeError, IndexError, ValueError, OSError) as error:
            if isinstance(error, ValueError) and self.name in str(error):
                raise  # a sentence already
            cause = f"it lacks {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
            raise ValueError(f"{self.path(name)} cannot be used: {cause.rstrip('.')}.") from error


def _config_of(kind: type[T], flags: Mapping[str, Any]) -> T:
    """Recorded flags as the config class they came from; fields that are not its own are left aside."""
    known = {field.name for field in fields(kind)}
    return kind(**{name: value for name, value in flags.items() if name in known})
