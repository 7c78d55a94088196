"""Images as people have them: flat folders, Tiny-ImageNet, MedMNIST, Hugging Face; each through both commands."""

import contextlib
import io
import json
import shlex
import shutil
import sys
import unicodedata
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import draw_pixels
from PIL import Image

import search
import train_eval
from nas_kmix.analysis.classifiers import load_classifier
from nas_kmix.analysis.runs import InputConfig, load_images
from nas_kmix.commands import evaluate
from nas_kmix.engine import hugging_face, named_sets
from nas_kmix.engine.data import DataConfig, load_data
from nas_kmix.engine.datasets import is_flat, located, open_source, splits_of
from nas_kmix.engine.named_sets import MEDMNIST, survives_mirroring
from nas_kmix.engine.sources import BadImageError, Source
from nas_kmix.engine.undivided import divided
from nas_kmix.manifest import ProxyManifest

SEARCH = shlex.split(
    "--no-report --no-finals --threads 1 --device cpu -j 0 --scorer.epochs 1 --scoring.draws 4 --ratio .5 --channels 2 "
    "--partial 2 --layers 3 --rest-steps 1 --arch-steps 1 --batch-size 8"
)
TRAIN = shlex.split("--no-report --threads 1 --device cpu -j 0 --channels 2 --layers 3 --epochs 1 --no-auxiliary")


def write(folder, images, names):
    for pixels, name in zip(images, names, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / name)
    return folder


@pytest.fixture
def flat(tmp_path):
    """30 images of three classes without splits; one class is small."""
    names = [f"{label}/{i}.png" for label, count in (("ant", 15), ("bee", 12), ("cat", 3)) for i in range(count)]
    return write(tmp_path / "insects", draw_pixels(30, 16, 16, 3), names)


@pytest.fixture
def tiny_imagenet(tmp_path):
    """As Tiny-ImageNet is unpacked: boxes beside the images of a class, annotated val images, test images alone."""
    folder, classes = tmp_path / "tiny", ("n01443537", "n02123045")
    images = draw_pixels(26, 16, 16, 3)
    train = [f"train/{label}/images/{label}_{i}.JPEG" for label in classes for i in range(8)]
    val = [f"val/images/val_{i}.JPEG" for i in range(6)]
    write(folder, images, [*train, *val, *(f"test/images/test_{i}.JPEG" for i in range(4))])
    for label in classes:
        (folder / "train" / label / f"{label}_boxes.txt").write_text("n_0.JPEG\t0\t0\t9\t9\n")
    lines = [f"val_{i}.JPEG\t{classes[i % 2]}\t0\t0\t9\t9\n" for i in range(6)]
    (folder / "val" / "val_annotations.txt").write_text("".join(lines))
    return folder


