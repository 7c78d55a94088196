"""What the commands print at their end: the results in a few lines, and the command that goes on from them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from darts_space import CifarNetwork
from nas_kmix.engine import bad_files, files
from nas_kmix.engine.augment import Augmentation
from nas_kmix.engine.data import ImageData
from nas_kmix.engine.named_sets import survives_mirroring
from nas_kmix.engine.program import command
from nas_kmix.engine.progress import duration
from nas_kmix.pipeline import finals, proxy
from nas_kmix.pipeline.config import Config
from nas_kmix.pipeline.verdict import in_words
from nas_kmix.proxy import ProxyConfig
from nas_kmix.scores import COLUMNS, DETERMINED, GOOD, TITLES, ScoreTable, draws_needed, verdict

if TYPE_CHECKING:
    from nas_kmix.commands.search import Result

RETRAINED_WITH = {"quick": "quick", "cpu": "cpu", "gpu": "cifar", "paper": "cifar", "imagenet": "imagenet"}
"""The preset of train_eval.py for the genotype that a preset of search.py finds."""
UNPROVED = [
    "none: without finals nothing was proved. The same command with --finals trains random architectures beside."
]
ORDER = {"mostly noise": "a very different order", "fair": "a similar order", "good": "nearly the same order"}
MARGIN = 13  # columns of the words on the left


def of_images(data: ImageData, count: int, augmentation: Augmentation) -> str:
    """The first line of a run: what it trains on, and how; below it, how a set without splits was divided."""
    mirrored = "mirrored at random" if augmentation.flip else "not mirrored (--flip)"
    line = (
        f"{data.source.name}: {count:,} training images of {data.num_classes} classes, {data.image_size} px, "
        f"{mirrored}, {'resident' if data.resident else 'streamed'} on {data.device}"
    )
    return f"{line}\n{data.source.note}" if data.source.note else line


# -- a search ----------------------------------------------------------------------------------------------------------


def of_search(config: Config, result: Result, argv: Sequence[str]) -> str:
    """What a search found, where it is, how far to trust it, what it cost, and what to do next."""
    folder, rows = result.folder, {}
    if result.genotype is not None:
        rows["genotype"] = str(folder / finals.FILE)
        proof = UNPROVED if result.finals is None else in_words(result.finals)
        rows["verdict"] = f"\n{'':{MARGIN}}".join(proof)
    if result.proxy is not None and config.given.proxy is None:
        rows["proxy"] = f"{folder / proxy.FILE}, {len(result.proxy.indices)} of {result.proxy.n} images"
    if result.table is not None:
        rows["reliability"] = reliability(result.table, config.selection.measure)
    costs = files.read_json(folder / "cost.json")
    parts = [f"{name} {duration(cost['wall_s'])}" for name, cost in costs["stages"].items() if cost["wall_s"] > 0]
    rows["cost"] = f"{duration(costs['total']['wall_s'])} ({', '.join(parts)})"
    if result.genotype is not None:
        rows["next"] = command("train", *_training_flags(config, folder, result.image_size))
    elif result.proxy is not None:
        path = folder / proxy.FILE if config.given.proxy is None else config.given.proxy
        rest = [*rest_of(argv), *_undone(config)]
        rows["next"] = command("search", *rest, "--proxy", str(path), "--out", f"{folder}-search")
    lines = [] if result.genotype is None else [result.genotype.to_text()]
    return "\n".join([*lines, *(f"{name:{MARGIN}}{text}" for name, text in rows.items())])


def reliability(table: ScoreTable, measure: str) -> str:
    """How well the ranking would repeat itself, for someone who has never heard of it."""
    value, draws = table.reliability(measure), table.losses.shape[1]
    if measure in DETERMINED and measure in table.columns:
        return f"1 of 1: this scorer ranks by {TITLES[measure]}, which has no random draws"
    if math.isnan(value):
        few = f"{draws} draws of {len(table.index)} images are too few, or all have the same {measure}"
        other = f"{measure} does not follow from the losses"
        return f"unknown: {few if measure not in COLUMNS else other}"
    name = measure.upper() if measure == "cv" else measure
    word = verdict(value)
    more = "" if value >= GOOD else f"; {draws_needed(value, draws)} for {GOOD}"
    return (
        f"{value:.2f} of 1, {word}: with other random mixes, the images would come in {ORDER[word]}\n"
        f"{'':{MARGIN}}({name} of {draws} losses each, --scoring.draws{more})"
    )


def _training_flags(config: Config, folder: Path, image_size: int) -> list[str]:
    """The flags of the command that trains the network of the genotype on the images that were searched on."""
    from nas_kmix.commands.train import PRESETS

    preset = RETRAINED_WITH[config.preset]
    flags = ["--genotype", str(folder / finals.FILE)]
    for name in ("data", "data_root", "split_seed", "image_size", "max_bad_share"):
        value = getattr(config.input, name)
        if value != getattr(PRESETS[preset].input, name):
            flags += [f"--{name.replace('_', '-')}", str(value)]
    if config.augmentation.flip != survives_mirroring(config.input.data):  # else a training does the same
        flags.append("--flip" if config.augmentation.flip else "--no-flip")
    if image_size < CifarNetwork.smallest_with_head:
        flags.append("--no-auxiliary")
    if (folder / bad_files.FILE).exists():
        flags.append("--skip-bad")
    chosen = ["--preset", preset] if preset != "quick" else []
    return [*chosen, *flags, "--out", f"{folder}-net"]


def _undone(config: Config) -> list[str]:
    """Flags against what a --config would bring back: the end at the proxy, and another start of the chain."""
    if config.invocation.config is None:
        return []
    starts = [name for name in ("scorer", "scores") if getattr(config.given, name) is not None]
    return [word for name in ("stop-after", *starts) for word in (f"--{name}", "None")]


def rest_of(argv: Sequence[str]) -> list[str]:
    """The flags of a command that stopped at its proxy, without those that the search on this proxy does not need."""
    selection = {f"--{field.name.replace('_', '-')}" for field in fields(ProxyConfig)} - {"--seed"}
    unneeded = {"--stop-after", "--export-list", "--out", "--fresh", "--scorer", "--scores", "--proxy", *selection}
    rest, kept = [], True
    for argument in argv:
        if re.match("--?[a-z]", argument):  # else it is a value of the flag before it
            flag = argument.partition("=")[0].replace("_", "-").replace("--no-", "--")  # tyro takes both
            kept = flag not in unneeded and not flag.startswith(("--scorer.", "--scoring."))
        if kept:
            rest.append(argument)
    return rest


# -- a network ---------------------------------------------------------------------------------------------------------


def of_training(result: Mapping[str, Any]) -> str:
    """A small table of what `train_eval.run` returns for a training."""
    lines = [
        f"{'network':{MARGIN}}{result['params_without_aux']:,} parameters, {result['macs']:,} multiply-adds",
        f"{'training':{MARGIN}}{result['epochs']} epochs on {result['train_images']:,} images in "
        f"{duration(result['train_s'])}, {result['images_per_second']:,.0f} images/s",
    ]
    splits = [split for split in ("val", "test") if f"{split}_accuracy" in result["last"]]
    if splits:
        lines.append(f"{'accuracy':{MARGIN}}{'epoch':>5}" + "".join(f"{split:>11}" for split in splits))
    for name in ("last", "best") if splits else ():
        if (found := result[name]) is not None:
            shares = "".join(f"{100 * found[f'{split}_accuracy']:>9.2f} %" for split in splits)
            lines.append(f"  {name:{MARGIN - 2}}{found['epoch'] + 1:>5}{shares}")
    return "\n".join(lines)


def of_evaluation(result: Mapping[str, Any]) -> str:
    """A line per split of what `train_eval.run` returns for --eval-only."""
    lines = []
    for split, images in result["images"].items():
        top5 = f", top-5 {100 * result[f'{split}_accuracy_top5']:.2f} %" if f"{split}_accuracy_top5" in result else ""
        accuracy, loss = result[f"{split}_accuracy"], result[f"{split}_loss"]
        lines.append(f"{split:{MARGIN}}{100 * accuracy:.2f} %{top5}, loss {loss:.3f}, {images:,} images")
    return "\n".join(lines)
