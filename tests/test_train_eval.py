"""train_eval.py on generated images: schedules as logged, resumes, checkpoints, refusals."""

import json
import math
import re
import shlex
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import cut_in_half, draw_pixels
from PIL import Image
from torchvision.transforms.v2 import functional as TF

import train_eval
from darts_space import CifarNetwork, cost, load_network, read_genotype
from nas_kmix.engine import data as data_module
from nas_kmix.engine import files
from nas_kmix.engine.data import DataConfig, load_data
from nas_kmix.engine.keys import StageMismatchError
from nas_kmix.engine.learner import OptimConfig
from nas_kmix.engine.log import Log
from nas_kmix.engine.photographs import PhotoCrops, choose_crop
from nas_kmix.engine.run import Run, StoppedError
from nas_kmix.engine.sources import BadImageError, Source
from nas_kmix.engine.training import learning_rate

SMALL = shlex.split("--no-report --threads 1 --device cpu -j 0 --genotype PC_DARTS_cifar --channels 2 --layers 3")
SHORT = shlex.split("--epochs 3 --batch-size 16 --drop-path .3 --cutout 8 --ema .8 --color-jitter .4 .4 .4 .2")


def draw(n, seed=0):
    """Noise with one brighter channel, which gives the class away."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 3
    images = rng.integers(0, 130, (n, 32, 32, 3))
    images[np.arange(n), :, :, labels] += 100
    return {"images": images.astype(np.uint8), "labels": labels}


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    """48 training, 13 validation and 10 test images of three classes."""
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    splits = {"train": draw(48), "val": draw(13, 1), "test": draw(10, 2)}
    np.savez(path, **{f"{split}_{name}": value for split, arrays in splits.items() for name, value in arrays.items()})
    return path


@pytest.fixture(scope="module")
def train_only(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "train_only.npz"
    np.savez(path, **{f"train_{name}": value for name, value in draw(48).items()})
    return path


def run(data, out, *flags):
    return train_eval.run(train_eval.parse([*SMALL, "--data", str(data), "--out", str(out), *map(str, flags)]))


def rows(folder):
    lines = [line.split(",") for line in (folder / "metrics.csv").read_text().splitlines()]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[1:]]


def stop_after(monkeypatch, epoch):
    """A signal comes in while the metrics of this epoch are written."""
    add = Log.add

    def stopping(self, stage, at, **values):
        add(self, stage, at, **values)
        if at == epoch:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Log, "add", stopping)


def weights(path):
    return files.hash_tensors(torch.load(path, weights_only=True)["model"])


@pytest.fixture(scope="module")
def alone(npz, tmp_path_factory):
    """An undisturbed run: its folder and its result."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    return folder, run(npz, folder, *SHORT)


# -- schedules ---------------------------------------------------------------------------------------------------------


def test_every_learning_rate_of_the_imagenet_preset():
    preset = train_eval.PRESETS["imagenet"]
    found = [learning_rate(preset.optim, epoch, preset.recipe.warmup_epochs) for epoch in range(250)]
    warm_up = [0.5 * (epoch + 1) / 5 for epoch in range(5)]
    slope = [0.5 * (245 - epoch) / 245 for epoch in range(5, 245)]
    tail = [0.5 * (250 - epoch) / (245 * 5) for epoch in range(245, 250)]
    np.testing.assert_allclose(found, warm_up + slope + tail, rtol=1e-12)
    listed = {0: 0.1, 4: 0.5, 5: 0.4897959, 124: 0.2469388, 244: 0.0020408, 245: 0.0020408, 249: 0.0004082}
    assert {epoch: pytest.approx(found[epoch], abs=5e-8) for epoch in listed} == listed


def test_every_learning_rate_of_the_cifar_preset():
    preset = train_eval.PRESETS["cifar"]
    found = [learning_rate(preset.optim, epoch, preset.recipe.warmup_epochs) for epoch in range(600)]
    np.testing.assert_allclose(found, [0.0125 * (1 + math.cos(math.pi * epoch / 600)) for epoch in range(600)])


