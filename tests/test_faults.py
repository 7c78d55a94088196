"""What may go wrong with a machine or a run folder: a sentence, the documented exit code, and the rerun is untouched.

Writes fail in this process, at every single call of a whole run; kills need processes, as in test_kill.py.
"""

import builtins
import contextlib
import errno
import io
import itertools
import json
import os
import random
import shlex
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import draw_pixels
from processes import (
    assert_equal,
    assert_whole,
    command,
    completed,
    ended,
    has_reached,
    start,
    wait_for,
)

import search
import train_eval

SEARCH = shlex.split(
    "--threads 1 --device cpu -j 0 --scorer.epochs 1 --scorer.batch-size 24 --scoring.draws 2 --ratio .5 --channels 2 "
    "--partial 2 --layers 3 --rest-steps 1 --arch-steps 2 --record-every 1 --batch-size 16 --no-report --no-finals"
)
TRAIN = shlex.split(
    "--threads 1 --device cpu -j 0 --genotype PC_DARTS_cifar --channels 2 --layers 3 --no-auxiliary --epochs 2 "
    "--batch-size 16 --val-share .3 --image-size 32 --no-report"
)


@dataclass(frozen=True)
class Program:
    """A command line and which of its files do not depend on clocks and processes."""

    main: Callable[[list[str]], int]
    flags: list[str]
    results: tuple[str, ...]

    def __call__(self, data: Path, out: Path, *more: str) -> tuple[int, str, str]:
        """Exit code, standard output, standard error. An exception that is not caught fails the test: a traceback."""
        said, complained = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(complained):
            code = self.main(["--data", str(data), "--out", str(out), *self.flags, *more])
        return code, said.getvalue(), complained.getvalue()

    def outcome(self, folder: Path) -> dict[str, object]:
        """The results to compare; nothing half-written may lie beside them."""
        assert not list(folder.rglob("*.part")) and not list(folder.rglob("*.tmp"))
        assert not (folder / "checkpoints").exists()
        return {name: content(folder / name) for name in self.results}


def content(path: Path) -> object:
    """What a file says, without what a checkpoint says of the moment it was written."""
    if path.suffix != ".pt":
        return path.read_bytes()
    state = torch.load(path, weights_only=True)
    return {name: tensor.numpy().tobytes() for name, tensor in state["model"].items()}