def through_both(data, tmp_path):
    """Search on the data and train the genotype by the command that the search ends with; what both said."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert search.main([*SEARCH, "--data", data, "--out", str(tmp_path / "run")]) == 0
    argv = shlex.split(said.getvalue().splitlines()[-1].partition("-m nas_kmix train ")[2])
    assert argv
    with contextlib.redirect_stdout(said):
        assert train_eval.main([*argv, *TRAIN]) == 0
    return said.getvalue(), json.loads(said.getvalue().splitlines()[-1])


# -- a folder without splits -------------------------------------------------------------------------------------------


def test_a_flat_folder_is_divided_by_class_and_says_so(flat, tmp_path):
    said, result = through_both(str(flat), tmp_path)
    assert "insects: 24 training images of 3 classes, 16 px, mirrored at random, resident on cpu" in said
    note = "insects has no splits: 6 of its 30 images, 20 % of each class drawn by --split-seed 0, are for testing"
    assert said.count(note) == 2 and "test_accuracy" in result["last"]


def test_the_division_is_stratified_and_depends_on_the_seed_alone(flat):
    def paths(split, seed=0):
        source = open_source(str(flat), flat, split, split_seed=seed)
        assert np.array_equal(source.labels, [source.class_names.index(path[:3]) for path in source.paths])
        return source.paths

    train, test = paths("train"), paths("test")
    assert [sum(path.startswith(name) for path in test) for name in ("ant", "bee", "cat")] == [3, 2, 1]
    assert sorted((*train, *test)) == sorted(path.relative_to(flat).as_posix() for path in flat.rglob("*.png"))
    assert paths("test") == test and paths("test", 1) != test
    (flat / "dog").mkdir()
    Image.fromarray(draw_pixels(16, 16, 3)).save(flat / "dog" / "0.png")
    assert "dog/0.png" in paths("train"), "the only image of a class is for training"
    assert [path for path in paths("test") if "dog" not in path] == list(test), "other classes keep their images"


def test_other_images_hardly_move_those_that_were_there(flat):
    def paths(split):
        return set(open_source(str(flat), flat, split).paths)

    train, test = paths("train"), paths("test")
    write(flat, draw_pixels(6, 16, 16, 3, seed=1), ["ant/0a.png", *(f"aardvark/{i}.png" for i in range(5))])
    assert not paths("test") & train and paths("test") != test
    (flat / min(train)).unlink()
    assert not paths("test") & train
    write(flat, draw_pixels(10, 16, 16, 3, seed=1), [f"ant/new {i}.png" for i in range(10)])  # 25 of them, 5 to test on
    assert len(paths("test") & train) <= 2


def test_a_fifth_of_the_rows_of_each_class_is_for_testing_and_the_seed_draws_it():
    labels = np.arange(100) % 4
    rows = Source("rows", "train", labels, tuple("abcd"), arrays=np.arange(100).reshape(100, 1, 1, 1))

    def of(split, seed):
        return divided(rows, [str(row) for row in range(100)], split, seed, "rows").arrays.ravel()

    assert np.bincount(labels[of("test", 0)]).tolist() == [5] * 4
    assert sorted([*of("train", 0), *of("test", 0)]) == list(range(100))
    often = np.bincount(np.concatenate([of("test", seed) for seed in range(500)]), minlength=100)
    assert abs(often - 100).max() < 45, "binomial with n = 500 and p = .2, five standard deviations"


def test_class_folders_whose_names_look_alike_are_refused(flat):
    for form in ("NFC", "NFD"):
        write(flat, draw_pixels(1, 16, 16, 3), [unicodedata.normalize(form, "b\u00e9e/0.png")])
    with pytest.raises(ValueError, match="whose names look alike; merge or rename one"):
        open_source(str(flat), flat, "train")


def test_splits_whose_class_names_have_accents_in_either_form_belong_together(tmp_path):
    for form, split in (("NFD", "train"), ("NFC", "val")):
        names = [
            unicodedata.normalize(form, f"{split}/{label}/{i}.png") for label in ("b\u00e9e", "cat") for i in (0, 1)
        ]
        write(tmp_path, draw_pixels(4, 16, 16, 3), names)
    train, val = (load_data(DataConfig(data=str(tmp_path)), split=split) for split in ("train", "val"))
    assert train.class_names == val.class_names == ("b\u00e9e", "cat") and val.labels.tolist() == [0, 0, 1, 1]


def test_accents_in_either_form_are_the_same_division(tmp_path):
    names = [f"na\u00efve {label}/\u00e9{i}.png" for label in ("ant", "bee") for i in range(10)]
    folders = {form: tmp_path / form for form in ("NFC", "NFD")}
    for form, folder in folders.items():
        write(folder, draw_pixels(20, 16, 16, 3, seed=2), [unicodedata.normalize(form, name) for name in names])
    for split in ("train", "test"):
        one, other = (open_source(str(folder), folder, split) for folder in folders.values())
        assert one.class_names == other.class_names and one.paths != other.paths
        assert [one.content(i) for i in range(len(one.labels))] == [other.content(i) for i in range(len(one.labels))]
        assert one.identity() == other.identity()


def test_a_folder_that_has_changed_since_the_training_is_told(flat, tmp_path, capsys):
    flags = ["--data", str(flat), "--backbone", "tiny", *TRAIN[:7], "--epochs", "1", "--out", str(tmp_path / "run")]
    train_eval.run(train_eval.parse(flags))
    last = tmp_path / "run" / "last.pt"
    warning = f"warning: --data {flat} has other training images than {last} was trained on"

    def evaluated():
        train_eval.run(train_eval.parse(["--data", str(flat), *TRAIN[1:7], "--eval-only", str(last)]))
        return capsys.readouterr().out

    def analysed():
        load_images(InputConfig(), load_classifier(last), device=torch.device("cpu"), workers=0)
        return capsys.readouterr().out

    assert warning not in evaluated() and warning not in analysed()
    write(flat, draw_pixels(5, 16, 16, 3, seed=1), [f"ant/{i}.png" for i in range(15, 20)])
    assert warning in evaluated() and warning in analysed()
    write(flat, draw_pixels(5, 16, 16, 3, seed=1), [f"dog/{i}.png" for i in range(5)])
    said = evaluated()
    assert warning in said and "knows 3 of its 4 classes; left out: 1 of unknown classes (dog)" in said
    copied = shutil.copytree(flat, tmp_path / "copy")
    train_eval.run(train_eval.parse(["--data", str(copied), *TRAIN[1:7], "--eval-only", str(last)]))
    assert "has other training images" not in capsys.readouterr().out, "another set, as long as the first is there"
    flat.rename(tmp_path / "gone")
    train_eval.run(train_eval.parse(["--data", str(copied), *TRAIN[1:7], "--eval-only", str(last)]))
    assert "has other training images" not in capsys.readouterr().out, "of other classes"
    shutil.rmtree(copied / "dog")
    train_eval.run(train_eval.parse(["--data", str(copied), *TRAIN[1:7], "--eval-only", str(last)]))
    assert "has other training images" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["train", "Validation", "test"])
def test_a_folder_with_a_split_is_not_flat(flat, name):
    assert is_flat(flat) and splits_of(str(flat)) == ("train", "test")
    (flat / "ant").rename(flat / name)
    assert not is_flat(flat)
    if name == "train":  # as among photographs of vehicles
        with pytest.raises(ValueError, match="a class called train needs another name"):
            open_source(str(flat), flat, "train")


def test_a_flat_folder_has_no_val_split(flat):
    with pytest.raises(ValueError, match="divided into train and test, not 'val'"):
        load_data(DataConfig(data=str(flat)), split="val")


# -- Tiny-ImageNet -----------------------------------------------------------------------------------------------------


def test_tiny_imagenet_is_taken_as_it_is_unpacked(tiny_imagenet, tmp_path):
    said, result = through_both(str(tiny_imagenet), tmp_path)
    assert "tiny: 16 training images of 2 classes" in said and "validation: 6 images of the split val" in said
    assert "val_accuracy" in result["last"] and "test_accuracy" not in result["last"]
    assert "warning: no test images" in said
    data = load_data(DataConfig(data=str(tiny_imagenet)))
    val = load_data(DataConfig(data=str(tiny_imagenet)), split="val", like=data)
    assert val.source.paths == tuple(f"val/images/val_{i}.JPEG" for i in range(6))
    assert val.labels.tolist() == [0, 1] * 3 and val.class_names == ("n01443537", "n02123045")


def test_a_network_is_evaluated_where_test_images_have_no_classes(tiny_imagenet, tmp_path, capsys):
    flags = ["--data", str(tiny_imagenet), "--backbone", "tiny", *TRAIN[:7], "--epochs", "1", "--out", str(tmp_path)]
    trained = train_eval.run(train_eval.parse(flags))
    argv = ["--data", str(tiny_imagenet), *TRAIN[1:7], "--eval-only", str(tmp_path / "last.pt")]
    found = train_eval.run(train_eval.parse(argv))
    assert found["val_accuracy"] == trained["last"]["val_accuracy"] and "test_accuracy" not in found
    assert "last.pt knows none of the classes" in capsys.readouterr().out


def test_the_test_images_of_a_run_stay_its_own(flat, tmp_path):
    """Whoever divides a folder without splits again takes the run's own seed."""
    flags = ["--data", str(flat), "--split-seed", "5", "--backbone", "tiny", *TRAIN[:7], "--epochs", "1"]
    result = train_eval.run(train_eval.parse([*flags, "--out", str(tmp_path / "run")]))
    last = tmp_path / "run" / "last.pt"
    own = open_source(str(flat), flat, "test", split_seed=5).paths
    for data in (None, str(flat)):
        images = load_images(InputConfig(data=data), load_classifier(last), device=torch.device("cpu"), workers=0)
        assert images.source.paths == own
    argv = ["--data", str(flat), *TRAIN[1:7], "--eval-only", str(last)]
    with pytest.raises(ValueError, match="would be its training images; add --split-seed 5"):
        train_eval.run(train_eval.parse(argv))
    found = train_eval.run(train_eval.parse([*argv, "--split-seed", "5"]))
    assert found["test_accuracy"] == result["last"]["test_accuracy"]


