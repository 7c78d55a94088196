"""Mutated files: every reader reads a file correctly, or refuses it in a sentence that names the file.

Bytes are changed as a bad disk or an interrupted copy would, and values as somebody would who edits or forges a file.
What can run code, unpack to more than there is, or leave its folder is refused, whatever else it is.
"""

import contextlib
import copy
import io
import json
import os
import pickle
import random
import re
import shutil
import time
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import draw_pixels
from PIL import Image

from darts_space import GENOTYPES, Genotype, load_network, network_checkpoint
from darts_space.checkpoint import build_network
from nas_kmix.analysis.classifiers import load_classifier
from nas_kmix.backbones import build_backbone
from nas_kmix.engine import files
from nas_kmix.engine.data import DataConfig, load_data
from nas_kmix.engine.keys import stage_key
from nas_kmix.engine.run import Run
from nas_kmix.engine.sources import BadImageError, Source
from nas_kmix.pipeline.scorer import FORMAT, load_scorer
from nas_kmix.proxy import ProxyConfig, ProxyManifest, make_proxy
from nas_kmix.scores import ScoreTable
from nas_kmix.scoring import ScoringConfig, scoring_key

KEY = stage_key("scorer", {"epochs": 1}, {})
SECONDS = 20  # a reader that takes longer hangs
IMAGES = 24
LABELS = np.arange(IMAGES) % 3
SUFFIXES = ("png", "jpg", "bmp", "ppm", "webp", "tif")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """One whole file of every kind."""
    place = tmp_path_factory.mktemp("whole")
    arrays = {"train_images": draw_pixels(IMAGES, 8, 8, 3), "train_labels": LABELS}
    np.savez(place / "stored.npz", **arrays)
    np.savez_compressed(place / "deflated.npz", **arrays)
    data = load_data(DataConfig(str(place / "stored.npz")))

    genotype = GENOTYPES["PC_DARTS_cifar"]
    genotype.save(place / "genotype.json", provenance={"stage": "search", "inputs": {"data": "f"}})
    (place / "genotype.txt").write_text(f"PC_DARTS = {genotype.to_text()}\n")

    preparation = {"class_names": ["0", "1", "2"], "mean": [0.5] * 3, "std": [0.3] * 3, "image_size": 8}
    scorer = build_backbone("tiny", num_classes=3)
    content = {"network": {"backbone": "tiny", "num_classes": 3, "stem": "cifar"}, "model": scorer.state_dict()}
    files.save_tensors(place / "scorer.pt", {"format": FORMAT, "key": KEY, **preparation, **content})
    shape = {"kind": "cifar", "layers": 3, "num_classes": 3, "channels": 2, "auxiliary": False}
    network = build_network({**shape, "genotype": genotype.to_json()}, generator=torch.Generator().manual_seed(0))
    files.save_tensors(place / "last.pt", {**preparation, **network_checkpoint(network)})

    rows = np.arange(IMAGES - 1)
    losses = np.random.default_rng(0).random((len(rows), 4), dtype=np.float32)
    key = scoring_key(scorer, data, ScoringConfig(draws=4))
    table = ScoreTable(rows, LABELS[rows], losses, key, {IMAGES - 1: "a file that cannot be read"})
    table.save(place / "scores.npz")
    proxy = make_proxy(data, table, ProxyConfig(ratio=0.5, measure="cv", method="top"))
    replace(proxy, paths=tuple(f"train/{i}.png" for i in proxy.indices)).save(place / "proxy.json")

    config = {"input": {"data": "digits"}, "out": place, "search": {"lr": None}}
    with Run(place, stages=("scorer",), records={"config.json": config}) as run, run.stage("scorer") as cost:
        cost.images_forward += 7
        for epoch in range(3):
            run.log.add("scorer", epoch, loss=1.5 / (epoch + 1), lr=0.1)
    for suffix in SUFFIXES:
        Image.fromarray(draw_pixels(20, 14, 3)).save(place / f"image.{suffix}")
    return place


# -- readers -----------------------------------------------------------------------------------------------------------


def read_scorer(path: Path) -> object:
    data = load_data(DataConfig(str(path.parent / "stored.npz")))
    model, view, _ = load_scorer(path, data)
    return files.hash_tensors(model.state_dict()), view.mean, view.std