def test_a_run_keeps_to_its_schedule_across_a_resume(train_only, tmp_path, monkeypatch):
    flags = shlex.split("--preset imagenet --image-size 32 --limit-steps 1 --val-share 0 --batch-size 4 --no-auxiliary")
    flags += ["--epochs", "8"]
    stop_after(monkeypatch, 3)
    with pytest.raises(StoppedError):
        run(train_only, tmp_path, *flags)
    assert len(rows(tmp_path)) == 4
    result = run(train_only, tmp_path, *flags)
    training = OptimConfig(epochs=8, batch_size=4, lr=0.5, schedule="linear")
    expected = [learning_rate(training, epoch, 5) for epoch in range(8)]
    np.testing.assert_allclose([float(row["lr"]) for row in rows(tmp_path)], expected, rtol=1e-6)
    assert result["best"] is None and not (tmp_path / "best.pt").exists()


# -- a run -------------------------------------------------------------------------------------------------------------


def test_images_that_are_too_small_are_refused_with_the_flag(tmp_path, capsys):
    path = tmp_path / "small.npz"
    np.savez(path, train_images=draw_pixels(4, 12, 12, 3), train_labels=np.arange(4) % 2)
    assert train_eval.main([*SMALL, "--data", str(path), "--out", str(tmp_path / "run")]) == 2
    assert "images have 12 px" in (said := capsys.readouterr().err) and "use --image-size 13, or --no-auxiliary" in said
    assert run(path, tmp_path / "a", "--image-size", 13, "--epochs", 1)["epochs"] == 1
    assert run(path, tmp_path / "b", "--no-auxiliary", "--epochs", 1)["epochs"] == 1


def test_what_a_run_leaves(npz, alone):
    folder, result = alone
    assert {path.name for path in folder.iterdir() if not path.name.startswith("events.")} == {
        *(".lock", "config.json", "env.json", "cost.json", "metrics.csv"),
        *("last.pt", "best.pt", "result.json"),
    }
    table = rows(folder)
    measured = [f"{split}_{name}" for split in ("val", "test") for name in ("loss", "accuracy")]
    assert list(table[0]) == ["stage", "epoch", "lr", "loss", "accuracy", *measured]
    for where in ("last", "best"):
        row = table[result[where]["epoch"]]
        assert {name: pytest.approx(float(row[name]), rel=1e-6) for name in measured} == {
            name: result[where][name] for name in measured
        }
    accuracies = [float(row["val_accuracy"]) for row in table]
    assert result["last"]["epoch"] == 2 and result["best"]["epoch"] == int(np.argmax(accuracies))
    assert json.loads((folder / "result.json").read_text()) == result
    assert cost(load_network(folder / "last.pt"), 32).items() <= result.items()
    bill = files.read_json(folder / "cost.json")["stages"]
    assert (bill["train"]["images_backward"], bill["evaluation"]["images_forward"]) == (3 * 48, 3 * 23)


def test_last_and_best_are_the_networks_that_were_measured(npz, alone):
    """Computed here image by image; with an average, it is the averaged network."""
    folder, result = alone
    for name in ("last", "best"):
        model = load_network(folder / f"{name}.pt")
        train = load_data(DataConfig(data=str(npz)))
        for split in ("val", "test"):
            data = load_data(DataConfig(data=str(npz)), split=split, like=train)
            losses, correct = [], []
            for image, label in zip(data.images, data.labels, strict=True):
                mean, std = (torch.tensor(constant).view(3, 1, 1) for constant in (train.mean, train.std))
                pixels = (image.double() / 255 - mean) / std
                logits = model(pixels.float()[None])[0].detach().double()
                losses.append(-float(logits.log_softmax(0)[label]))
                correct.append(int(logits.argmax()) == label)
            assert result[name][f"{split}_accuracy"] == pytest.approx(np.mean(correct))
            assert result[name][f"{split}_loss"] == pytest.approx(np.mean(losses), rel=1e-4)


@pytest.mark.parametrize("epoch", [0, 1])
def test_stopped_and_resumed_it_ends_the_same(npz, alone, tmp_path, monkeypatch, epoch):
    stop_after(monkeypatch, epoch)
    with pytest.raises(StoppedError):
        run(npz, tmp_path, *SHORT)
    monkeypatch.undo()
    result = run(npz, tmp_path, *SHORT)
    folder, expected = alone
    assert (tmp_path / "metrics.csv").read_bytes() == (folder / "metrics.csv").read_bytes()
    for name in ("last.pt", "best.pt"):
        assert weights(tmp_path / name) == weights(folder / name)
    timings = ("train_s", "images_per_second", "folder")
    assert all(result[name] == expected[name] for name in expected if name not in timings)