def test_a_run_folder_is_no_class(flat, monkeypatch):
    monkeypatch.chdir(flat)
    for main, flags in ((search.main, []), (train_eval.main, ["--backbone", "tiny"])):
        assert main(["--data", ".", *flags, "--device", "cpu"]) == 2
    assert sorted(path.name for path in flat.iterdir()) == ["ant", "bee", "cat"]


def test_names_as_systems_give_them_make_no_proxy_unreadable(flat, tmp_path):
    for path in sorted(flat.rglob("*.png")):
        path.rename(path.with_name(f"Screenshot {path.stem}\u202fPM\u3000.png"))
    for _ in range(2):
        argv = [*SEARCH, "--data", str(flat), "--stop-after", "proxy", "--out", str(tmp_path / "run")]
        assert search.main([word for word in argv if word != "--no-finals"]) == 0
    assert ProxyManifest.load(tmp_path / "run" / "proxy.json").paths[0].endswith("\u202fPM\u3000.png")


@pytest.mark.parametrize("gigabytes", ["4", "0"])
def test_a_class_that_cannot_be_read_is_refused(gigabytes, flat, tmp_path, capsys):
    (flat / "dog").mkdir()
    for i in range(2):
        (flat / "dog" / f"{i}.png").write_bytes((flat / "ant" / "0.png").read_bytes()[:60])
    argv = [*SEARCH, "--data", str(flat), "--max-resident-gb", gigabytes, "--out", str(tmp_path / "run")]
    assert search.main(argv) == 2
    assert "class 'dog' has no readable train images" in capsys.readouterr().err


