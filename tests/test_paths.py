"""Paths as people type them, and where validation images come from."""

import json
import os
import shlex
import shutil
from pathlib import Path

import pytest
from conftest import draw_pixels
from PIL import Image

import search
import train_eval
from nas_kmix.analysis import robustness
from nas_kmix.engine.cli import with_home
from nas_kmix.engine.datasets import located

TRAIN = shlex.split(
    "--threads 1 --device cpu -j 0 --genotype PC_DARTS_cifar --channels 2 --layers 3 --no-auxiliary --epochs 1 "
    "--batch-size 8 --limit-steps 1 --image-size 32 --no-report"
)


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def test_home_is_expanded_in_every_path_of_a_command(home):
    config = search.parse(["--out=~/x", "--data-root=~/d", "--scorer=~/s.pt", "--export-list=~/l"])
    paths = config.out, config.input.data_root, config.given.scorer, config.export_list
    assert paths == tuple(home / name for name in ("x", "d", "s.pt", "l"))
    config = train_eval.parse(["--out=~/x", "--eval-only=~/e.pt", "--export=~/n.pt2"])
    assert (config.out, config.eval_only, config.export) == (home / "x", home / "e.pt", home / "n.pt2")
    config = with_home(robustness.Config((Path("~/a.pt"),), out=Path("~/r.csv")))
    assert (config.runs, config.out) == ((home / "a.pt",), home / "r.csv")
    assert search.parse(["--out", "plain"]).out.parts == ("plain",)
    with pytest.raises(ValueError, match="no such user's home"):
        search.parse(["--out=~nobody-of-that-name/x"])


def test_a_relative_data_folder_is_recorded_as_an_absolute_path(home, image_folder, tmp_path, monkeypatch, capsys):
    image_folder(splits=("train", "test"), per_class=6, sizes=((32, 32),))
    assert train_eval.main([*TRAIN, "--data", "images", "--out=~/run"]) == 0, capsys.readouterr()
    assert json.loads((home / "run/config.json").read_text())["input"]["data"] == str(tmp_path / "images")
    assert not (tmp_path / "~").exists()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert robustness.main([str(home / "run/last.pt"), "--attack", "fgsm", "--images", "4"]) == 0
    shutil.move(tmp_path / "images", tmp_path / "moved")
    capsys.readouterr()
    assert robustness.main([str(home / "run/last.pt"), "--attack", "fgsm"]) == 2
    assert f"{tmp_path / 'images'}: there is no such folder" in capsys.readouterr().err


def test_names_of_sets_are_no_paths(home):
    assert [located(name) for name in ("digits", "cifar10", "cifar100")] == ["digits", "cifar10", "cifar100"]
    assert located("~/a") == str(home / "a") and located("a/../b") == str(home.parent / "b")


@pytest.mark.parametrize("name", ["valid", "validation", "Val", "dev"])
def test_a_look_alike_of_val_is_named_where_images_are_held_out(name, image_folder, tmp_path, capsys):
    folder = image_folder(splits=("train", "val"), per_class=6, sizes=((32, 32),))
    assert train_eval.main([*TRAIN, "--data", str(folder), "--out", str(tmp_path / "a")]) == 0
    assert "validation: 12 images of the split val" in "".join(capsys.readouterr())
    (folder / "val").rename(folder / name)
    assert train_eval.main([*TRAIN, "--data", str(folder), "--out", str(tmp_path / "b"), "--val-share", ".34"]) == 0
    said = "".join(capsys.readouterr())
    assert "images held out of the training images (--val-share 0.34)" in said
    assert f"{folder / name} is not read, rename it to val if it is meant" in said


@pytest.mark.parametrize("layout", ["test/1.png", "test/unknown/1.png", "test/notes.txt"])
def test_an_unusable_test_folder_does_not_forbid_training(layout, image_folder, tmp_path, capsys):
    folder = image_folder(splits=("train",), per_class=6, sizes=((32, 32),))
    (folder / layout).parent.mkdir(parents=True)
    if layout.endswith("png"):
        Image.fromarray(draw_pixels(32, 32, 3)).save(folder / layout)
    else:
        (folder / layout).write_text("none yet")
    out = tmp_path / "run"
    assert train_eval.main([*TRAIN, "--data", str(folder), "--out", str(out), "--val-share", ".34"]) == 0
    said = "".join(capsys.readouterr())
    assert f"warning: no test images: {folder / 'test'}" in said and "val_accuracy" in said
    assert train_eval.main(["--data", str(folder), "--eval-only", str(out / "last.pt"), "--device", "cpu"]) == 2
    complained = capsys.readouterr().err
    assert str(folder / "test") in complained or "e.g. 'unknown'" in complained


def test_a_flat_val_is_refused_for_what_it_is(image_folder, tmp_path, capsys):
    folder = image_folder(splits=("train",), per_class=6, sizes=((32, 32),))
    (folder / "val").mkdir()
    Image.fromarray(draw_pixels(32, 32, 3)).save(folder / "val/1.png")
    assert train_eval.main([*TRAIN, "--data", str(folder), "--out", str(tmp_path / "run")]) == 2
    assert f"{folder / 'val'} has images but not in class folders, e.g. 1.png" in capsys.readouterr().err


def test_a_name_that_is_no_unicode_is_refused_before_anything_is_written(home, tmp_path, image_folder, capsys):
    """Records and reports could not tell of it."""
    folder = image_folder(per_class=6, sizes=((32, 32),))
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    for argv in (["--data", str(folder), "--out", odd], ["--data", odd, "--out", str(tmp_path / "run")]):
        assert train_eval.main([*TRAIN, *argv]) == search.main(argv) == 2
        assert capsys.readouterr().err.count("is not Unicode text; rename") == 2
    assert not os.path.exists(odd) and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("images/train/ant", "has no subfolder train"),
        ("images/train/ant/0.png", "this is no folder"),
        ("images.zip", "there is no such folder"),
    ],
)
def test_what_is_near_the_data_folder_is_told_apart(place, said, image_folder, tmp_path, capsys):
    image_folder(per_class=6, sizes=((32, 32),))
    assert search.main(["--data", str(tmp_path / place), "--out", str(tmp_path / "run")]) == 2
    assert said in capsys.readouterr().err


def test_a_val_split_that_lacks_classes_says_so(image_folder, tmp_path, capsys):
    folder = image_folder(splits=("train", "val"), per_class=6, sizes=((32, 32),))
    shutil.rmtree(folder / "val/ant")
    assert train_eval.main([*TRAIN, "--data", str(folder), "--out", str(tmp_path / "run")]) == 0
    assert "validation: 6 images of the split val, which lacks 1 of the 2 classes" in capsys.readouterr().out
