"""Stage five: train the candidates as networks of their own. Candidates in, `genotype.json` and `result.json` out.

Searched and given candidates go through successive halving (`halving`); the entry and the random controls are trained
through every rung. Candidates train on the proxy's half for the weights and are judged on its half for the
architecture. The verdict (`verdict`) rests on training images that neither search nor finals have used.

Every turn, a candidate's rung, is trained in a child process of one thread (`trial`). Under torchrun the turns are
dealt out to the children of all ranks, each on its rank's device (`engine.crew`); every rank follows, and rank 0
writes. The result does not depend on the number of ranks or children. A resume goes on after the turns that had ended.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from darts_space import Genotype
from nas_kmix.engine import files
from nas_kmix.engine.children import Children
from nas_kmix.engine.crew import Crew
from nas_kmix.engine.data import ImageData
from nas_kmix.engine.keys import check_key, stage_key
from nas_kmix.engine.keys import identity as identity_of
from nas_kmix.engine.run import Run, checkpoint_name
from nas_kmix.pipeline import candidates
from nas_kmix.pipeline.candidates import Candidate, Entrants, Shape
from nas_kmix.pipeline.halving import Halving, Turn
from nas_kmix.pipeline.stage import Key
from nas_kmix.pipeline.trial import DIVERGED, FinalsConfig, Outcome, Roles, State, Task, Trainer
from nas_kmix.pipeline.verdict import in_words, judge, standard_error
from nas_kmix.sampling import split_by_class

NAME = "finals"
FILE = "genotype.json"
TABLE, RESULT = "finals.jsonl", "result.json"
FILES = (candidates.FILE, TABLE, RESULT)
VERDICT_IMAGES = 2500
VERDICT, TRAIN = 0, 1  # added to the seed, so that the two draws differ


class Finals(NamedTuple):
    """The winner, and the content of `result.json`."""

    genotype: Genotype
    result: dict[str, Any]


# -- images ------------------------------------------------------------------------------------------------------------


def divide(data: ImageData, weights: np.ndarray, arch: np.ndarray, config: FinalsConfig) -> Roles:
    """Which images train, judge and give the verdict, from the halves of the search. Raises ValueError if too few."""
    # Of files that are read as they are needed, more may turn out bad while the finals wait to be resumed.
    usable = data.good() if data.resident else np.arange(len(data))
    outside = np.setdiff1d(usable, np.concatenate([weights, arch]))
    verdict = _drawn(data, outside, VERDICT_IMAGES, seed=config.seed + VERDICT)
    if len(verdict) == 0:
        raise ValueError(
            "The search uses every training image, so none is left for the verdict of the finals: lower --ratio, or "
            "use --no-finals."
        )
    if config.images is None:
        return Roles(weights, arch, verdict)
    free = np.setdiff1d(usable, np.concatenate([arch, verdict]))
    if config.images > len(free):
        raise ValueError(f"--finals.images {config.images} is more than the {len(free)} images that may train.")
    return Roles(_drawn(data, free, config.images, seed=config.seed + TRAIN), arch, verdict)


def _drawn(data: ImageData, indices: np.ndarray, count: int, *, seed: int) -> np.ndarray:
    """About `count` of the images, class by class; all if there are no more."""
    if count >= len(indices):
        return indices
    return split_by_class(indices, data.labels[indices], count / len(indices), seed=seed)[1]


def entrants(
    searched: Sequence[Candidate],
    provenance: Mapping[str, Any],
    given: Mapping[str, Genotype],
    config: FinalsConfig,
    data: ImageData,
) -> Entrants:
    """What competes: the searched genotypes, those that the user gave, by their texts, and random controls."""
    shape = Shape.of(data, config.layers)
    options = {"controls": config.controls, "shape": shape, "channels": config.channels, "seed": config.seed}
    found = candidates.with_controls(searched, given, **options)
    return Entrants.of(found, shape, config.channels, provenance)


def halving_of(entrants: Entrants, rungs: int) -> Halving:
    """Nothing recorded so far; the controls stand beside."""
    controls = [i for i, one in enumerate(entrants.candidates) if one.origin == "random"]
    contenders = [i for i, one in enumerate(entrants.candidates) if one.origin != "random"]
    return Halving(contenders, controls, rungs)


# -- the stage ---------------------------------------------------------------------------------------------------------


def key(config: FinalsConfig, entrants: Entrants, roles: Roles, data: ImageData) -> Key:
    images = {name: files.hash_arrays(getattr(roles, name)) for name in ("train", "judge", "verdict")}
    inputs = {"data": data.fingerprint, "candidates": candidates.identity(entrants.candidates), **images}
    return stage_key(NAME, identity_of(config), inputs)


def load(
    path: Path, config: FinalsConfig, entrants: Entrants, roles: Roles, data: ImageData, *, run: Run, key: Key | None
) -> Finals | None:
    """The winner in `path`; None if it is a search's own genotype, written with --no-finals."""
    genotype, provenance = Genotype.load(path), files.read_json(path).get("provenance")
    if isinstance(provenance, Mapping) and provenance.get("stage") == "search":
        return None
    check_key(path, provenance, key)
    if not path.with_name(RESULT).exists():
        raise ValueError(f"{path.with_name(RESULT)} is gone; remove {path} to repeat the finals and get both.")
    with files.damage_named(path.with_name(RESULT), f"remove {path} to repeat the finals and get both"):
        result = files.read_json(path.with_name(RESULT))
        in_words(result)  # raises if it lacks something
    return Finals(genotype, result)