def test_images_are_held_out_where_there_is_no_val(train_only, tmp_path):
    result = run(train_only, tmp_path, "--epochs", 1, "--val-share", 0.25)
    assert result["train_images"] == 36 and "val_accuracy" in result["best"] and "test_accuracy" not in result["best"]


def test_training_on_fewer_images(npz, tmp_path):
    assert run(npz, tmp_path, "--epochs", 1, "--train-images", 10)["train_images"] == 10


def test_a_finished_run_tells_the_same_again_and_bills_nothing(npz, alone, tmp_path):
    """Exactly: if any time were billed, the rounded images per second could differ."""
    folder, result = alone
    copy = shutil.copytree(folder, tmp_path / "run")
    assert run(npz, copy, *SHORT) == {**result, "folder": str(copy)}
    first, again = (json.loads((path / "cost.json").read_text()) for path in (folder, copy))
    assert {stage: {**cost, "skipped": True} for stage, cost in first["stages"].items()} == again["stages"]
    assert first["total"] == again["total"]
    for name in ("last.pt", "best.pt", "metrics.csv"):
        assert (copy / name).read_bytes() == (folder / name).read_bytes()


def test_evaluation_only_gives_the_numbers_of_training(npz, alone):
    folder, result = alone
    before = {path: path.read_bytes() for path in folder.iterdir()}
    argv = ["--device", "cpu", "--data", str(npz), "--eval-only", str(folder / "best.pt"), "--out", str(folder / "new")]
    found = train_eval.run(train_eval.parse(argv))
    assert found["images"] == {"val": 13, "test": 10}
    assert all(found[name] == value for name, value in result["best"].items() if name != "epoch")
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_the_last_lines_are_a_table_and_the_json(npz, alone, capsys):
    folder, result = alone
    argv = [*SMALL, "--data", str(npz), "--out", str(folder), *SHORT]
    assert train_eval.main(argv) == 0
    *said, line = capsys.readouterr().out.splitlines()
    assert json.loads(line)["last"] == result["last"]
    table = [row.split() for row in said[-3:]]
    assert table[0] == ["accuracy", "epoch", "val", "test"]
    for (name, epoch, *shares), key in zip(table[1:], ("last", "best"), strict=True):
        found = result[key]
        assert (name, int(epoch)) == (key, found["epoch"] + 1)
        assert shares[::2] == [f"{100 * found[f'{split}_accuracy']:.2f}" for split in ("val", "test")]
    assert train_eval.main([*argv, "--quiet"]) == 0 and len(capsys.readouterr().out.splitlines()) == 1
    assert train_eval.main([*SMALL[:7], "--data", str(npz), "--eval-only", str(folder / "last.pt")]) == 0
    said = capsys.readouterr().out
    assert re.search(rf"^test +{100 * result['last']['test_accuracy']:.2f} %, loss ", said, re.MULTILINE)


def test_every_evaluated_epoch_is_told(npz, tmp_path, capsys):
    run(npz, tmp_path, *SHORT)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("train: epoch ")]
    assert [line.split(",")[0] for line in said] == [f"train: epoch {i + 1}/{len(said)}" for i in range(len(said))]
    for line, row in zip(said, rows(tmp_path), strict=True):
        for title, name in (("accuracy", "accuracy"), ("validation", "val_accuracy"), ("test", "test_accuracy")):
            assert f", {title} {100 * float(row[name]):.1f} %" in line


def test_a_preset_s_size_is_not_asked_for_but_the_same_by_a_flag_is():
    argv = ["--preset", "imagenet", "--eval-only", "net.pt"]
    for flags, size in (([], None), (["--image-size", "224"], 224), (["--image_size=224"], 224)):
        assert train_eval.parse([*argv, *flags]).input.image_size == size


