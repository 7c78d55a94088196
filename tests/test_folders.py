"""What belongs to an image folder, tried with what really lies in such folders."""

import os
import shutil

import numpy as np
import pytest
from conftest import draw_pixels
from PIL import Image

from nas_kmix.engine.data import DataConfig, load_data
from nas_kmix.engine.datasets import open_source
from nas_kmix.engine.folders import list_images


def image(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(draw_pixels(8, 8, 3, seed=seed)).save(path, format="PNG")
    return path


def paths(folder, split="train"):
    return open_source(str(folder), folder, split).paths


@pytest.fixture
def folder(image_folder):
    """Two classes of four images."""
    return image_folder()


@pytest.mark.parametrize(
    "place",
    [
        "train/ant/._0.png",
        "train/ant/.ipynb_checkpoints/0-checkpoint.png",
        "train/ant/sub/.hidden/0.png",
        "train/ant/__MACOSX/0.png",
        "train/__MACOSX/ant/0.png",
        "train/.ipynb_checkpoints/0.png",
        "train/bee/@eaDir/0.png/thumb.png",
    ],
)
def test_what_is_hidden_or_of_the_system_is_ignored_at_every_level(place, folder, capsys):
    before = paths(folder), open_source(str(folder), folder, "train").class_names
    image(folder / place)
    source = open_source(str(folder), folder, "train")
    assert (source.paths, source.class_names, source.left_out) == (*before, "")


def test_a_folder_below_a_hidden_one_is_read(folder, tmp_path):
    shutil.move(folder, tmp_path / ".cache")
    assert len(paths(tmp_path / ".cache")) == 8


def test_what_is_left_out_is_counted_and_said(folder, capsys):
    for i, name in enumerate(["a.gif", "b.gif", "c.jfif", "d.PGM", "e", "sub/f.gif"]):
        image(folder / "train/ant" / name, seed=i)
    image(folder / "train/loose.png")
    data = load_data(DataConfig(str(folder)))
    assert len(data) == 8
    said = capsys.readouterr()
    line = "left out 7 files: 3 .gif, 1 .jfif, 1 .pgm, 1 without suffix, 1 images beside the class folders"
    assert sorted(line.split(": ")[1].split(", ")) == sorted(
        (said.out + said.err).split("left out 7 files: ")[1].splitlines()[0].split(", ")
    )


def test_only_regular_files_are_images(folder):
    """A pipe called .png would hang whoever opens it."""
    os.mkfifo(folder / "train/ant/pipe.png")
    (folder / "train/ant/link.png").symlink_to(folder / "nowhere.png")
    (folder / "train/ant/folder.png").mkdir()
    image(folder / "train/ant/folder.png/inside.png")
    source = open_source(str(folder), folder, "train")
    assert len(source.paths) == 10 and "train/ant/folder.png/inside.png" in source.paths
    assert "train/ant/link.png" in source.paths  # which is named as a file that cannot be read
    assert source.left_out == "1 file: 1 special files"
    assert len(source.identity()) == 32


def test_linked_folders_and_files_are_followed_but_no_loops(folder, tmp_path):
    image(tmp_path / "elsewhere/deep/a.png")
    image(tmp_path / "single.png")
    (folder / "train/cow").symlink_to(tmp_path / "elsewhere")
    (folder / "train/ant/more").symlink_to(tmp_path / "elsewhere/deep")
    (folder / "train/ant/single.png").symlink_to(tmp_path / "single.png")
    (folder / "train/ant/loop").symlink_to(folder / "train")
    (folder / "train/bee/self").symlink_to(folder / "train/bee")
    (tmp_path / "elsewhere/up").symlink_to(tmp_path)
    found = paths(folder)
    assert {"train/cow/deep/a.png", "train/ant/more/a.png", "train/ant/single.png"} <= {*found}
    assert len(found) < 200 and not [path for path in found if path.startswith("train/bee/self")]
    assert list(found) == sorted(found, key=lambda path: path.split("/"))


def test_labels_skip_the_classes_that_a_split_lacks(image_folder):
    folder = image_folder(classes=("ant", "bee", "cow"), per_class=2, splits=("train", "val"))
    shutil.rmtree(folder / "val/bee")
    source = open_source(str(folder), folder, "val")
    assert source.labels.tolist() == [0, 0, 2, 2] and source.class_names == ("ant", "bee", "cow")


def test_a_listing_is_that_of_a_plain_search(folder):
    """Against pathlib, where nothing is odd."""
    image(folder / "train/bee/a/b/c.JPG")
    found = list_images(folder, ["train/ant", "train/bee"])
    expected = [sorted(p for p in (folder / "train" / c).rglob("*") if p.is_file()) for c in ("ant", "bee")]
    assert list(found.paths) == [p.relative_to(folder).as_posix() for group in expected for p in group]
    assert np.array_equal(found.labels, np.repeat([0, 1], [len(group) for group in expected]))


@pytest.mark.parametrize("name", ["Train", "training"])
def test_a_train_folder_of_another_name_is_named(name, folder):
    (folder / "train").rename(folder / name)
    with pytest.raises(ValueError, match=rf"no subfolder train; .*{folder / name} is not read, rename it to train"):
        open_source(str(folder), folder, "train")


def test_a_flat_split_is_told_apart_from_an_empty_one(folder):
    image(folder / "val/one.png")
    with pytest.raises(ValueError, match=r"val has images but not in class folders, e.g. one.png"):
        open_source(str(folder), folder, "val")
    (folder / "val/one.png").unlink()
    with pytest.raises(ValueError, match=r"val holds no images|val has no class folders"):
        open_source(str(folder), folder, "val")