def test_a_tiny_imagenet_whose_val_images_were_moved_to_class_folders(tiny_imagenet):
    """The usual script leaves the list behind."""
    val = tiny_imagenet / "val"
    for line in (val / "val_annotations.txt").read_text().splitlines():
        name, label, *_ = line.split("\t")
        (val / label).mkdir(exist_ok=True)
        (val / "images" / name).rename(val / label / name)
    (val / "images").rmdir()
    assert open_source(str(tiny_imagenet), tiny_imagenet, "val").labels.tolist() == [0] * 3 + [1] * 3


def test_an_annotation_of_an_unknown_class_is_named(tiny_imagenet):
    listing = tiny_imagenet / "val" / "val_annotations.txt"
    listing.write_text(listing.read_text().replace("n02123045", "n99999999"))
    with pytest.raises(ValueError, match="n99999999, which is no class of the training images"):
        open_source(str(tiny_imagenet), tiny_imagenet, "val")
    listing.write_text("val_0.JPEG n01443537\n")
    with pytest.raises(ValueError, match=r"val_annotations\.txt must hold lines of a file name, a tab and a class"):
        open_source(str(tiny_imagenet), tiny_imagenet, "val")
    listing.write_bytes(b"val_0.JPEG\tn\xff\n")
    with pytest.raises(ValueError, match=r"val_annotations\.txt is not UTF-8 text"):
        open_source(str(tiny_imagenet), tiny_imagenet, "val")


# -- MedMNIST ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def medmnist(monkeypatch, tmp_path):
    """The package's interface, over an archive in its layout with names of its own: 28 px, grey, labels (N, 1)."""
    arrays = {}
    for split, count in (("train", 24), ("val", 8), ("test", 8)):
        arrays[f"{split}_images"] = draw_pixels(count, 28, 28)
        arrays[f"{split}_labels"] = np.arange(count)[:, None] % 2
    root = tmp_path / "root"
    root.mkdir()
    np.savez(root / "pneumoniamnist.npz", **arrays)

    class PneumoniaMNIST:
        def __init__(self, split, root, size, download):
            assert (size, download) == (28, False)
            with np.load(f"{root}/pneumoniamnist.npz") as found:
                self.imgs, self.labels = found[f"{split}_images"], found[f"{split}_labels"]

    about = {"python_class": "PneumoniaMNIST", "label": {"1": "pneumonia", "0": "normal"}}
    package = SimpleNamespace(INFO={"pneumoniamnist": about}, PneumoniaMNIST=PneumoniaMNIST)
    monkeypatch.setitem(sys.modules, "medmnist", package)
    return root


