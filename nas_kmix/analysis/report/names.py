"""Class names that people understand: the words for WordNet ids, from a list beside the images or ImageNet's own."""

from __future__ import annotations

import re
from pathlib import Path

from nas_kmix.engine.data import ImageData
from nas_kmix.pretrained import WNIDS, imagenet_classes

LISTS = ("words.txt", "LOC_synset_mapping.txt", "synset_words.txt")  # of Tiny-ImageNet, of ImageNet on Kaggle, of Caffe
WORDNET_ID = re.compile(r"n\d{8}")
LINE = re.compile(r"(n\d{8})\s+([^,\n]+)")


def spoken(data: ImageData) -> tuple[str, ...]:
    """The class names of `data`, WordNet ids replaced by the first of their words; two of one name keep their ids."""
    ids = [name for name in data.class_names if WORDNET_ID.fullmatch(name)]
    folder = data.source.folder
    if not ids or folder is None:
        return data.class_names
    words = _words(folder)
    found = [words.get(name, name) for name in data.class_names]
    return tuple(
        f"{word} ({name})" if found.count(word) > 1 else word
        for name, word in zip(data.class_names, found, strict=True)
    )


def _words(folder: Path) -> dict[str, str]:
    for path in (place / name for place in (folder, folder.parent) for name in LISTS):
        if path.is_file():
            matches = map(LINE.match, path.read_text(encoding="utf-8", errors="replace").splitlines())
            return {match[1]: match[2].strip() for match in matches if match}
    return dict(zip(WNIDS, imagenet_classes(), strict=True))
