"""Unreadable files: the only owner of their indices and error messages, and the only writer of bad_images.txt.

An unreadable file is never replaced: its index and a sentence are noted here, and batches simply lack it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas_kmix.engine import files
from nas_kmix.engine.distributed import World

if TYPE_CHECKING:
    from nas_kmix.engine.data import ImageData

FILE = "bad_images.txt"


class BadFiles(Mapping[int, str]):
    """The unreadable files of one dataset, index to sentence; it grows while a streamed set is read."""

    def __init__(self, files: int | None = None, most: float = 1.0, *, strict: bool = False):
        """At most the share `most` of all `files` (None: no limit) may be unreadable; if `strict`, not even one."""
        self.files, self.most, self.strict = files, most, strict
        self._sentences: dict[int, str] = {}

    def add(self, found: Mapping[int, str]) -> None:
        """Note further unreadable files. Raises ValueError where they are too many."""
        self._sentences.update(found)
        if self.files is not None and found:
            self.check(self.files)

    def check(self, files: int) -> None:
        """Raise ValueError if too many of these `files`, of which all others can be read, are unreadable."""
        if len(self) > self.most * files:
            raise ValueError(
                f"{len(self)} of {files} image files cannot be read, more than --max-bad-share {self.most:g} allows; "
                f"repair or replace them. The first is {self.first()}."
            )
        if self.strict and self:
            raise ValueError(f"{self.first()}; repair the file, or leave it out with --skip-bad.")

    def first(self) -> str:
        """The sentence of the lowest index, or an empty one."""
        return self._sentences[min(self._sentences)] if self._sentences else ""

    def __getitem__(self, index: int) -> str:
        return self._sentences[index]

    def __iter__(self) -> Iterator[int]:
        return iter(self._sentences)

    def __len__(self) -> int:
        return len(self._sentences)


class BadFileList:
    """The unreadable files of all datasets of a command, over all its processes and invocations.

    A resumed training reads only the rest of its epoch, and a finished one reads nothing, so the list is part of the
    checkpoints.
    """

    def __init__(self, sets: Iterable[ImageData], world: World | None = None):
        self._sets, self._world = list(sets), world or World()
        self._sentences: dict[str, str] = {}

    def gather(self) -> dict[str, str]:
        """Path below the data folder to sentence, sorted; every process must call it, and all get the same."""
        own = {data.source.place(index): sentence for data in self._sets for index, sentence in data.bad.items()}
        for given in self._world.gather(own):
            self._sentences.update(given)
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
