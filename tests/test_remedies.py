"""What may be removed is a run's own file. Somebody else's is kept, and no advice endangers it."""

import contextlib
import io
import shlex

import numpy as np
import pytest
import torch
from conftest import draw_pixels
from processes import TINY

import search
import train_eval
from nas_kmix.analysis import landscape
from nas_kmix.engine import files

TRAIN = shlex.split(
    "--threads 1 --device cpu -j 0 --genotype PC_DARTS_cifar --channels 2 --layers 3 --no-auxiliary --epochs 1 "
    "--batch-size 8 --image-size 32 --val-share .3 --no-report"
)
COMMANDS = {"search": (search.main, TINY), "train_eval": (train_eval.main, TRAIN)}
DAMAGES = {"none": b"", "text": b"my notes", "pickle": b"\x80\x02}q\x00."}


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "set.npz"
    np.savez(path, train_images=draw_pixels(24, 16, 16, 3), train_labels=np.arange(24) % 3)
    return path


def ended(main, *argv):
    complained = io.StringIO()
    with contextlib.redirect_stderr(complained), contextlib.redirect_stdout(io.StringIO()):
        return main([*map(str, argv)]), complained.getvalue()


FOREIGN = [
    ("search", "scorer.pt"),
    ("search", "scores.npz"),
    ("search", "proxy.json"),
    ("search", "genotype.json"),
    ("search", "checkpoints/scorer.pt"),
    ("search", "checkpoints/search.pt"),
    ("train_eval", "last.pt"),
    ("search", "config.json"),
    ("train_eval", "config.json"),
    ("train_eval", "metrics.csv"),
    ("train_eval", "result.json"),
]


@pytest.mark.parametrize("content", DAMAGES)
@pytest.mark.parametrize(("name", "file"), FOREIGN)
def test_a_file_of_another_program_in_the_run_folder_is_kept(name, file, content, data, tmp_path):
    """Whatever its name, neither the command nor --fresh touches it, and the advice is another folder."""
    main, flags = COMMANDS[name]
    path = tmp_path / "project" / file
    path.parent.mkdir(parents=True)
    path.write_bytes(DAMAGES[content])
    argv = [*flags, "--data", data, "--out", tmp_path / "project"]
    for more in ([], ["--fresh"]):
        code, said = ended(main, *argv, *more)
        assert code == 2 and said.count("\n") == 1 and f"holds {file}, but" in said, said
        assert said.endswith("Choose another folder, so that it is kept.\n") and "--fresh" not in said
        assert path.read_bytes() == DAMAGES[content]


def test_a_checkpoint_of_another_program_is_kept(data, tmp_path):
    """Such as other trainers call last.pt, too."""
    path = tmp_path / "weights" / "last.pt"
    path.parent.mkdir()
    torch.save({"epoch": 3, "model": {}}, path)
    before = path.read_bytes()
    for more in ([], ["--fresh"]):
        code, said = ended(train_eval.main, *TRAIN, "--data", data, "--out", path.parent, *more)
        assert code == 2 and "holds last.pt" in said and path.read_bytes() == before


def test_a_damaged_file_of_a_run_may_be_removed(data, tmp_path):
    out = tmp_path / "run"
    assert ended(train_eval.main, *TRAIN, "--data", data, "--out", out)[0] == 0
    (out / "last.pt").write_bytes(b"")
    code, said = ended(train_eval.main, *TRAIN, "--data", data, "--out", out)
    assert code == 2 and files.REMOVE_OURS in said
    assert ended(train_eval.main, *TRAIN, "--data", data, "--out", out, "--fresh")[0] == 0


@pytest.mark.parametrize("content", DAMAGES)
@pytest.mark.parametrize("flag", ["--scorer", "--scores", "--proxy", "--data", "--genotype", "--eval-only"])
def test_a_file_that_was_given_is_never_to_be_removed(flag, content, data, tmp_path):
    path = tmp_path / f"mine{'.npz' if flag in ('--scores', '--data') else ''}"
    path.write_bytes(DAMAGES[content])
    if flag in ("--genotype", "--eval-only"):
        main, flags = train_eval.main, ["--device", "cpu", "-j", "0", "--image-size", "32"]
    else:
        main, flags = search.main, TINY
    source = [] if flag == "--data" else ["--data", data]
    code, said = ended(main, *flags, *source, "--out", tmp_path / "run", flag, path)
    assert code == 2 and said.count("\n") == 1 and str(path) in said, said
    assert not any(word in said for word in ("remove", "delete", "--fresh")), said
    assert not (tmp_path / "run").exists()


def test_a_landscape_goes_over_no_foreign_file(data, tmp_path):
    assert ended(train_eval.main, *TRAIN, "--data", data, "--out", tmp_path / "net")[0] == 0
    (tmp_path / "out").mkdir()
    np.savez(tmp_path / "out" / "net.npz", mine=np.arange(3))
    before = (tmp_path / "out" / "net.npz").read_bytes()
    argv = [tmp_path / "net", "--out", tmp_path / "out", "--split", "train", "--device", "cpu"]
    for more in ([], ["--fresh"]):
        code, said = ended(landscape.main, *argv, *more)
        assert code == 2 and "Choose another folder, so that it is kept." in said and "remove" not in said
        assert (tmp_path / "out" / "net.npz").read_bytes() == before


def test_memory_is_no_fault_of_a_file(tmp_path, monkeypatch):
    np.savez(tmp_path / "set.npz", train_images=draw_pixels(4, 8, 8, 3))

    def full(*_, **__):
        raise MemoryError("Unable to allocate 3 TiB")

    monkeypatch.setattr(np.lib.format, "read_array", full)
    with pytest.raises(OSError, match=r"set\.npz does not fit into memory"):
        files.read_npz(tmp_path / "set.npz")
    torch.save({}, tmp_path / "a.pt")
    monkeypatch.setattr(torch, "load", full)
    with pytest.raises(MemoryError):
        files.load_tensors(tmp_path / "a.pt")
    with pytest.raises(torch.OutOfMemoryError), files.damage_named(tmp_path / "a.pt", "remove it"):
        raise torch.OutOfMemoryError("CUDA out of memory")
