"""Refusals of a search before anything expensive has run: flags that contradict each other, and late failures."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from darts_space import read_genotype
from darts_space.search_network import INPUT_MULTIPLES, check_shape
from nas_kmix.engine.data import ImageData
from nas_kmix.engine.distributed import World
from nas_kmix.engine.evaluation import EVALUATION_BATCH
from nas_kmix.engine.files import check_place
from nas_kmix.engine.memory import check_fits
from nas_kmix.engine.run import Run
from nas_kmix.engine.workers import check_room
from nas_kmix.manifest import ProxyManifest
from nas_kmix.pipeline import proxy, scorer, scores, search
from nas_kmix.pipeline.config import ALL_IMAGES, PRESETS, Config, Given
from nas_kmix.pipeline.finals import VERDICT_IMAGES
from nas_kmix.pipeline.halves import check_shared_batch
from nas_kmix.pipeline.scorer import Scorer
from nas_kmix.pretrained import is_published
from nas_kmix.proxies import published
from nas_kmix.proxy import smallest_ratio
from nas_kmix.scores import COLUMNS
from nas_kmix.scoring import IMAGES_PER_SHARD


def check_flags(config: Config) -> None:
    """Refuse flags that contradict each other."""
    paths = {flag: path for flag, path in vars(config.given).items() if path is not None}
    order, given = ("scorer", "scores", "proxy"), list(paths)
    if len(given) > 1:
        raise ValueError(f"--{given[0]} and --{given[1]} both start the chain; give only the later one.")
    if config.given.proxy == ALL_IMAGES and (config.stop_after is not None or config.export_list is not None):
        flag = "--stop-after" if config.stop_after is not None else "--export-list"
        raise ValueError(f"--proxy none makes no proxy, so {flag} has no effect; leave one of them out.")
    if given and config.stop_after is not None and order.index(config.stop_after) < order.index(given[0]):
        raise ValueError(f"--{given[0]} starts after --stop-after {config.stop_after}; leave one of them out.")
    if config.selection.method == "random" and given in (["scorer"], ["scores"]):
        raise ValueError(f"--method random uses no scores, so --{given[0]} has no effect; leave one of them out.")
    if config.export_list is not None and config.stop_after in ("scorer", "scores"):
        raise ValueError(f"--export-list needs a proxy, but --stop-after {config.stop_after} ends before there is one.")
    check_place("--export-list", config.export_list)
    selection, stops = config.selection, config.stop_after in ("scorer", "scores")
    selects = selection.method != "random" and not stops and not set(given) & {"scores", "proxy"}
    asked = {"--scoring.baselines": config.scoring.baselines, "--scorer.forgetting": config.scorer.forgetting}
    needed = COLUMNS.get(selection.measure)
    if selects and needed and not asked[needed] and (needed, given) != ("--scorer.forgetting", ["scorer"]):
        raise ValueError(f"--measure {selection.measure} needs {needed}, which measures it.")
    for flag, path in paths.items():
        if is_published(path):
            continue
        names = ("none", *published()) if flag == "proxy" else ()
        if not path.is_file() and str(path) not in names:
            others = f"; published proxies are {', '.join(published())}" if names else ""
            if path.is_dir():
                inside = {"scorer": scorer.FILE, "scores": scores.FILE, "proxy": proxy.FILE}[flag]
                raise ValueError(f"--{flag} {path} is a folder; name a file in it, e.g. {path / inside}.")
            raise ValueError(f"--{flag} {path}: there is no such file{others}.")
        _check_fresh(config, flag, path)
    preset = PRESETS[config.preset].search
    in_steps = config.search.rest_steps is not None and config.search.arch_steps is not None
    for name in ("epochs", "frozen_epochs"):
        if in_steps and getattr(config.search, name) != getattr(preset, name):
            raise ValueError(
                f"--{name.replace('_', '-')} has no effect beside --rest-steps and --arch-steps; change those, or "
                "leave it out."
            )
    if config.candidates and not config.with_finals:
        raise ValueError("--candidates compete in the finals, which are off here; add --finals.")
    for text in config.candidates:
        read_genotype(text)
        if os.path.isfile(text):
            _check_fresh(config, "candidates", Path(text))
    if config.jobs < 1:
        raise ValueError(f"--jobs must be at least 1, not {config.jobs}.")
    if not 0 <= config.seed < 2**63:
        raise ValueError(f"--seed must be at least 0 and below 2**63, not {config.seed}.")


def _check_fresh(config: Config, flag: str, path: Path) -> None:
    if config.fresh and path.parent.resolve() == config.out.resolve():
        raise ValueError(f"--fresh would remove the file of --{flag}; leave one of them out, or choose another --out.")


def without_effect(config: Config) -> Iterator[str]:
    """Sentences on flags that differ from the preset's and that this command does not use.

    Those of stages after --stop-after are kept for the command that goes on.
    """
    preset = PRESETS[config.preset]
    start, path = next(((name, path) for name, path in vars(config.given).items() if path), (None, None))
    because = f"--{start} {path}" if start else f"--method {config.selection.method}"
    scores_anew = config.uses_scores and start != "scores"
    unused = []
    if start == "scorer":
        unused += _changed(config.scorer, preset.scorer, "--scorer.", but={"backbone"})  # that of a state dict
    elif not scores_anew:
        unused += _changed(config.scorer, preset.scorer, "--scorer.")
    if not scores_anew:
        unused += _changed(config.scoring, preset.scoring, "--scoring.")
    if start == "proxy":
        divided = {"arch_share"} if config.given.proxy == ALL_IMAGES else set()
        unused += _changed(config.selection, preset.selection, "--", but=divided)
    if unused:
        yield f"warning: with {because} these flags have no effect: {', '.join(unused)}"
    if not config.with_finals and (of_finals := _changed(config.finals, preset.finals, "--finals.")):
        yield f"warning: without --finals these flags have no effect: {', '.join(of_finals)}"


def _changed(own: Any, preset: Any, prefix: str, but: Collection[str] = ()) -> list[str]:
    """The flags of a stage that differ from the preset's; `but` are fields to leave out.

    So are the fields that `Config.spread` fills in, as in the config.json of an earlier run.
    """
    flags, filled = [], {"seed", "augmentation", "jobs"}
    for name in (field.name for field in fields(own) if field.name not in {*but, *filled}):
        value, usual = getattr(own, name), getattr(preset, name)
        if is_dataclass(value):  # its flags have no prefix of their own
            flags += _changed(value, usual, prefix)
        elif value != usual:
            flags.append(f"{prefix}{name.replace('_', '-')}")
    return flags


def check_later_stages(config: Config, data: ImageData) -> None:
    """Refuse now what a later stage would refuse after the first one has spent hours."""
    scores_anew = config.uses_scores and config.given.scores is None and config.stop_after != "scorer"
    if scores_anew and config.scoring.k > len(data.good()):
        raise ValueError(f"--scoring.k {config.scoring.k} is more than the {len(data.good())} images of --data.")
    if not data.resident:
        batches = [config.scorer.optim.batch_size, EVALUATION_BATCH, IMAGES_PER_SHARD] if config.uses_scores else []
        batches += [2 * config.search.batch_size] if config.stop_after is None else []  # of each half
        check_room(min(max(batches, default=0), len(data)), data.image_size, data.workers, processes=1)
    if config.stop_after is not None:
        return
    _check_halves(config, data)
    search = config.search
    check_shape(search.channels, search.layers, search.partial, data.stem)
    multiple = INPUT_MULTIPLES[data.stem]
    flag, size = (
        ("--image-size", data.image_size) if search.search_size is None else ("--search-size", search.search_size)
    )
    if size % multiple or size < multiple:
        nearest = max(multiple, round(size / multiple) * multiple)
        raise ValueError(
            f"The supernet halves its images several times: the side must be a multiple of {multiple} px, not {size}; "
            f"use {flag} {nearest}."
        )
    if size > data.image_size:
        fitting = data.image_size // multiple * multiple
        remedy = f"--search-size {fitting}" if fitting else f"--image-size {size}"
        raise ValueError(f"--search-size {size} is larger than the images, {data.image_size} px; use {remedy}.")
    search.bilevel(config.device.amp, epoch_steps=1)  # checks its values
    if search.edges_by == "removal" and not search.edge_normalisation:
        raise ValueError("--edges-by removal needs beta to remove an edge; add --edge-normalisation or use alpha.")
    if search.cuda_graphs and (search.unrolled or config.device.amp == "fp16"):
        flag = "--unrolled" if search.unrolled else "--amp fp16"
        raise ValueError(f"--cuda-graphs cannot record the steps of {flag}; add --no-cuda-graphs.")


def check_forgetting(config: Config, trained: Scorer) -> None:
    """Refuse, before anything is scored, to rank by counts that a given scorer does not bring."""
    ranks = config.stop_after not in ("scorer", "scores") and config.selection.method != "random"
    if ranks and config.selection.measure == "forgetting" and trained.forgetting is None:
        raise ValueError(
            f"--measure forgetting: --scorer {config.given.scorer} has no counts of these images, which are made while "
            "it trains; leave it out, and add --scorer.forgetting."
        )


def check_memory(config: Config, data: ImageData, run: Run) -> None:
    """Refuse now a batch of the scorer or of the search that cannot fit into memory."""

    def to_make(stage: ModuleType) -> bool:
        return config.fresh or not run.path(stage.FILE).exists()

    if config.uses_scores and config.given == Given() and to_make(scorer):
        model = scorer.build(config.scorer, data, run.compute)
        size = config.scorer.optim.batch_size
        options = {"flag": "--scorer.batch-size", "world": run.world, "images": len(data)}
        check_fits(model, size, data.image_size, run.compute, **options)
    if config.stop_after is None and to_make(search):
        model = run.compute.layout(config.search.supernet(data).to(run.compute.device))
        side = config.search.search_size or data.image_size
        options = {"flag": "--batch-size", "images": _images_of_a_half(config, data)}
        world = World() if run.world.deals_out(config.search.seeds) else run.world
        check_shared_batch(config.search.batch_size, world.size)
        check_fits(model, config.search.batch_size, side, run.compute, **options, world=world)


def _images_of_a_half(config: Config, data: ImageData) -> int:
    """About how many there are in the larger half of the proxy."""
    selection, given = config.selection, config.given.proxy
    if given is None or is_published(given):
        count = selection.ratio * len(data)
    else:
        count = len(data) if given == ALL_IMAGES else len(ProxyManifest.load(given).indices)
    return int(count * max(selection.arch_share, 1 - selection.arch_share))


def _check_halves(config: Config, data: ImageData) -> None:
    """Refuse where too few images would be left for the architecture or the finals.

    Classes and ratio tell that without any score.
    """
    if config.given.proxy not in (None, ALL_IMAGES):
        return
    selection = config.selection
    counts = np.bincount(data.labels[data.good()])
    least = smallest_ratio(counts, balanced=selection.balanced)
    if least is None:
        raise ValueError(
            f"--data {config.input.data}: no class has two images, so none is left to train the architecture; add some."
        )
    if config.given.proxy is None and selection.ratio < least:
        reuse = ""
        if (config.out / "proxy.json").exists() and not config.fresh:  # it would not fit the other ratio
            scores = config.out / "scores.npz"
            given = f" --scores {scores}" if scores.exists() and config.given == Given() and config.uses_scores else ""
            reuse = f" with --out {config.out}-2{given}"
        raise ValueError(
            f"--ratio {selection.ratio:g} leaves no image to train the architecture, since it takes a single one of a "
            f"class{'' if selection.balanced else ', or may do so'}; use --ratio {least:g} or more{reuse}."
        )
    if config.with_finals and config.given.proxy is None and (np.floor(selection.ratio * counts + 0.5) >= counts).all():
        raise ValueError(
            f"--ratio {selection.ratio:g} takes every image, so none is left for the verdict of the finals; lower it, "
            "or use --no-finals."
        )
    if config.with_finals and config.given.proxy is None and config.finals.images is not None:
        selected = selection.ratio * counts.sum()
        most = int(counts.sum() - selection.arch_share * selected - min(VERDICT_IMAGES, counts.sum() - selected))
        if config.finals.images > most + len(counts):  # classes are rounded
            raise ValueError(
                f"--finals.images {config.finals.images} is more than the {most} or so images that may train: those "
                "that judge, and those of the verdict, may not."
            )