def test_evaluation_at_another_size_is_what_was_asked_for(npz, alone, capsys):
    argv = [*SMALL[:7], "--data", str(npz), "--eval-only", str(alone[0] / "last.pt")]
    found = train_eval.run(train_eval.parse([*argv, "--image-size", "24"]))
    assert "images of 24 px" in capsys.readouterr().out and found["val_loss"] != alone[1]["last"]["val_loss"]
    train = load_data(DataConfig(data=str(npz)))
    data = load_data(DataConfig(data=str(npz)), split="val", like=replace(train, image_size=24))
    model = load_network(alone[0] / "last.pt")
    with torch.no_grad():
        hits = (model(train.normalise(data.images)).argmax(1).numpy() == data.labels).mean()
    assert data.images.shape[-1] == 24 and found["val_accuracy"] == pytest.approx(hits)


def test_a_backbone_is_trained_and_its_checkpoint_evaluated(npz, tmp_path):
    flags = ["--device", "cpu", "--threads", "1", "--data", str(npz)]
    argv = [*flags, "--backbone", "tiny", "--epochs", "1", "--mix", "dcutmix", "--drop-path", ".2"]
    result = train_eval.run(train_eval.parse([*argv, "--out", str(tmp_path)]))
    found = train_eval.run(train_eval.parse([*flags, "--eval-only", str(tmp_path / "last.pt")]))
    assert found["test_loss"] == result["last"]["test_loss"] and result["network"]["backbone"] == "tiny"


def test_a_budget_chooses_the_channels(npz, tmp_path):
    genotype, budget = read_genotype("PC_DARTS_cifar"), 4_000_000
    widths = {c: cost(CifarNetwork(genotype, c, 3, 3), 32)["macs_published"] for c in (2, 4, 6, 8)}
    fitting = max(c for c, macs in widths.items() if macs <= budget)
    assert 2 < fitting < 8
    result = run(npz, tmp_path, "--epochs", 1, "--max-macs", "4M", "--macs-convention", "published")
    assert (result["network"]["channels"], result["macs_published"]) == (fitting, widths[fitting])


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_other_settings_are_refused_and_nothing_changes(npz, alone, tmp_path, capsys):
    folder, _ = alone
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(StageMismatchError, match=r"lr was 0\.1, now 0\.2"):
        run(npz, folder, *SHORT, "--lr", 0.2)
    argv = [*SMALL, "--data", str(npz), "--out", str(folder), *SHORT, "--seed", "3"]
    assert train_eval.main(argv) == 2
    assert "seed was 0, now 3" in (said := capsys.readouterr().err) and "--fresh" in said
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--genotype", "nobody"], "nobody"),
        (["--backbone", "tiny", "--genotype", "PC_DARTS_cifar"], "one of --genotype"),
        ([], "one of --genotype"),
        (["--backbone", "tiny", "--max-macs", "1M"], "--max-macs"),
        (["--genotype", "PC_DARTS_cifar", "--max-macs", "many"], "many"),
        (["--genotype", "PC_DARTS_cifar", "--train-images", "1000"], "--train-images 1000"),
        (["--genotype", "PC_DARTS_cifar", "--val-share", "1"], "--val-share"),
        (["--eval-only", "nowhere.pt"], "nowhere.pt"),
        (["--eval-only", "nowhere.pt", "--backbone", "tiny"], "--eval-only"),
        (["--eval-only", "nowhere.pt", "--max-macs", "1M"], "--eval-only reads the network"),
        (["--eval-only", "."], "is a folder; name a file in it"),
        (["--genotype", "PC_DARTS_cifar", "--grad-clip", "0"], "None does not clip"),
        (["--genotype", "PC_DARTS_cifar", "--seed", str(2**63)], "below 2**63"),
    ],
)
def test_flags_that_make_no_sense_end_with_a_sentence(flags, named, npz, tmp_path, capsys):
    argv = ["--device", "cpu", "--data", str(npz), "--out", str(tmp_path / "out"), *flags]
    assert train_eval.main(argv) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and named in said and "Traceback" not in said
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"]