def test_medmnist_is_known_by_name_and_trains_at_28_px(medmnist, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "SEARCH", [*SEARCH, "--data-root", str(medmnist)])
    said, result = through_both("pneumoniamnist", tmp_path)
    assert "pneumoniamnist: 24 training images of 2 classes, 28 px, mirrored at random" in said
    assert {"val_accuracy", "test_accuracy"} <= result["last"].keys()
    config = json.loads((tmp_path / "run-net" / "config.json").read_text())["input"]
    assert (config["data"], config["image_size"]) == ("pneumoniamnist", None)
    assert load_data(DataConfig(data="pneumoniamnist", data_root=medmnist)).class_names == ("normal", "pneumonia")


def test_processes_download_one_after_another(medmnist, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    held = []

    def watched(*given, read=named_sets._medmnist):
        with open(medmnist / named_sets.LOCK) as lock, contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held.append(False)
        return read(*given)

    monkeypatch.setattr(named_sets, "_medmnist", watched)
    assert len(open_source("pneumoniamnist", medmnist, "train").labels) == 24 and held == []
    assert len(open_source("pneumoniamnist", medmnist, "train").labels) == 24, "the lock is given back"


def test_without_its_package_medmnist_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "medmnist", None)
    with pytest.raises(ValueError, match="pip install medmnist"):
        open_source("pathmnist_64", tmp_path, "train")
    assert located("pathmnist_64") == "pathmnist_64" and splits_of("pathmnist") == ("train", "val", "test")


def test_the_names_are_those_of_the_package():
    package = pytest.importorskip("medmnist")
    flat_sets = {
        name for name, about in package.INFO.items() if "3d" not in name and "multi-label" not in about["task"]
    }
    assert set(MEDMNIST) == flat_sets


# -- Hugging Face ------------------------------------------------------------------------------------------------------


def encoded(pixels, suffix="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, suffix)
    return buffer.getvalue()


@pytest.fixture
def saved(tmp_path):
    """A set with train and validation splits, PNG and JPEG in turn, as save_to_disk leaves it."""
    datasets, pyarrow = pytest.importorskip("datasets"), pytest.importorskip("pyarrow")
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "note": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["ant", "bee"]),
        }
    )

    def table(count, seed):
        images = [encoded(x, ("PNG", "JPEG")[i % 2]) for i, x in enumerate(draw_pixels(count, 16, 16, 3, seed=seed))]
        files = pyarrow.array([{"bytes": file, "path": None} for file in images], type=features["image"].pa_type)
        columns = {"image": files, "note": ["x"] * count, "label": [i % 2 for i in range(count)]}
        made = pyarrow.table(columns).cast(features.arrow_schema)
        return datasets.Dataset(datasets.table.InMemoryTable(made), fingerprint=f"{count}-{seed}")

    datasets.DatasetDict({"train": table(20, 0), "validation": table(6, 1)}).save_to_disk(tmp_path / "both")
    table(20, 0).save_to_disk(tmp_path / "one")
    return tmp_path


def test_a_hugging_face_set_goes_through_both_commands(saved, tmp_path):
    said, result = through_both(f"hf:{saved / 'both'}", tmp_path)
    assert "both: 20 training images of 2 classes" in said and "validation: 6 images of the split val" in said
    assert "val_accuracy" in result["last"] and "test_accuracy" not in result["last"]
    data = load_data(DataConfig(data=f"hf:{saved / 'both'}"))
    assert data.class_names == ("ant", "bee") and data.labels.tolist() == [0, 1] * 10
    expected = draw_pixels(20, 16, 16, 3, seed=0)
    assert np.array_equal(data.images[::2].permute(0, 2, 3, 1), expected[::2]), "PNG keeps every pixel"
    assert data.source.paths[:2] == ("train-000000.png", "train-000001.jpg")


def test_a_hugging_face_set_without_splits_is_divided(saved):
    one = f"hf:{saved / 'one'}"
    assert splits_of(one) == ("train", "test")
    parts = {split: open_source(one, saved, split) for split in ("train", "test")}
    assert [len(part.labels) for part in parts.values()] == [16, 4] and "--split-seed 0" in parts["test"].note
    whole = {encoded(x, ("PNG", "JPEG")[i % 2]) for i, x in enumerate(draw_pixels(20, 16, 16, 3, seed=0))}
    assert set(parts["train"].encoded) | set(parts["test"].encoded) == whole