def make(
    path: Path, config: FinalsConfig, entrants: Entrants, roles: Roles, data: ImageData, *, run: Run, key: Key
) -> Finals:
    """Train all turns that a checkpoint does not hold, and write the files, `genotype.json` last."""
    if entrants.far_controls:
        run.say(
            f"warning: {entrants.far_controls} of the {config.controls} random controls cost over "
            f"{candidates.NEAR:.0%} more or less than the search's genotypes, as hardly any random one costs as much"
        )
    if run.world.main:
        candidates.save(run.path(candidates.FILE), entrants.candidates, entrants.provenance)
    turns = _Turns(entrants, halving_of(entrants, config.rungs), key, run)
    with run.resumed(checkpoint_name(NAME), key) as state:
        if state is not None:
            turns.load_state_dict(state)
    _train(turns, Trainer.of(data, roles, config, run.compute), run)
    number, winner = turns.halving.winner, entrants.candidates[turns.halving.winner]
    result = result_of(turns, len(roles.verdict))
    accuracy = turns.halving.accuracies[number, config.rungs - 1]
    score = {"candidate": number, "accuracy": accuracy, "se": standard_error(accuracy, len(roles.judge))}
    if "chosen" in entrants.provenance:  # of several searches, the one whose history goes with the winner
        score["chosen"] = f"seed-{winner.seed or 0}"
    if run.world.main:
        files.write_text(run.path(TABLE), _table(turns, config, len(roles.judge)))
        files.write_json(run.path(RESULT), result)
        search = dict(entrants.provenance)
        winner.genotype.save(path, provenance={**key, "origin": winner.origin, **score, "search": search})
    return Finals(winner.genotype, result)


class _Turns:
    """The turns so far: what they gave, and the weights of those who go on."""

    def __init__(self, entrants: Entrants, halving: Halving, key: Key, run: Run):
        self.entrants, self.halving, self.key, self.run = entrants, halving, key, run
        self.verdicts: dict[int, float] = {}
        self.states: dict[int, State] = {}

    def task(self, turn: Turn) -> Task | None:
        """What a child is to do; None for a candidate that has diverged."""
        number, rung = turn
        if rung > 0 and number not in self.states:
            return None
        candidate, channels = self.entrants.candidates[number], self.entrants.channels[number]
        return Task(candidate.genotype, channels, rung, self.states.get(number), rung == self.halving.rungs - 1)

    def record(self, turn: Turn, outcome: Outcome) -> None:
        """Note the result of a turn and save all of them."""
        number = turn[0]
        self.halving.record(turn, outcome.accuracy)
        self.states.pop(number, None)
        if outcome.state is not None:
            self.states[number] = outcome.state
        if outcome.verdict_accuracy is not None:
            self.verdicts[number] = outcome.verdict_accuracy
        self.run.save_checkpoint(checkpoint_name(NAME), self.key, self.state_dict())

    def state_dict(self) -> dict[str, Any]:
        turns = [[*turn, accuracy] for turn, accuracy in self.halving.accuracies.items()]
        states = {
            number: {name: torch.from_numpy(array) for name, array in state.items()}
            for number, state in self.states.items()
        }
        return {"turns": turns, "verdicts": self.verdicts, "states": states}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for number, rung, accuracy in state["turns"]:
            self.halving.record((number, rung), accuracy)
        self.verdicts = dict(state["verdicts"])
        self.states = {
            number: {name: tensor.numpy() for name, tensor in one.items()} for number, one in state["states"].items()
        }


