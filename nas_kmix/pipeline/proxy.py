"""Stage three: select the proxy dataset. Scores in, `proxy.json` out.

`nas_kmix.proxy` selects the images; the file applies to any copy of their dataset.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import numpy as np

from nas_kmix.engine.data import ImageData
from nas_kmix.engine.keys import check_key, identity, stage_key
from nas_kmix.engine.run import Run
from nas_kmix.manifest import ProxyManifest
from nas_kmix.pipeline.stage import Key
from nas_kmix.proxy import ProxyConfig, make_proxy
from nas_kmix.scores import ScoreTable

NAME = "selection"
FILE = "proxy.json"
ALONE = True


def key(config: ProxyConfig, table: ScoreTable | None, data: ImageData) -> Key:
    """What a proxy depends on; a random one may have no scores."""
    inputs = {"data": data.fingerprint, "scores": None if table is None else table.hash()}
    return stage_key(NAME, identity(config), inputs)


def load(
    path: Path, config: ProxyConfig, table: ScoreTable | None, data: ImageData, *, run: Run, key: Key | None
) -> ProxyManifest:
    """The proxy in `path`, in the indices of `data`."""
    manifest = ProxyManifest.load(path)
    settings = {field.name: getattr(manifest, field.name) for field in fields(ProxyConfig)}
    inputs = {"data": manifest.fingerprint, "scores": manifest.scores}
    check_key(path, stage_key(NAME, settings, inputs), key)
    return manifest.apply(data)


def make(
    path: Path, config: ProxyConfig, table: ScoreTable | None, data: ImageData, *, run: Run, key: Key
) -> ProxyManifest:
    """Select the images and write `path`."""
    with run.stage(NAME):
        manifest = make_proxy(data, table, config)
    manifest.save(path)
    weights, arch = len(manifest.weights), len(manifest.arch)
    run.say(f"selection: {len(manifest.indices)} images, {weights} for the weights, {arch} for the architecture")
    many = np.bincount(data.labels[data.good()], minlength=data.num_classes) > 1
    single = np.flatnonzero(many & (np.bincount(manifest.labels, minlength=data.num_classes) == 1))
    if len(single):
        classes = "1 class has" if len(single) == 1 else f"{len(single)} classes have"
        run.say(
            f"warning: {classes} a single image in the proxy, which trains the weights (first: "
            f"{data.class_names[single[0]]}); raise --ratio to give the architecture some too"
        )
    return manifest