HISTORY = ("genotypes.jsonl", "alphas.npz")
PROGRAMS = {
    "search": Program(
        search.main,
        SEARCH,
        ("scorer.pt", "scores.npz", "proxy.json", "candidates.json", "genotype.json", *HISTORY, "metrics.csv"),
    ),
    "train_eval": Program(train_eval.main, TRAIN, ("last.pt", "best.pt", "metrics.csv")),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("small") / "small.npz"
    np.savez(path, train_images=draw_pixels(48, 16, 16, 3), train_labels=np.arange(48) % 3)
    return path


@pytest.fixture(scope="module")
def untouched(data, tmp_path_factory) -> dict[str, Path]:
    """An undisturbed run of each program, read-only."""
    folders = {}
    for name, program in PROGRAMS.items():
        folders[name] = tmp_path_factory.mktemp("untouched") / name
        code, _, complained = program(data, folders[name])
        assert code == 0, complained
    return folders


def refused(end: tuple[int, str, str], code: int, *words: object) -> None:
    assert end[0] == code, end
    assert end[2].startswith("error: ") and end[2].count("\n") == 1, end[2]
    for word in words:
        assert str(word) in end[2]


# -- writes ------------------------------------------------------------------------------------------------------------


class FullDisk:
    """Lets writes below a folder fail: every one from the `first` on, counted from 1, or only that one.

    A write is a file opened for writing, bytes given to it, fsync, a rename, or a folder made. `count` goes on.
    """

    def __init__(self, folder: Path, first: int | None, once: bool):
        self.folder, self.first, self.once, self.count = folder, first, once, 0
        self.failed: str | None = None

    def write(self, path: object) -> None:
        if not str(path).startswith(str(self.folder)):
            return
        self.count += 1
        if self.first is not None and (self.count == self.first or (self.count > self.first and not self.once)):
            self.failed = str(path)
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

    @contextlib.contextmanager
    def installed(self) -> Iterator["FullDisk"]:
        disk, original = self, {name: getattr(os, name) for name in ("fsync", "replace", "mkdir")}
        open_file, paths = builtins.open, {}

        class Raw(io.FileIO):
            def write(self, payload):
                try:
                    disk.write(self.name)
                except OSError:
                    super().write(bytes(payload)[: len(payload) // 2])
                    raise
                return super().write(payload)

        def opening(path, mode="r", buffering=-1, encoding=None, errors=None, newline=None):
            if isinstance(path, int) or not set(mode) & set("wax") or not str(path).startswith(str(disk.folder)):
                return open_file(path, mode, buffering, encoding, errors, newline)
            disk.write(path)
            raw = Raw(str(path), mode.replace("b", "").replace("t", ""))
            paths[raw.fileno()] = path
            file = io.BufferedWriter(raw)
            return file if "b" in mode else io.TextIOWrapper(file, encoding=encoding, newline=newline)

        def failing(name):
            def call(target, *arguments, **options):
                if name != "mkdir" or not os.path.isdir(target):
                    disk.write(paths.get(target, target))
                return original[name](target, *arguments, **options)

            return call

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(builtins, "open", opening)
            for name in original:
                patch.setattr(os, name, failing(name))
            yield self


def fail_and_rerun(program: Program, data: Path, untouched: Path, folder: Path, first: int, once: bool) -> bool:
    """Whether there was a write of that number. The run ends with a sentence, or warns that a copy is missing."""
    with FullDisk(folder, first, once).installed() as disk:
        code, said, complained = program(data, folder, "--report")
    assert code in (0, 1), complained
    if code == 1:
        assert complained.startswith("error: ") and complained.count("\n") == 1 and "No space left" in complained
    elif disk.count >= first:
        assert "warning: " in said and "No space left" in said, f"the failure at {disk.failed} went unsaid"
    assert "Traceback" not in complained and (not folder.exists() or assert_whole(folder) is None)
    code, _, complained = program(data, folder)
    assert code == 0, complained
    assert program.outcome(folder) == program.outcome(untouched)
    shutil.rmtree(folder)
    return disk.count >= first


@pytest.mark.parametrize(("name", "step"), [pytest.param("search", 29, marks=pytest.mark.slow), ("train_eval", 29)])
def test_some_writes_fail(name, step, data, untouched, tmp_path):
    numbers = itertools.takewhile(
        lambda first: fail_and_rerun(
            PROGRAMS[name], data, untouched[name], tmp_path / "run", first, once=first % 2 == 0
        ),
        itertools.count(1, step),
    )
    assert len(list(numbers)) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("once", [True, False])
@pytest.mark.parametrize("name", PROGRAMS)
def test_every_write_fails(name, once, data, untouched, tmp_path):
    counted = 0
    while fail_and_rerun(PROGRAMS[name], data, untouched[name], tmp_path / "run", counted + 1, once):
        counted += 1
    print(f"{name}, {'once' if once else 'from then on'}: {counted} faults")
    assert counted >= 40


# -- the folder --------------------------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_written_to_is_a_sentence(data, tmp_path):
    """Root may write everywhere; other users also try a folder without write permission."""
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "odd" / ".lock").mkdir(parents=True)
    places = [tmp_path / "file" / "run", tmp_path / "odd"]
    if os.geteuid() != 0:
        (tmp_path / "locked").mkdir(mode=0o500)
        places.append(tmp_path / "locked")
    for program in PROGRAMS.values():
        for place in places:
            refused(program(data, place), 1, f"--out {place} cannot be written to: ")
        for more in ((), ("--dry-run",)):
            refused(program(data, tmp_path / "file", *more), 2, f"--out {tmp_path / 'file'} is no folder; ")
    assert (tmp_path / "file").read_text() == "no folder" and not list((tmp_path / "odd" / ".lock").iterdir())


@pytest.fixture
def copy(untouched, tmp_path) -> Path:
    """A finished search, to be damaged."""
    return shutil.copytree(untouched["search"], tmp_path / "copy")


def test_what_is_missing_is_made_again(copy, data, untouched):
    """Single files, and all files of a stage and its successors; a history goes only with its search."""
    program = PROGRAMS["search"]
    later = ("scores.npz", "proxy.json", "candidates.json", "genotype.json")
    for missing in [("scorer.pt", "cost.json"), ("scores.npz", "env.json"), ("proxy.json", "config.json"), later]:
        for name in missing:
            (copy / name).unlink()
        code, _, complained = program(data, copy)
        assert code == 0 and all((copy / name).exists() for name in missing), complained
        assert program.outcome(copy) == program.outcome(untouched["search"]), missing
    for name in HISTORY:
        (copy / name).unlink()
    said = program(data, copy)[1]
    assert all(f"warning: {copy / name} is gone; remove candidates.json" in said for name in HISTORY)
    (copy / "candidates.json").unlink()
    assert program(data, copy)[0] == 0
    assert program.outcome(copy) == program.outcome(untouched["search"])


@pytest.mark.parametrize("name", ["scorer.pt", "scores.npz", "proxy.json", "candidates.json", "genotype.json"])
def test_a_damaged_result_is_refused_and_its_removal_helps(name, copy, data, untouched):
    """A bit in the middle, the end, another file in its place, a folder in its place."""
    whole, path = (copy / name).read_bytes(), copy / name
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    damages = [whole[:-20], (copy / "env.json").read_bytes()]
    for damage in (
        damages if name in ("candidates.json", "genotype.json") else [bytes(flipped), *damages]
    ):  # no checksum
        path.write_bytes(damage)
        refused(PROGRAMS["search"](data, copy), 2, path)
        assert path.read_bytes() == damage
    path.unlink()
    path.mkdir()
    refused(PROGRAMS["search"](data, copy), 2, path)
    path.rmdir()
    assert PROGRAMS["search"](data, copy)[0] == 0
    assert PROGRAMS["search"].outcome(copy) == PROGRAMS["search"].outcome(untouched["search"])


def test_damaged_records_and_foreign_files_are_no_obstacle(copy, data, untouched):
    for name in ("cost.json", "config.json", "env.json", "report.html", ".lock"):
        (copy / name).write_bytes(b"\xff{[")
    foreign = {
        "notes.txt": b"mine",
        "seed-0/notes.txt": b"",
        "x.npz": b"PK",
        "checkpoints.pt": b"",
        "a/b/proxy.json": b"{",
    }
    for name, payload in foreign.items():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(payload)
    assert PROGRAMS["search"](data, copy)[0] == 0
    assert PROGRAMS["search"].outcome(copy) == PROGRAMS["search"].outcome(untouched["search"])
    assert {name: (copy / name).read_bytes() for name in foreign} == foreign


# -- clocks, data ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_clock_that_goes_back_changes_no_result(name, data, untouched, tmp_path, monkeypatch):
    seconds = itertools.count(10**9, -1000)
    monkeypatch.setattr(time, "time", lambda: float(next(seconds)))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(seconds)))
    code, _, complained = PROGRAMS[name](data, tmp_path / "run")
    assert code == 0, complained
    assert PROGRAMS[name].outcome(tmp_path / "run") == PROGRAMS[name].outcome(untouched[name])
    bill = json.loads((tmp_path / "run" / "cost.json").read_text())["stages"].values()
    assert all(stage["wall_s"] >= 0 for stage in bill)