def read_classifier(path: Path) -> object:
    found = load_classifier(path)
    return files.hash_tensors(found.model.state_dict()), replace(found, path=None, model=None)


def read_network(path: Path) -> object:
    return files.hash_tensors(load_network(path).state_dict())


def read_table(path: Path) -> object:
    table = ScoreTable.load(path)
    assert np.isfinite(table.cv).all() and len(table.cv) == len(table.index)
    return table.hash(), table.key, table.bad


def read_data(path: Path) -> object:
    return load_data(DataConfig(str(path))).fingerprint


def read_genotype(path: Path) -> object:
    genotype = Genotype.load(path)
    assert Genotype.from_json(json.loads(json.dumps(genotype.to_json()))) == genotype
    return genotype


def read_checkpoint(path: Path) -> object:
    """What resumes from a checkpoint, as a stage does."""
    run = Run(
        path.parent,
        stages=(),
    )
    model = build_backbone("tiny", num_classes=3)
    with run.resumed(path.name, KEY) as state:
        model.load_state_dict(state["model"])
        return files.hash_tensors(model.state_dict()), tuple(map(float, state["mean"])), int(state["image_size"])


def read_records(path: Path) -> object:
    """A damaged bill or log stops nothing: what cannot be read is lost, and the next file written is whole."""
    with Run(path.parent, stages=("scorer",)) as run:
        run.log.add("scorer", 2, loss=0.5, lr=0.1)
        run.ledger.write()
    json.loads((path.parent / "cost.json").read_text(), parse_constant=pytest.fail)
    widths = {
        len(line.split(",")) for line in (path.parent / "metrics.csv").read_text().splitlines() if '"' not in line
    }
    assert len(widths) <= 1


def read_image(path: Path) -> object:
    source = Source("one", "train", np.zeros(1, np.int64), ("one",), folder=path.parent, paths=(path.name,))
    pixels = source.read(0)
    assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3
    assert re.fullmatch("[0-9a-f]{16}", source.content(0))


@dataclass(frozen=True)
class Reader:
    """`read` raises ValueError or BadImageError with the file's name, or returns what can be compared.

    checked: the format has checksums, so that a file with other bytes is refused or means the same as the whole file.
    Of others, what is accepted is a different content that passes the reader's own checks.
    """

    file: str
    read: Callable[[Path], object]
    checked: bool = False

    def __str__(self) -> str:
        return f"{self.read.__name__}-{self.file}"


READERS = [
    Reader("genotype.json", read_genotype),
    Reader("genotype.txt", read_genotype),
    Reader("proxy.json", ProxyManifest.load, checked=True),
    Reader("scores.npz", read_table, checked=True),
    Reader("scorer.pt", read_scorer, checked=True),
    Reader("scorer.pt", read_classifier, checked=True),
    Reader("scorer.pt", read_checkpoint, checked=True),
    Reader("last.pt", read_classifier, checked=True),
    Reader("last.pt", read_network, checked=True),
    Reader("stored.npz", read_data, checked=True),
    Reader("deflated.npz", read_data, checked=True),
    Reader("config.json", files.read_json),
    Reader("cost.json", read_records),
    Reader("metrics.csv", read_records),
    *(Reader(f"image.{suffix}", read_image) for suffix in SUFFIXES),
]


# -- mutations ---------------------------------------------------------------------------------------------------------