def _train(turns: _Turns, trainer: Trainer, run: Run) -> None:
    """Train every turn as soon as it may begin and a child of any rank is free."""
    config, halving = trainer.config, turns.halving
    done = sum(config.epochs_of(rung) for _, rung in halving.accuracies)
    progress = run.progress(NAME, _all_epochs(halving, config), done=done, unit="epoch")
    if run.compute.device.type == "cuda":
        torch.cuda.empty_cache()  # the children need what the stages before have kept
    with run.stage(NAME) as cost, Children(trainer, config.jobs) as children:
        crew = Crew(children, run.world)
        while True:
            while beginning := halving.turns():
                for turn in beginning:
                    if (task := turns.task(turn)) is None:
                        turns.record(turn, DIVERGED)
                    else:
                        crew.submit(turn, task)
            if not crew.unfinished:
                break
            turn, outcome = crew.next(run.raise_if_stopping)
            number, rung = turn
            passes = config.steps(len(trainer.roles.train), rung) * min(config.batch_size, len(trainer.roles.train))
            judged = len(trainer.roles.judge) + (len(trainer.roles.verdict) if rung == config.rungs - 1 else 0)
            cost.images_forward += passes + judged
            cost.images_backward += passes
            turns.record(turn, outcome)
            if outcome == DIVERGED:
                title = turns.entrants.candidates[number].title
                run.say(f"warning: candidate {number} ({title}) has diverged and counts as accuracy 0")
            progress.update(config.epochs_of(rung), f"candidate {number}: {100 * outcome.accuracy:.1f} %")
            run.raise_if_stopping()
    progress.close()


def _all_epochs(halving: Halving, config: FinalsConfig) -> int:
    """Epochs of all turns, if the entry is among the better half."""
    epochs, contending = 0, len(halving.contenders)
    for rung in range(config.rungs):
        epochs += (contending + len(halving.controls)) * config.epochs_of(rung)
        contending = math.ceil(contending / 2)
    return epochs


# -- what they leave ---------------------------------------------------------------------------------------------------


def result_of(turns: _Turns, images: int) -> dict[str, Any]:
    """The content of `result.json`; all accuracies are of the `images` images of the verdict.

    Controls that diverged are no comparison and do not count. Raises ValueError if the winner did or too many controls.
    """
    halving, found = turns.halving, turns.verdicts
    controls = [found[number] for number in halving.controls if number in found]
    if halving.winner not in found or len(controls) < 2:
        raise ValueError(
            f"{len(turns.entrants.candidates) - len(found)} of the finals' candidates have diverged or were left out, "
            "and too few are left to compare; lower --finals.lr, or use --no-finals."
        )
    entry_accuracy = found.get(halving.entry, 0.0)
    compared = asdict(judge(entry_accuracy, controls, images))
    word = compared.pop("word")
    winner, entry = (turns.entrants.candidates[number] for number in (halving.winner, halving.entry))
    accuracy = found[halving.winner]
    return {
        "kind": "search",
        "winner": {
            "genotype": winner.genotype.to_json(),
            "origin": winner.origin,
            "title": winner.title,
            "accuracy": accuracy,
            "se": standard_error(accuracy, images),
        },
        "entry": {"genotype": entry.genotype.to_json(), "accuracy": entry_accuracy},
        "random": {
            "best": max(controls),
            "mean": float(np.mean(controls)),
            "sd": float(np.std(controls, ddof=1)),
            "n": len(controls),
        },
        "entry_minus_random": compared,
        "verdict": word,
        "images": images,
    }


def _table(turns: _Turns, config: FinalsConfig, images: int) -> str:
    """The lines of `finals.jsonl`: every turn, by rung and candidate, with its accuracy on the `images` that judge."""
    halving, entrants = turns.halving, turns.entrants
    lines = []
    for number, rung in sorted(halving.accuracies, key=lambda turn: turn[::-1]):
        accuracy = halving.accuracies[number, rung]
        candidate, control = entrants.candidates[number], number in halving.controls
        row = {
            "candidate": number,
            "origin": candidate.origin,
            "genotype": candidate.genotype.to_json(),
            "rung": rung,
            "epochs": config.epochs_of(rung),
            "channels": entrants.channels[number],
            "macs": entrants.macs[number],
            "accuracy": accuracy,
            "se": standard_error(accuracy, images),
            "kept": number in halving.kept(rung) or (control and rung + 1 < config.rungs),
        }
        lines.append(json.dumps(row))
    return "\n".join(lines) + "\n"