def test_data_that_change_between_the_stages_are_refused(data, untouched, tmp_path):
    """Pixels of an archive, and files of a folder that are longer, gone or new."""
    program, changing, folder = PROGRAMS["search"], shutil.copy(data, tmp_path / "small.npz"), tmp_path / "run"
    for stage in ("scorer", "scores", "proxy"):
        assert program(changing, folder, "--stop-after", stage)[0] == 0
        images = draw_pixels(48, 16, 16, 3)
        images[7, 3, 3, 1] ^= 1
        np.savez(changing, train_images=images, train_labels=np.arange(48) % 3)
        before = {path: path.read_bytes() for path in folder.iterdir()}
        refused(program(changing, folder), 2, "data was", "--fresh")
        assert {path: path.read_bytes() for path in folder.iterdir()} == before
        shutil.copy(data, changing)
    assert program(changing, folder)[0] == 0
    assert program.outcome(folder) == program.outcome(untouched["search"])


# -- processes ---------------------------------------------------------------------------------------------------------


def test_two_runs_in_one_folder_and_two_interrupts(server, npz, alone, tmp_path):
    """The second process is refused and disturbs nothing; the second Ctrl-C does not wait."""
    folder, log, other_log = tmp_path / "run", tmp_path / "log", tmp_path / "other"
    process = start(server, command(npz, folder), log)
    wait_for(process, lambda: has_reached("scorer", log, folder))
    assert ended(start(server, command(npz, folder), other_log)) == 2
    said = other_log.read_text()
    assert f"error: --out {folder} is in use by another run" in said and "Traceback" not in said
    os.kill(process.pid, signal.SIGINT)
    os.kill(process.pid, signal.SIGINT)
    code = ended(process)
    assert code in (0, 130) and "Traceback" not in log.read_text()
    assert_whole(folder)
    completed(server, command(npz, folder), log)
    assert_equal(folder, alone)


@pytest.mark.slow
def test_fifty_kills(server, npz, alone, tmp_path):
    """At random moments of a run, from its first line to its last; one that finishes is compared and started again."""
    rng, folder, log = random.Random(0), tmp_path / "run", tmp_path / "log"
    span, kills, ends = 4.0, 0, 0
    while kills < 50 or folder.exists():
        process = start(server, command(npz, folder), log)
        if kills < 50:
            moment = time.monotonic() + rng.uniform(0.0, span)
            wait_for(process, lambda moment=moment: time.monotonic() > moment)
            process.kill()
        code = ended(process)
        assert code in (0, -signal.SIGKILL), log.read_text()
        kills += code != 0
        span *= 1.1 if code else 0.8  # however fast the machine is now, most processes are killed at work
        if code == 0:
            assert_equal(folder, alone)
            shutil.rmtree(folder)
            ends += 1
        elif folder.exists():
            assert_whole(folder)
    print(f"{kills} kills, {ends} whole runs")
