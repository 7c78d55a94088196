"""Stage two: score all images, by their losses under mixing and the unmixed image. A scorer in, `scores.npz` out.

`nas_kmix.scoring` scores; this stage bills it, saves the shards that are done and resumes after them.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nas_kmix.baselines import measure_baselines
from nas_kmix.engine import files
from nas_kmix.engine.data import ImageData
from nas_kmix.engine.keys import check_key
from nas_kmix.engine.run import Run, checkpoint_name
from nas_kmix.pipeline.scorer import Scorer
from nas_kmix.pipeline.stage import Key
from nas_kmix.scores import ScoreTable
from nas_kmix.scoring import ScoringConfig, score_dataset, scoring_key

NAME = "scoring"
FILE = "scores.npz"


def key(config: ScoringConfig, scorer: Scorer, data: ImageData) -> dict[str, Any]:
    found = scoring_key(scorer.model, scorer.data, config)
    if scorer.forgetting is not None:
        found["inputs"]["forgetting"] = files.hash_tensors({"forgetting": scorer.forgetting})
    return found


def load(
    path: Path, config: ScoringConfig, scorer: Scorer | None, data: ImageData, *, run: Run, key: Key | None
) -> ScoreTable:
    """The table in `path`; one that was given needs no scorer."""
    table = ScoreTable.load(path)
    check_key(path, table.key, key)
    if not table.belongs_to(data):
        if key is None:
            raise ValueError(
                f"--scores {path} was made from other data than --data; leave it out to score these images."
            )
        raise ValueError(f"{path} is damaged: it has other images than --data; {files.REMOVE_OURS}.")
    data.bad.add(table.bad)
    return table


def make(path: Path, config: ScoringConfig, scorer: Scorer, data: ImageData, *, run: Run, key: Key) -> ScoreTable:
    """Score all of `data`, resuming after the shards that are done, and write `path`."""
    model, view, forgetting = scorer
    tables: list[ScoreTable] = []
    done = np.empty(0, dtype=np.int64)
    with run.resumed(checkpoint_name(NAME), key) as state:
        if state is not None:
            rows = [state[name].numpy() for name in ("index", "label", "losses")]
            columns = {name: values.numpy() for name, values in state["columns"].items()}
            tables = [ScoreTable(*rows, key, dict(state["bad"]), columns).checked()]
            done = tables[0].index
            data.bad.add(state["bad"])
    for theirs in run.world.gather(dict(data.bad)):  # of a streamed set each process has read a part
        data.bad.add(theirs)
    wanted = np.setdiff1d(data.good(), done)
    progress = run.progress(NAME, len(done) + len(wanted), done=len(done), unit="image")

    with run.stage(NAME) as cost:

        def on_shard(shard: ScoreTable) -> None:
            tables.append(shard)
            cost.images_forward += shard.losses.size + len(shard.index)  # and the unmixed images
            progress.update(len(shard.index))
            if run.checkpoint_due():
                table = ScoreTable.merge(tables)
                rows = {name: torch.from_numpy(getattr(table, name)) for name in ("index", "label", "losses")}
                columns = {name: torch.from_numpy(values) for name, values in table.columns.items()}
                state = {**rows, "columns": columns, "bad": dict(data.bad)}
                run.save_checkpoint(checkpoint_name(NAME), key, state)
                run.raise_if_stopping()

        if len(wanted):
            options = {"compute": run.compute, "world": run.world, "on_shard": on_shard}
            score_dataset(model, view, config, indices=wanted, **options)
        progress.close()
        table = replace(ScoreTable.merge(tables), key=key, bad=dict(data.bad))
        if forgetting is not None:
            counts = forgetting.numpy()[table.index].astype(np.float64)
            table = replace(table, columns={**table.columns, "forgetting": counts})
        if config.baselines and run.world.main:
            others = measure_baselines(model, view, table.index, seed=config.seed, compute=run.compute)
            cost.images_forward += len(table.index)
            table = replace(table, columns={**table.columns, **others})
    if run.world.main:
        table.save(path)
    run.say(
        f"{NAME}: {table.losses.shape[1]} losses of each of {len(table.index):,} images, {table.losses.mean():.3f} on "
        f"average; a typical image has a CV of {np.median(table.cv):.3f} and an EL2N of "
        f"{np.median(table.columns['el2n']):.3f}"
    )
    run.world.barrier()  # rank 0 alone measures the baselines
    return table if run.world.main else ScoreTable.load(path)
