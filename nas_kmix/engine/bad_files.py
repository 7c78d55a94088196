"""The image files that could not be read, over all processes of a job and all invocations of a command."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nas_kmix.engine import files
from nas_kmix.engine.data import ImageData
from nas_kmix.engine.distributed import World


class BadFiles:
    """Those of the `sets` that a command reads.

    A training that is resumed reads only what is left of its epoch, and one that was finished reads nothing; therefore
    the state goes into its checkpoints.
    """

    def __init__(self, sets: Iterable[ImageData], world: World):
        self._sets, self._world = list(sets), world
        self._sentences: dict[str, str] = {}

    def gather(self) -> dict[str, str]:
        """A sentence by path below the data folder, sorted; every process must call it, and all get the same."""
        own = {data.source.paths[index]: sentence for data in self._sets for index, sentence in data.bad.items()}
        for given in self._world.gather(json.dumps(own).encode()):
            self._sentences.update(json.loads(given))
        self._sentences = dict(sorted(self._sentences.items()))
        return self._sentences

    def write_list(self, path: Path) -> int:
        """Write a line for each file, if there are any, and return how many; every process must call it."""
        sentences = self.gather().values()
        if sentences and self._world.main:
            files.write_text(path, "".join(" ".join(sentence.splitlines()) + "\n" for sentence in sentences))
        return len(sentences)

    def state_dict(self) -> dict[str, Any]:
        return {"bad_files": self.gather()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._sentences = {str(path): str(sentence) for path, sentence in state.get("bad_files", {}).items()}
