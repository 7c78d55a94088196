"""What a cell search decides: two cells of eight (operation, input) edges, and their files.

In:  JSON files and objects, legacy `Genotype(...)` text, names of published genotypes.
Out: `Genotype`, an immutable value that is valid by construction.

`normal[2 * i]` and `normal[2 * i + 1]` are the edges of node i (see `cell.py`), strongest first where a search
chose them. The concat fields are always (2, 3, 4, 5): they are kept because every published genotype has them.
"""

from __future__ import annotations

import errno
import json
import os
import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from darts_space.cell import CONCAT, NODES, PRIMITIVES, Edge, checked_concat, checked_edges
from darts_space.legacy_text import FIELDS, TEXT_FORM, calls_in, fields_in, lines_of_json, parse_call

FORMAT = "darts_space/genotype"
VERSION = 1
COLLAPSE_SKIPS, COLLAPSE_POOLS = 4, 5
"""Skip connections, and pools, of the eight operations of a normal cell from which on a search counts as collapsed."""

# Far more than a genotype with its provenance needs; a larger file is a mistaken path.
_MAX_FILE_BYTES = 1 << 20


@dataclass(frozen=True)
class Genotype:
    """A normal and a reduction cell. Sequences become tuples; anything invalid is a ValueError."""

    normal: tuple[Edge, ...]
    """Eight (operation, input state) pairs, two per node, of the cells that keep the resolution."""
    normal_concat: tuple[int, ...]
    """(2, 3, 4, 5): the states whose concatenation leaves the cell."""
    reduce: tuple[Edge, ...]
    """The same for the cells that halve the resolution."""
    reduce_concat: tuple[int, ...]
    """(2, 3, 4, 5)."""

    def __post_init__(self) -> None:
        for cell in ("normal", "reduce"):
            object.__setattr__(self, cell, checked_edges(cell, getattr(self, cell)))
            object.__setattr__(self, f"{cell}_concat", checked_concat(cell, getattr(self, f"{cell}_concat")))

    def skip_connections(self) -> tuple[int, int]:
        """Number of skip connections in the normal and in the reduction cell, each 0..8."""
        normal, reduce = ([operation for operation, _ in cell] for cell in (self.normal, self.reduce))
        return normal.count("skip_connect"), reduce.count("skip_connect")

    def pools(self) -> tuple[int, int]:
        """Number of pools in the normal and in the reduction cell, each 0..8."""
        normal, reduce = (sum("pool" in operation for operation, _ in cell) for cell in (self.normal, self.reduce))
        return normal, reduce

    @property
    def collapsed(self) -> bool:
        """Whether operations without weights have taken over the normal cell: the known failures of such searches.

        Pools win while the other operations are untrained, skip connections where the architecture moves for too long.
        """
        return self.skip_connections()[0] >= COLLAPSE_SKIPS or self.pools()[0] >= COLLAPSE_POOLS

    def shared_edges(self, other: Genotype) -> int:
        """Number of (cell, node, operation, input) entries that both genotypes have, 0..`GENOTYPE_EDGES`."""
        return len(self.entries & other.entries)

    @property
    def entries(self) -> frozenset[tuple[str, int, str, int]]:
        """All (cell, node, operation, input).

        Two genotypes that list the inputs of a node in another order have the same, and are one network.
        """
        cells = (("normal", self.normal), ("reduce", self.reduce))
        return frozenset((cell, i // 2, *edge) for cell, edges in cells for i, edge in enumerate(edges))

    def to_json(self) -> dict[str, Any]:
        """The genotype as a JSON object with its format and version."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "normal": [list(edge) for edge in self.normal],
            "normal_concat": list(self.normal_concat),
            "reduce": [list(edge) for edge in self.reduce],
            "reduce_concat": list(self.reduce_concat),
        }

    @classmethod
    def from_json(cls, document: Any) -> Genotype:
        """The inverse of `to_json`. A "provenance" object is ignored; any other additional key is an error."""
        if not isinstance(document, dict):
            raise ValueError("The genotype JSON is not an object; write one with Genotype.save.")
        if document.get("format") != FORMAT or document.get("version") != VERSION:
            found = reprlib.repr((document.get("format"), document.get("version")))
            raise ValueError(
                f"The genotype JSON must have format {FORMAT!r} and version {VERSION}, but has {found}; "
                "write it with Genotype.save of this version."
            )
        if missing := [field for field in FIELDS if field not in document]:
            raise ValueError(f"The genotype JSON lacks {', '.join(missing)}; write it with Genotype.save.")
        if unknown := sorted(set(document) - {"format", "version", "provenance", *FIELDS}):
            raise ValueError(f"The genotype JSON has unknown keys {reprlib.repr(unknown)}; leave them out.")
        if not isinstance(document.get("provenance", {}), dict):
            raise ValueError('"provenance" in the genotype JSON must be an object; correct it, or leave it out.')
        return cls(*(document[field] for field in FIELDS))

    def to_text(self) -> str:
        """One line of legacy text, readable by `from_text` and by the published DARTS code."""
        return (
            f"Genotype(normal={list(self.normal)}, normal_concat=range(2, 6), "
            f"reduce={list(self.reduce)}, reduce_concat=range(2, 6))"
        )

    @classmethod
    def from_text(cls, text: str) -> Genotype:
        """Read legacy `Genotype(...)` or `NAME = Genotype(...)` text without ever executing it.

        Arguments by name or by position, lists or tuples, `range(stop)` `range(start, stop)` or with a step, and
        numpy's integers. Any other call, name or expression, and text above 8,192 characters, is a ValueError.
        """
        return cls(**parse_call(text))

    def save(self, path: str | os.PathLike[str], provenance: dict[str, Any] | None = None) -> None:
        """Write the genotype as JSON, one node per line; the same content gives the same bytes.

        `provenance` is any JSON object, such as the search's config and the hashes of its inputs. The file
        appears whole or not at all: a temporary file beside it is renamed. OSError if it cannot be written.
        """
        path = Path(path)
        temporary = path.with_name(f".{path.name}.tmp")
        content = self._file_content(provenance)
        try:
            with open(temporary, "w", encoding="utf-8", newline="\n") as file:
                file.write(content)
                file.flush()
                try:
                    os.fsync(file.fileno())
                except OSError as error:
                    if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):  # some file systems have none
                        raise
            os.replace(temporary, path)
        except OSError as error:
            raise OSError(f"{path} could not be written: {error.strerror or error}.") from error
        finally:
            temporary.unlink(missing_ok=True)

    def _file_content(self, provenance: dict[str, Any] | None) -> str:
        entries = []
        for key, value in self.to_json().items():
            if key in ("normal", "reduce"):
                pairs = [json.dumps(edge) for edge in value]
                nodes = [f"    {first}, {second}" for first, second in zip(pairs[::2], pairs[1::2], strict=True)]
                entries.append(f'  "{key}": [\n' + ",\n".join(nodes) + "\n  ]")
            else:
                entries.append(f'  "{key}": {json.dumps(value)}')
        if provenance is not None:
            if not isinstance(provenance, dict):
                raise ValueError(f"The provenance must be a dict, not {type(provenance).__name__}.")
            try:
                text = json.dumps(provenance, indent=2, sort_keys=True, allow_nan=False)
            except (TypeError, ValueError, RecursionError) as error:
                raise ValueError(f"The provenance is not a JSON object ({error}); pass plain values.") from error
            entries.append('  "provenance": ' + text.replace("\n", "\n  "))
        return "{\n" + ",\n".join(entries) + "\n}\n"

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Genotype:
        """Read a JSON file of `save` or a file of legacy text. ValueErrors name the file."""
        try:
            with open(path, "rb") as file:
                content = file.read(_MAX_FILE_BYTES + 1)
        except OSError as error:
            reason = error.strerror or error
            raise ValueError(f"Cannot read the genotype file {path}: {reason}. Check its path.") from error
        if len(content) > _MAX_FILE_BYTES:
            raise ValueError(f"The file {path} is larger than 1 MiB, so it is no genotype; check its path.")
        try:
            marked = content[:2] in (b"\xff\xfe", b"\xfe\xff")  # as PowerShell writes what is redirected to a file
            return find_genotype(content.decode("utf-16" if marked else "utf-8-sig"))
        except UnicodeDecodeError as error:
            raise ValueError(f"The file {path} is not UTF-8 text, so it is no genotype; check its path.") from error
        except ValueError as error:
            raise ValueError(f"Cannot use the genotype file {path}: {error}") from error


def read_genotype(source: str) -> Genotype:
    """The genotype that a user names: a published one, a file, the folder of a run, or JSON or legacy text itself."""
    if (name := ALIASES.get(source, source)) in GENOTYPES:
        return GENOTYPES[name]
    path = os.path.expanduser(source)
    if os.path.isfile(path):
        return Genotype.load(path)
    if source and os.path.isdir(path):
        for name in ("genotype.json", "result.json"):  # of a search, and of a training
            if os.path.isfile(os.path.join(path, name)):
                return Genotype.load(os.path.join(path, name))
        raise ValueError(f"The folder {source} holds no genotype.json; name a run folder whose search has ended.")
    if source.lstrip().startswith("{") or "Genotype(" in source:
        return find_genotype(source)
    raise ValueError(
        f"{reprlib.repr(source)} is neither a genotype file nor one of {', '.join(GENOTYPES)} nor text of the form "
        f"{TEXT_FORM}."
    )


def random_genotype(rng: Any) -> Genotype:
    """A uniformly random genotype: operations without `none`, unordered pairs of distinct inputs per node.

    `rng` is a `numpy.random.Generator` or any object with the same `integers(low, high)`. Each node lists the
    lower input first, so that equal networks are equal genotypes.
    """

    def cell() -> list[Edge]:
        edges: list[Edge] = []
        for node in range(NODES):
            first = int(rng.integers(0, 2 + node))
            second = int(rng.integers(0, 1 + node))
            second += second >= first  # skips the input already taken
            operations = [PRIMITIVES[int(rng.integers(1, len(PRIMITIVES)))] for _ in range(2)]
            edges += zip(operations, sorted((first, second)), strict=True)
        return edges

    return Genotype(cell(), CONCAT, cell(), CONCAT)


def find_genotype(text: str) -> Genotype:
    """The one genotype of a text: JSON, lines of JSON, legacy text, or a longer text such as a log that has one.

    Raises ValueError where there is none, one that cannot be read, or several that differ.
    """
    if text.lstrip().startswith("{"):
        try:
            documents = [json.loads(text)]
        except (ValueError, RecursionError) as error:
            documents = lines_of_json(text)
            if len(documents) < 2:
                raise ValueError(f"It is not valid JSON ({error}); write it with Genotype.save.") from error
        if len(documents) == 1 and isinstance(documents[0], dict) and "format" in documents[0]:
            return Genotype.from_json(documents[0])
        try:
            fields = fields_in(documents)
        except RecursionError as error:
            raise ValueError("The JSON is nested too deeply; write it with Genotype.save.") from error
        found = {f"genotype {i}": Genotype(**one) for i, one in enumerate(fields, start=1)}
        if not found:
            return Genotype.from_json(documents[0])  # which says what it lacks
    else:
        found = {}
        for place, call in calls_in(text):
            try:
                found[place] = Genotype.from_text(call)
            except ValueError as error:  # it may be the one that is meant
                raise ValueError(f"{place}: {error}") from error
        if not found:
            return Genotype.from_text(text)  # which says what there is instead
    if len(set(found.values())) > 1:
        places = ", ".join(list(found)[:6]) + (", ..." if len(found) > 6 else "")
        raise ValueError(f"There are {len(found)} genotypes: {places}. Which one? Give its text or its line alone.")
    return next(iter(found.values()))


def _published(normal: str, reduce: str) -> Genotype:
    """Cells as text, e.g. "sep_conv_3x3 1, skip_connect 0, ...", two edges per node."""
    cells = ([edge.split() for edge in cell.split(", ")] for cell in (normal, reduce))
    edges = [[(operation, int(source)) for operation, source in cell] for cell in cells]
    return Genotype(edges[0], CONCAT, edges[1], CONCAT)


GENOTYPES = {
    # PC-DARTS, searched on CIFAR-10.
    "PC_DARTS_cifar": _published(
        normal="sep_conv_3x3 1, skip_connect 0, sep_conv_3x3 0, dil_conv_3x3 1, "
        "sep_conv_5x5 0, sep_conv_3x3 1, avg_pool_3x3 0, dil_conv_3x3 1",
        reduce="sep_conv_5x5 1, max_pool_3x3 0, sep_conv_5x5 1, sep_conv_5x5 2, "
        "sep_conv_3x3 0, sep_conv_3x3 3, sep_conv_3x3 1, sep_conv_3x3 2",
    ),
    # PC-DARTS, searched on ImageNet.
    "PC_DARTS_image": _published(
        normal="skip_connect 1, sep_conv_3x3 0, sep_conv_3x3 0, skip_connect 1, "
        "sep_conv_3x3 1, sep_conv_3x3 3, sep_conv_3x3 1, dil_conv_5x5 4",
        reduce="sep_conv_3x3 0, skip_connect 1, dil_conv_5x5 2, max_pool_3x3 1, "
        "sep_conv_3x3 2, sep_conv_3x3 1, sep_conv_5x5 0, sep_conv_3x3 3",
    ),
    # DARTS, first order, searched on CIFAR-10.
    "DARTS_V1": _published(
        normal="sep_conv_3x3 1, sep_conv_3x3 0, skip_connect 0, sep_conv_3x3 1, "
        "skip_connect 0, sep_conv_3x3 1, sep_conv_3x3 0, skip_connect 2",
        reduce="max_pool_3x3 0, max_pool_3x3 1, skip_connect 2, max_pool_3x3 0, "
        "max_pool_3x3 0, skip_connect 2, skip_connect 2, avg_pool_3x3 0",
    ),
    # DARTS, second order, searched on CIFAR-10.
    "DARTS_V2": _published(
        normal="sep_conv_3x3 0, sep_conv_3x3 1, sep_conv_3x3 0, sep_conv_3x3 1, "
        "sep_conv_3x3 1, skip_connect 0, skip_connect 0, dil_conv_3x3 2",
        reduce="max_pool_3x3 0, max_pool_3x3 1, skip_connect 2, max_pool_3x3 1, "
        "max_pool_3x3 0, skip_connect 2, skip_connect 2, max_pool_3x3 1",
    ),
}
"""The published genotypes that this project compares with."""
ALIASES = {"PCDARTS": "PC_DARTS_cifar", "DARTS": "DARTS_V2"}
"""Further names that the published code gives them."""