def test_the_test_images_of_a_divided_hugging_face_set_stay_its_own(flat, tmp_path):
    """`datasets` is not needed to refuse: a folder with state.json is what it divides."""
    flags = ["--data", str(flat), "--split-seed", "5", "--backbone", "tiny", *TRAIN[:7], "--epochs", "1"]
    train_eval.run(train_eval.parse([*flags, "--out", str(tmp_path / "run")]))
    (flat / "state.json").touch()
    recorded = tmp_path / "run" / "config.json"
    recorded.write_text(recorded.read_text().replace(str(flat), f"hf:{flat}"))
    argv = ["--data", f"hf:{flat}", *TRAIN[1:7], "--eval-only", str(tmp_path / "run" / "last.pt")]
    with pytest.raises(ValueError, match="would be its training images; add --split-seed 5"):
        evaluate._check_split_seed(train_eval.parse(argv))
    evaluate._check_split_seed(train_eval.parse([*argv, "--split-seed", "5"]))


def test_what_is_no_hugging_face_set_is_refused(saved, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="save_to_disk"):
        splits_of(f"hf:{tmp_path / 'nowhere'}")
    with pytest.raises(ValueError, match="has the splits train, val, not 'test'"):
        open_source(f"hf:{saved / 'both'}", saved, "test")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install datasets"):
        open_source(f"hf:{saved / 'both'}", saved, "train")


def test_encoded_images_are_read_hashed_and_measured_like_files(tmp_path):
    pixels = draw_pixels(3, 9, 7, 3)
    images = [encoded(pixels[0]), encoded(pixels[1], "JPEG"), b"no image"]
    names = ("0.png", "1.jpg", "2.png")
    for name, content in zip(names, images, strict=True):
        (tmp_path / name).write_bytes(content)
    column = [{"image": {"bytes": file, "path": None}} for file in images]
    options = {"folder": tmp_path, "paths": names}
    on_disk = Source("set", "train", np.zeros(3, dtype=np.int64), ("a",), **options)
    held = Source("set", "train", on_disk.labels, ("a",), **options, encoded=hugging_face.Encoded(column, np.arange(3)))
    assert held.identity() == on_disk.identity() and held.native_sizes() == on_disk.native_sizes() == {(9, 7): 2}
    for index in (0, 1):
        assert held.content(index) == on_disk.content(index)
        assert np.array_equal(held.read(index), on_disk.read(index))
    with pytest.raises(Exception, match=r"2\.png"):
        held.read(2)
    assert np.array_equal(held.part(np.array([1])).read(0), on_disk.read(1))


def test_a_row_without_an_image_counts_as_unreadable(tmp_path):
    column = [{"image": None}, {"image": {"bytes": None, "path": str(tmp_path / "gone.jpg")}}]
    held = hugging_face.Encoded(column, np.arange(2))
    paths = tuple(f"{i}{hugging_face._suffix(held, i)}" for i in range(2))
    source = Source("set", "train", np.zeros(2, dtype=np.int64), ("a",), folder=tmp_path, paths=paths, encoded=held)
    for index in range(2):
        with pytest.raises(BadImageError, match=paths[index]):
            source.read(index)


# -- mirroring and sizes -----------------------------------------------------------------------------------------------


def test_digits_letters_and_svhn_are_not_mirrored():
    kept = ("digits", "data/MNIST", "emnist-letters.npz", "hf:sets/svhn_cropped", "usps.npz", "./handwritten digits")
    mirrored = ("cifar100", "pathmnist", "pneumoniamnist_64", "fashion-mnist.npz", "flowers", "/data/imagenet")
    assert not any(map(survives_mirroring, kept)) and all(map(survives_mirroring, mirrored))


@pytest.mark.parametrize("command", [search, train_eval])
@pytest.mark.parametrize("preset", ["quick", "cpu"])
def test_an_explicit_flag_wins(command, preset):
    def flip(*argv):
        return command.parse(["--preset", preset, *argv]).augmentation.flip

    assert flip("--data", "images") and not flip("--data=mnist")
    assert flip("--data", "mnist", "--flip") and not flip("--data", "images", "--no-flip")
    assert flip() == (preset != "quick")
