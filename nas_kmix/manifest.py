"""The proxy dataset as a small manifest, `proxy.json`, that any trainer can use.

It lists the images, and says which of them train the weights and which the architecture. Images are recognised by
content, so that it applies to any copy of the dataset, in any order.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch

from nas_kmix.engine import files
from nas_kmix.engine.data import ImageData
from nas_kmix.engine.foreign import source_of
from nas_kmix.engine.program import command
from nas_kmix.engine.sources import LOSSY_SUFFIXES, BadImageError
from nas_kmix.proxies import locate
from nas_kmix.sampling import DROP_HARDEST

FORMAT, VERSION = "nas_kmix/proxy", 1


@dataclass(frozen=True, eq=False)
class ProxyManifest:
    """A proxy dataset. Indices count the images of `split` in the dataset's own order.

    indices: int64 (P,), sorted; weights, arch: the two halves, disjoint, together `indices`; content: a short hash of
    each selected image; paths: relative, if from a folder; fingerprint: of the whole set; scores: hash of the scores.
    """

    data: str
    split: str
    n: int
    fingerprint: str
    class_names: tuple[str, ...]
    ratio: float
    method: str
    measure: str
    interval: int
    balanced: bool
    arch_share: float
    seed: int
    scores: str | None
    indices: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    arch: np.ndarray
    content: tuple[str, ...]
    paths: tuple[str, ...] | None = None
    drop_hardest: float = DROP_HARDEST

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ProxyManifest) and self.to_json() == other.to_json()

    __hash__ = None

    @property
    def halves(self) -> dict[str, np.ndarray]:
        """The indices that train the weights and those that train the architecture."""
        return {"weights": self.weights, "arch": self.arch}

    def to_json(self) -> dict[str, Any]:
        """The manifest as plain JSON values."""
        counts = np.bincount(self.labels, minlength=len(self.class_names))
        document = {
            "format": FORMAT,
            "version": VERSION,
            "data": self.data,
            "split": self.split,
            "n": self.n,
            "fingerprint": self.fingerprint,
            "class_names": list(self.class_names),
            "ratio": self.ratio,
            "method": self.method,
            "measure": self.measure,
            "interval": self.interval,
            "drop_hardest": self.drop_hardest,
            "balanced": self.balanced,
            "arch_share": self.arch_share,
            "seed": self.seed,
            "scores": self.scores,
            "class_counts": counts.tolist(),
            "indices": self.indices.tolist(),
            "labels": self.labels.tolist(),
            "halves": {name: half.tolist() for name, half in self.halves.items()},
            "content": list(self.content),
            "paths": None if self.paths is None else list(self.paths),
        }
        return {**document, "checksum": _checksum(document)}

    def hash(self) -> str:
        """SHA-256 of which images are in which half."""
        halves = [self.indices.tolist(), self.weights.tolist(), self.arch.tolist()]
        return hashlib.sha256(json.dumps([self.fingerprint, *halves]).encode()).hexdigest()

    def save(self, path: Path | str) -> None:
        """Write `proxy.json`, atomically; one key per line, for readable diffs."""
        lines = [f"  {json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in self.to_json().items()]
        files.write_text(Path(path), "{\n" + ",\n".join(lines) + "\n}\n")

    @classmethod
    def load(cls, path: Path | str) -> ProxyManifest:
        """Read and check `proxy.json`, or the published proxy of that name. Raises ValueError naming what is wrong."""
        raw = files.read_json(path := locate(path))
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            made_by = command("search", "--stop-after", "proxy")
            raise ValueError(f"{path} is not a proxy manifest; make one with {made_by}.")
        if raw.get("version") != VERSION:
            raise ValueError(f"{path} has version {raw.get('version')}; this program reads version {VERSION}.")
        try:
            return _from_json(raw)
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            cause = f"it lacks {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"{path} is damaged: {cause}; make the proxy again.") from error

    def apply(self, data: ImageData) -> ProxyManifest:
        """The same proxy in the indices of `data`, another copy of its dataset, possibly in another order.

        Images are matched by content and class, duplicates in order of occurrence; classes by name if both have the
        same names, otherwise by index. Raises ValueError naming the first image that is missing.
        """
        if data.fingerprint == self.fingerprint:
            return self
        if len(data.class_names) != len(self.class_names):
            raise ValueError(
                f"The proxy of {self.data} has {len(self.class_names)} classes, but {data.source.name} has "
                f"{data.num_classes}; give the dataset it was made from."
            )
        same_names = set(data.class_names) == set(self.class_names)
        relabel = [data.class_names.index(n) if same_names else i for i, n in enumerate(self.class_names)]
        rows = self._found_by_path(data, relabel) or _by_content(data, data.good())
        new = {}
        for position, (old, label, content) in enumerate(zip(self.indices, self.labels, self.content, strict=True)):
            matches = rows[content, relabel[label]]
            if not matches:
                name = self.paths[position] if self.paths else f"image {old}"
                if data.source.paths is None and Path(name).suffix.lower() in LOSSY_SUFFIXES:
                    raise ValueError(
                        f"The proxy of {self.data} knows files such as {name} by their bytes, but {data.source.name} "
                        f"gives pixels; give an ImageFolder of the files, or read them from an --export-list."
                    )
                raise ValueError(
                    f"The proxy of {self.data} does not belong to {data.source.name}: {name} (class "
                    f"{self.class_names[label]}, content {content}) is not in it."
                )
            new[int(old)] = matches.pop()
        indices = np.array(sorted(new.values()), dtype=np.int64)
        contents = {new[int(old)]: content for old, content in zip(self.indices, self.content, strict=True)}
        return replace(
            self,
            n=len(data),
            fingerprint=data.fingerprint,
            class_names=data.class_names,
            indices=indices,
            labels=data.labels[indices],
            weights=np.array(sorted(new[i] for i in self.weights.tolist()), dtype=np.int64),
            arch=np.array(sorted(new[i] for i in self.arch.tolist()), dtype=np.int64),
            content=tuple(contents[i] for i in indices.tolist()),
            paths=paths_of(data, indices),
        )

    def _found_by_path(self, data: ImageData, relabel: Sequence[int]) -> dict[tuple[str, int], list[int]] | None:
        """The images by content and class, if all are where the manifest says; only these few are read then."""
        if self.paths is None or data.source.paths is None:
            return None
        depths = {len(PurePosixPath(path).parts) for path in self.paths}
        places = {}  # by the ends of their paths, as folders may lie elsewhere
        for index, path in enumerate(data.source.paths):
            parts = Path(path).parts
            places |= {"/".join(parts[-depth:]): index for depth in depths}
        named = [places[path] for path in self.paths if path in places]
        if len(named) < len(self.indices):
            return None
        found = _by_content(data, np.sort(named))
        wanted = Counter((content, relabel[label]) for content, label in zip(self.content, self.labels, strict=True))
        return found if all(len(found[key]) >= count for key, count in wanted.items()) else None

    def subset(self, dataset: torch.utils.data.Dataset) -> torch.utils.data.Subset:
        """The proxy as a Subset of your own dataset of (image, label) pairs, for your own trainer.

        Works on torchvision's CIFAR and ImageFolder datasets and Subsets of them, whatever their transforms, and on any
        dataset of PIL images or uint8 (H, W, 3) arrays. But a proxy of JPEG or WebP files, which are recognised by
        their bytes, needs an ImageFolder. Raises ValueError if an image of the proxy is not in it.
        """
        source = source_of(dataset)
        data = ImageData(source, 0, (), (), torch.device("cpu"), None)
        return torch.utils.data.Subset(dataset, self.apply(data).indices.tolist())

    def export_list(self, path: Path | str) -> None:
        """Write one line `path-or-index<TAB>label<TAB>class name` per image, for other trainers."""
        names = self.paths or self.indices.tolist()
        rows = [f"{n}\t{c}\t{self.class_names[c]}\n" for n, c in zip(names, self.labels.tolist(), strict=True)]
        files.write_text(Path(path), "".join(rows))


def _by_content(data: ImageData, indices: np.ndarray) -> dict[tuple[str, int], list[int]]:
    """The images `indices`, ascending, by content and class, the first occurrence last."""
    rows = defaultdict(list)
    for index in indices[::-1].tolist():
        try:
            rows[data.source.content(index), int(data.labels[index])].append(index)
        except BadImageError as error:
            data.bad.add({index: str(error)})
    return rows


def paths_of(data: ImageData, indices: np.ndarray) -> tuple[str, ...] | None:
    return None if data.source.paths is None else tuple(data.source.paths[i] for i in indices)


def _is_control(character: str) -> bool:
    """Such characters would break a list of paths; others that are not printable occur in names of screenshots."""
    return unicodedata.category(character) == "Cc"


def _checksum(document: Mapping[str, Any]) -> str:
    """SHA-256 of all but the checksum itself, whatever the order of the keys."""
    rest = {name: value for name, value in document.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _from_json(raw: dict[str, Any]) -> ProxyManifest:
    names = _texts(raw, "class_names")
    indices, labels = _int_array(raw, "indices"), _int_array(raw, "labels")
    weights, arch = (_int_array(raw["halves"], half) for half in ("weights", "arch"))
    n = int(raw["n"])
    if len(indices) == 0 or (np.diff(indices) <= 0).any() or indices[0] < 0 or indices[-1] >= n:
        raise ValueError(f"indices must ascend within [0, {n})")
    if not np.array_equal(np.sort(np.concatenate([weights, arch])), indices):
        raise ValueError("the two halves together are not the indices")
    if labels.shape != indices.shape or labels.min() < 0 or labels.max() >= len(names):
        raise ValueError(f"labels must be one class number in [0, {len(names)}) per index")
    content = _texts(raw, "content")
    paths = None if raw["paths"] is None else _texts(raw, "paths")
    if len(content) != len(indices) or (paths is not None and len(paths) != len(indices)):
        raise ValueError("content and paths must have one entry per index")
    for path in paths or ():
        if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts or any(map(_is_control, path)):
            raise ValueError(f"the path {path!a} leaves the folder of the data")
    if raw.get("checksum", _checksum(raw)) != _checksum(raw):
        raise ValueError("its checksum does not match its content; an edited file should leave it out")
    plain = ("data", "split", "fingerprint", "ratio", "method", "measure", "interval", "balanced", "arch_share")
    return ProxyManifest(
        n=n,
        class_names=names,
        indices=indices,
        labels=labels,
        weights=weights,
        arch=arch,
        content=content,
        paths=paths,
        seed=raw["seed"],
        scores=raw["scores"],
        drop_hardest=raw.get("drop_hardest", DROP_HARDEST),
        **{name: raw[name] for name in plain},
    )


def _texts(raw: dict[str, Any], name: str) -> tuple[str, ...]:
    values = raw[name]
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError(f"{name} must be a list of strings")
    "".join(values).encode()  # a lone half of a surrogate pair could not be written again
    return tuple(values)


def _int_array(raw: dict[str, Any], name: str) -> np.ndarray:
    values = raw[name]
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise ValueError(f"{name} must be a list of whole numbers")
    return np.array(values, dtype=np.int64)