@pytest.mark.parametrize("name", ["last.pt", "foreign.pt", "text.pt"])
def test_a_damaged_or_foreign_checkpoint_is_named(name, npz, alone, tmp_path, capsys):
    content = (alone[0] / "last.pt").read_bytes()
    (tmp_path / "last.pt").write_bytes(content[: len(content) // 2])
    torch.save({"weights": torch.zeros(3)}, tmp_path / "foreign.pt")
    (tmp_path / "text.pt").write_text("hello")
    argv = ["--device", "cpu", "--data", str(npz), "--eval-only", str(tmp_path / name)]
    assert train_eval.main(argv) == 2
    assert str(tmp_path / name) in capsys.readouterr().err


def test_a_truncated_checkpoint_to_resume_from_is_named(npz, alone, tmp_path, capsys):
    content = (alone[0] / "last.pt").read_bytes()
    for mark in ("env.json", "cost.json"):
        (tmp_path / mark).write_bytes((alone[0] / mark).read_bytes())
    (tmp_path / "last.pt").write_bytes(content[: len(content) // 2])
    assert train_eval.main([*SMALL, "--data", str(npz), "--out", str(tmp_path), *SHORT]) == 2
    assert f"{tmp_path / 'last.pt'} is cut short" in capsys.readouterr().err


# -- photographs -------------------------------------------------------------------------------------------------------

STREAMED = shlex.split(
    "--preset imagenet --image-size 128 --genotype PC_DARTS_cifar --channels 2 --layers 3 --no-auxiliary --epochs 2 "
    "--batch-size 4 --warmup-epochs 0 --threads 1 --device cpu"
)


@pytest.fixture
def photographs(image_folder):
    """Of several sizes, with a greyscale file; CMYK is what prepress JPEGs come in."""
    folder = image_folder(
        suffix=".jpg", sizes=((140, 150), (200, 160)), splits=("train", "val"), grey=("train/ant/1.jpg",), per_class=5
    )
    with Image.open(folder / "train/bee/2.jpg") as image:
        image.convert("CMYK").save(folder / "train/bee/2.jpg")
    return folder


def stream(data, out, *flags):
    return train_eval.run(train_eval.parse([*STREAMED, "--data", str(data), "--out", str(out), *map(str, flags)]))


def test_photographs_stream_the_same_with_any_number_of_workers(photographs, tmp_path):
    """Also after a resume, as crops have their own seeds."""
    for workers in (0, 2):
        stream(photographs, tmp_path / str(workers), "-j", workers)
    assert rows(tmp_path / "0") == rows(tmp_path / "2")
    assert weights(tmp_path / "0" / "last.pt") == weights(tmp_path / "2" / "last.pt")


def test_crops_come_from_the_whole_photograph(photographs):
    """torchvision's own, of the file's pixels; another one in the next epoch."""
    data = load_data(DataConfig(data=str(photographs), image_size=128, max_resident_gb=0))
    crops, order = PhotoCrops(128, seed=3), np.array([7, 2, 9, 0])
    before = torch.random.get_rng_state()
    batches = [next(data.batches([order], crops=crops, epoch=epoch)) for epoch in (0, 1, 0)]
    assert torch.equal(batches[0].images, batches[2].images)
    for i, index in enumerate(order):
        image = TF.to_image(Image.open(photographs / data.source.paths[index]).convert("RGB"))
        assert not torch.equal(batches[0].images[i], batches[1].images[i])
        for epoch in (0, 1):
            left, top, width, height = choose_crop(image.shape[2], image.shape[1], crops.draw(int(index), epoch))
            wanted = TF.resized_crop(image, top, left, height, width, [128, 128], antialias=True)
            assert torch.equal(batches[epoch].images[i], wanted)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_evaluation_looks_at_the_centre_of_a_larger_image(photographs):
    """Resize 256, CenterCrop 224, or in that proportion."""
    train = load_data(DataConfig(data=str(photographs), image_size=128, max_resident_gb=0))
    for limit in (0.0, 4.0):
        data = load_data(DataConfig(data=str(photographs), max_resident_gb=limit), split="val", like=train)
        found = data.fetch(np.arange(4)).images
        for i in range(4):
            image = TF.to_image(Image.open(photographs / data.source.paths[i]).convert("RGB"))
            assert torch.equal(found[i], TF.center_crop(TF.resize(image, 146, antialias=True), 128))


@pytest.mark.parametrize("limit", [0.0, 4.0])
def test_a_corrupt_file_ends_the_command_or_is_left_out_and_counted(photographs, tmp_path, capsys, limit):
    broken = ["train/ant/3.jpg", "val/ant/0.jpg", "val/bee/2.jpg"]
    for path in broken:
        cut_in_half(photographs / path)
    argv = [
        *STREAMED,
        "--data",
        str(photographs),
        "--out",
        str(tmp_path / "out"),
        "-j",
        "0",
        "--max-resident-gb",
        str(limit),
        "--max-bad-share",
        "0.2",
    ]
    assert train_eval.main(argv) == 2
    assert "train/ant/3.jpg" in (said := capsys.readouterr().err) and "--skip-bad" in said
    argv.append("--skip-bad")
    result = train_eval.run(train_eval.parse(argv))
    assert result["bad_images"] == 3 and result["train_images"] == 9
    assert train_eval.run(train_eval.parse(argv)) == result, "though it reads no validation image any more"
    listed = (tmp_path / "out" / "bad_images.txt").read_text().splitlines()
    assert all(path in line for path, line in zip(broken, listed, strict=True))
    moved = photographs.rename(photographs.with_name("moved"))
    argv[argv.index("--data") + 1] = str(moved)
    assert train_eval.run(train_eval.parse(argv))["bad_images"] == 3
    assert json.loads((tmp_path / "out" / "config.json").read_text())["input"]["data"] == str(moved)
    capsys.readouterr()
    argv[argv.index("--genotype") : argv.index("--genotype") + 2] = ["--eval-only", str(tmp_path / "out" / "last.pt")]
    found = train_eval.run(train_eval.parse(argv))
    assert found["images"] == {"val": 8} and found["bad_images"] == 2
    assert found["val_accuracy"] == result["last"]["val_accuracy"]
    assert "2 files cannot be read and were left out; the first is" in capsys.readouterr().out


def test_a_file_met_before_a_stop_is_counted_after_it(photographs, tmp_path, monkeypatch):
    """The rest of the last epoch does not read it again, and constants are measured on a part of a large set."""
    cut_in_half(photographs / "train/ant/3.jpg")
    flags = ["--epochs", 1, "-j", 0, "--max-resident-gb", 0, "--skip-bad", "--batch-size", 2, "--max-bad-share", 0.2]
    monkeypatch.setattr(data_module.augment, "measure_constants", lambda data: ((0.5,) * 3, (0.25,) * 3))
    with monkeypatch.context() as patch:
        met, read = [], Source.read

        def noticing(source, index, cut=None):
            try:
                return read(source, index, cut)
            except BadImageError:
                met.append(index)
                raise

        def stop(run):
            raise StoppedError(signal.SIGTERM)

        patch.setattr(Source, "read", noticing)
        patch.setattr(Run, "checkpoint_due", lambda run: bool(met))
        patch.setattr(Run, "raise_if_stopping", stop)
        with pytest.raises(StoppedError):
            stream(photographs, tmp_path / "run", *flags)
    assert met and not (tmp_path / "run" / "metrics.csv").exists(), "stopped within the epoch"
    assert stream(photographs, tmp_path / "run", *flags)["bad_images"] == 1


def test_evaluation_on_other_classes_matches_them_by_name(image_folder, photographs, tmp_path, capsys):
    stream(photographs, tmp_path / "run", "-j", 0)
    other = image_folder("other", classes=("bee", "cat"), suffix=".jpg", sizes=((140, 150),), splits=("val",))
    argv = ["--device", "cpu", "-j", "0", "--eval-only", str(tmp_path / "run" / "last.pt"), "--data"]
    found = train_eval.run(train_eval.parse([*argv, str(other)]))
    assert found["images"] == {"val": 4} and "1 of its 2 classes" in capsys.readouterr().out
    model = load_network(tmp_path / "run" / "last.pt")
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    correct = []
    for i in range(4):
        image = TF.to_image(Image.open(other / f"val/bee/{i}.jpg"))
        image = TF.center_crop(TF.resize(image, 146, antialias=True), 128).float() / 255
        logits = model(TF.normalize(image, list(state["mean"]), list(state["std"]))[None])
        correct.append(int(logits.argmax()) == 1)  # bee
    assert found["val_accuracy"] == np.mean(correct)
    nothing = image_folder("nothing", classes=("cat", "dog"), suffix=".jpg", sizes=((140, 150),), splits=("val",))
    assert train_eval.main([*argv, str(nothing)]) == 2 and "knows none of the classes" in capsys.readouterr().err
