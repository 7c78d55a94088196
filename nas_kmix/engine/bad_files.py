"""What cannot be read: the one owner of every such file's index and sentence, and the one writer of bad_images.txt.

A file that cannot be read is never replaced: its index goes here with a sentence, and batches simply lack it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas_kmix.engine import files
from nas_kmix.engine.distributed import World

if TYPE_CHECKING:
    from nas_kmix.engine.data import ImageData

FILE = "bad_images.txt"


class BadFiles(Mapping[int, str]):
    """The files of one set that cannot be read, a sentence by index; it grows while a streamed set is read."""

    def __init__(self, *, strict: bool = False):
        """`strict` raises ValueError for the first file that is added."""
        self.strict = strict
        self._sentences: dict[int, str] = {}

    def add(self, found: Mapping[int, str]) -> None:
        """Take note of further files."""
        if self.strict and found:
            sentence = found[min(found)]
            raise ValueError(f"{sentence}; repair or remove it, or go on without it with --skip-bad.")
        self._sentences.update(found)

    def first(self) -> str:
        """The sentence of the lowest index, empty where there is none."""
        return self._sentences[min(self._sentences)] if self._sentences else ""

    def __getitem__(self, index: int) -> str:
        return self._sentences[index]

    def __iter__(self) -> Iterator[int]:
        return iter(self._sentences)

    def __len__(self) -> int:
        return len(self._sentences)


class BadFileList:
    """Those of several sets that a command reads, over all processes of a job and all invocations of the command.

    A training that is resumed reads only what is left of its epoch, and one that was finished reads nothing; therefore
    the state goes into its checkpoints.
    """

    def __init__(self, sets: Iterable[ImageData], world: World | None = None):
        self._sets, self._world = list(sets), world or World()
        self._sentences: dict[str, str] = {}

    def gather(self) -> dict[str, str]:
        """A sentence by path below the data folder, sorted; every process must call it, and all get the same."""
        own = {data.source.place(index): sentence for data in self._sets for index, sentence in data.bad.items()}
        for given in self._world.gather(json.dumps(own).encode()):
            self._sentences.update(json.loads(given))
        self._sentences = dict(sorted(self._sentences.items()))
        return self._sentences

    def write(self, folder: Path) -> int:
        """Write `bad_images.txt`, a line for each file, if there are any, and return how many.

        Every process must call it.
        """
        sentences = self.gather().values()
        if sentences and self._world.main:
            lines = [" ".join(sentence.splitlines()) for sentence in sentences]
            files.write_text(folder / FILE, "".join(f"{line}\n" for line in lines))
        return len(sentences)

    def state_dict(self) -> dict[str, Any]:
        return {"bad_files": self.gather()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._sentences = {str(path): str(sentence) for path, sentence in state.get("bad_files", {}).items()}