def mutated_bytes(payload: bytes, rng: random.Random) -> bytes:
    """A few bytes changed, lost, repeated, moved, or the end cut off."""
    payload = bytearray(payload)
    at = rng.choice(
        [
            rng.randrange(len(payload)),
            rng.randrange(min(200, len(payload))),
            max(0, len(payload) - rng.randrange(1, 300)),
        ]
    )
    span = slice(at, at + rng.choice([1, 1, 2, 4, 16, 200]))
    kind = rng.randrange(7)
    if kind == 0:
        payload[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
        payload[span] = rng.randbytes(len(payload[span]))
    elif kind == 2:
        del payload[span]
    elif kind == 3:
        payload[at:at] = payload[span]
    elif kind == 4:
        payload[span] = bytes([rng.choice([0, 255])]) * len(payload[span])
    elif kind == 5:
        other = rng.randrange(len(payload))
        payload[at:at] = payload[other : other + 50]
    else:
        del payload[at:]
    return bytes(payload)


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


HOSTILE = (None, True, -1, 0, 1 << 70, 10**400, 1e308, float("nan"), float("-inf"), "", "x", "\ud800", "a\nb\tc\0",
           "../../x", "/etc/passwd", [], {}, [1], {"a": 1}, [[1, 2], [3]], "9" * 5000, nested(400))  # fmt: skip


def mutated_value(document: Any, rng: random.Random, others: tuple) -> Any:
    """Nested lists and dicts with one value replaced, removed or duplicated."""
    document = copy.deepcopy(document)
    parent, at = None, None
    value = document
    while isinstance(value, (list, dict)) and value and (parent is None or rng.random() < 0.8):
        parent, at = value, rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
        value = parent[at]
    kind = rng.randrange(4)
    if parent is None:
        return rng.choice(others)
    if kind == 0:
        del parent[at]
    elif kind == 1 and isinstance(parent, list):
        parent.insert(at, value)
    elif kind == 1:
        parent[f"{at}2"] = value
    else:
        parent[at] = rng.choice(others)
    return document


def mutated_array(array: np.ndarray, rng: random.Random) -> np.ndarray:
    kind = rng.choice(["type", "shape", "fill", "cut", "text", "objects"])
    if kind == "type":
        return array.astype(rng.choice("bBhHiIqQefdg?FDSU") if array.dtype.kind not in "US" else "S")
    if kind == "shape":
        return rng.choice([array.ravel(), array[None], array[..., None], array.T])
    if kind == "fill" and array.dtype.kind in "uif":
        values = [np.nan, np.inf, -1, 0] if array.dtype.kind == "f" else [0, 7, 127]
        return np.full_like(array, rng.choice(values))
    if kind == "cut" and array.ndim:
        return array[rng.choice([slice(0), slice(1), slice(None, None, -1), slice(-3), slice(3, None)])]
    if kind == "text":
        return np.array(
            rng.choice(["", "{}", "[" * 5000, "x", '{"format": "nas_kmix/scores", "key": {}, "bad": {"-1": ""}}'])
        )
    return np.array([{}, Bomb(Path("bang"))], dtype=object)


def mutated_content(payload: bytes, suffix: str, rng: random.Random) -> bytes:
    """The file rewritten with one value changed and valid checksums."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # casts of what cannot be cast
        if suffix == ".json":
            return json.dumps(mutated_value(json.loads(payload), rng, HOSTILE)).encode("utf-8", "surrogatepass")
        if suffix == ".pt":
            others = (*HOSTILE, torch.zeros(3), torch.tensor(float("nan")), torch.zeros(2, 3, dtype=torch.complex64))
            torch.save(mutated_value(torch.load(io.BytesIO(payload), weights_only=True), rng, others), buffer)
            return buffer.getvalue()
        with np.load(io.BytesIO(payload)) as archive:
            arrays = {name: archive[name] for name in archive.files}
        name = rng.choice(list(arrays))
        arrays[name] = mutated_array(arrays[name], rng)
        np.savez(buffer, **arrays)
        return buffer.getvalue()


def check_mutations(reader: Reader, whole: Path, place: Path, numbers: range) -> None:
    shutil.copytree(whole, place)
    path = place / reader.file
    payload, expected = path.read_bytes(), reader.read(path)
    accepted = 0
    for number in numbers:
        rng = random.Random(f"{reader} {number}")
        in_values = path.suffix in (".json", ".pt", ".npz") and rng.random() < 0.4
        mutation = mutated_content(payload, path.suffix, rng) if in_values else mutated_bytes(payload, rng)
        path.write_bytes(mutation)
        start = time.monotonic()
        try:
            found = reader.read(path)
            accepted += 1
            if reader.checked and (not in_values or path.suffix == ".json"):
                assert found == expected, f"{reader}, mutation {number}: accepted with other content"
        except (ValueError, BadImageError) as error:
            assert str(path) in str(error), f"{reader}, mutation {number}: the file is not named: {error}"
            assert type(error) in (ValueError, BadImageError) or type(error).__module__.startswith("nas_kmix"), error
        assert time.monotonic() - start < SECONDS
    if reader.read is not read_records:  # which shows whatever can be read
        assert accepted < len(numbers), f"{reader} accepts whatever it is given"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("reader", READERS, ids=str)
def test_mutated_files_are_refused_by_name_or_are_what_they_say(reader, whole, tmp_path):
    check_mutations(reader, whole, tmp_path / "place", range(15))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("reader", READERS, ids=str)
def test_ten_thousand_mutations(reader, whole, tmp_path):
    check_mutations(reader, whole, tmp_path / "place", range(15, 15 + 10_000 // len(READERS)))


# -- what must not be run, unpacked or followed ------------------------------------------------------------------------


class Bomb:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def archive(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return buffer.getvalue()


def array_bytes(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def saved(state: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore")
def test_no_reader_runs_what_it_reads(whole, tmp_path):
    bang = tmp_path / "bang"
    call = f"Genotype(normal=open({str(bang)!r}, 'w'), normal_concat=[], reduce=[], reduce_concat=[])"
    objects = np.array([Bomb(bang)] * IMAGES, dtype=object)
    bombs = {
        ".pt": [saved({"format": FORMAT, "network": Bomb(bang)}), pickle.dumps({"format": Bomb(bang)})],
        ".npz": [
            archive({f"{name}.npy": array_bytes(objects) for name in ("train_images", "train_labels", "index", "meta")})
        ],
        ".json": [json.dumps({"normal": call}).encode(), call.encode()],
        ".txt": [call.encode(), f"x = {call}".encode(), f"{call}\nopen({str(bang)!r}, 'w')".encode()],
    }
    shutil.copytree(whole, tmp_path / "place")
    for reader in READERS:
        path = tmp_path / "place" / reader.file
        for bomb in bombs.get(path.suffix, []):
            path.write_bytes(bomb)
            with contextlib.suppress(ValueError):  # config.json is any JSON, and a damaged log is no error
                reader.read(path)
                assert reader.read in (read_records, files.read_json), reader
            assert not bang.exists(), reader


def test_the_bomb_would_go_off(tmp_path):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "bang"))).close()
    assert (tmp_path / "bang").exists()


@pytest.fixture(scope="module")
def zeros() -> bytes:
    """The .npy file of 300 MB of zeros, deflated to 300 kB."""
    shape = (100_000, 32, 32, 3)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    buffer, block = io.BytesIO(), bytes(np.prod(shape) // 100)
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        with file.open("train_images.npy", "w") as member:
            member.write(header.getvalue())
            for _ in range(100):
                member.write(block)
        file.writestr("train_labels.npy", array_bytes(np.zeros(shape[0], np.int64)))
    return buffer.getvalue()


@pytest.mark.parametrize("read", [files.read_npz, read_data, ScoreTable.load, files.load_tensors, load_classifier])
def test_a_zip_bomb_is_refused_before_it_is_unpacked(read, zeros, tmp_path, monkeypatch):
    (tmp_path / "bomb.npz").write_bytes(zeros)
    monkeypatch.setattr(zipfile.ZipFile, "open", lambda *arguments: pytest.fail("a member was opened"))
    with pytest.raises(ValueError, match=r"bomb\.npz"):
        read(tmp_path / "bomb.npz")
    monkeypatch.undo()
    if read is files.read_npz:
        with pytest.raises(ValueError, match=r"its [\d,]+ bytes would unpack to 3\d\d,\d\d\d,\d\d\d"):
            read(tmp_path / "bomb.npz")


def test_an_archive_that_says_too_little_unpacks_to_no_more_than_it_says(tmp_path):
    """The check reads the size in the directory, so that size must bind."""
    payload = bytearray(archive({"x.npy": array_bytes(np.zeros(10**6, np.uint8))}, zipfile.ZIP_DEFLATED))
    at = payload.rindex(b"PK\x01\x02") + 24  # the unpacked size in the directory
    payload[at : at + 4] = (1000).to_bytes(4, "little")
    (tmp_path / "x.npz").write_bytes(payload)
    with pytest.raises(ValueError, match=r"x\.npz is not a complete \.npz file"):
        files.read_npz(tmp_path / "x.npz")


def test_arrays_that_say_more_than_they_hold(tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (1 << 60,)})
    (tmp_path / "x.npz").write_bytes(archive({"x.npy": header.getvalue() + bytes(100)}))
    with pytest.raises(ValueError, match=r"x\.npz is not a complete \.npz file"):
        files.read_npz(tmp_path / "x.npz")


def test_deep_nesting_is_refused(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "place")
    for reader in (reader for reader in READERS if reader.file.endswith(("json", "txt"))):
        path = tmp_path / "place" / reader.file
        for deep in ("[" * 200_000, '{"a":' * 200_000, "(" * 5000):
            path.write_text(deep)
            if reader.read is not read_records:
                with pytest.raises(ValueError, match=re.escape(str(path))):
                    reader.read(path)
    with np.load(whole / "scores.npz") as scores:
        arrays = {name: scores[name] for name in scores.files}
    np.savez(tmp_path / "scores.npz", **{**arrays, "meta": np.array('{"a":' * 200_000)})
    with pytest.raises(ValueError, match=r"scores\.npz is not a scores\.npz of nas_kmix"):
        ScoreTable.load(tmp_path / "scores.npz")


@pytest.mark.parametrize(
    "stray", ["/etc/passwd", "../../../etc/passwd", "train/../../x.png", "..", "a\tb.png", "a\nb.png"]
)
def test_a_path_that_leaves_its_folder_is_refused(stray, whole, tmp_path):
    """They are printed and exported to other trainers, which open them."""
    document = json.loads((whole / "proxy.json").read_text())
    document["paths"][3] = stray
    del document["checksum"]
    (tmp_path / "proxy.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"proxy\.json is damaged: the path .* leaves the folder of the data"):
        ProxyManifest.load(tmp_path / "proxy.json")
    document["paths"][3] = "train/a..b/…x.png"
    (tmp_path / "proxy.json").write_text(json.dumps(document))
    assert ProxyManifest.load(tmp_path / "proxy.json").paths[3] == "train/a..b/…x.png"


def test_an_edited_manifest_is_told_from_a_damaged_one(whole, tmp_path):
    text = (whole / "proxy.json").read_text()
    (tmp_path / "proxy.json").write_text(text.replace('"ratio": 0.5', '"ratio": 0.7'))
    with pytest.raises(ValueError, match=r"proxy\.json is damaged: .* checksum"):
        ProxyManifest.load(tmp_path / "proxy.json")
    document = {**json.loads(text), "ratio": 0.7}
    del document["checksum"]
    (tmp_path / "proxy.json").write_text(json.dumps(document))
    assert ProxyManifest.load(tmp_path / "proxy.json").ratio == 0.7


def test_postscript_in_an_image_file_is_not_handed_to_its_interpreter(tmp_path, monkeypatch):
    def interpreted(*arguments, **options):
        pytest.fail("PostScript was run")

    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", interpreted)
    path = tmp_path / "x.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(x) run\n%%EOF\n")
    with pytest.raises(BadImageError, match=r"x\.png"):
        read_image(path)


def test_names_that_no_file_of_ours_could_hold_are_refused(tmp_path):
    """Before hours are spent on a proxy.json that cannot be written."""
    try:
        for name in ("a", os.fsdecode(b"\xff")):
            (tmp_path / "train" / name).mkdir(parents=True)
            Image.fromarray(draw_pixels(8, 8, 3)).save(tmp_path / "train" / name / "x.png")
    except OSError:
        pytest.skip("this file system has no such names")
    with pytest.raises(ValueError, match="a name that is not Unicode text; rename"):
        load_data(DataConfig(str(tmp_path)))
    shutil.rmtree(os.fsencode(tmp_path / "train" / os.fsdecode(b"\xff")))
    (tmp_path / "train" / "a" / "x.png").rename(tmp_path / "train" / "a" / "x\t.png")
    with pytest.raises(ValueError, match="a name with a control character; rename"):
        load_data(DataConfig(str(tmp_path)))
