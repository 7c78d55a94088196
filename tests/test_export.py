"""Networks that leave the repository: from JPEG files to the reported accuracy, by the lines that README.md prints."""

import builtins
import importlib.util
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train_eval
from darts_space import GENOTYPES, CifarNetwork, Preparation, load_network, network_checkpoint
from nas_kmix.analysis.classifiers import load_classifier
from nas_kmix.engine.data import DataConfig, load_data
from nas_kmix.pipeline.export import check_export, export_network

README = Path(__file__).parents[1] / "README.md"
FLAGS = shlex.split(
    "--no-report --threads 1 --device cpu -j 0 --genotype PC_DARTS_cifar --channels 2 --layers 3 --epochs 2 "
    "--batch-size 8 --lr .05"
)
PREPARATION = Preparation(("ant", "bee", "fly"), 32, 32, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))


def draw_photographs(folder, per_class, seed):
    """JPEG files CLASS/*.jpg of several sizes, some grey, whose colours tell most of the classes."""
    rng = np.random.default_rng(seed)
    for label, name in enumerate(("ant", "bee", "fly")):
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            height, width = rng.integers(140, 220, 2)
            pixels = rng.normal(110.0, 20.0, (height, width, 1)) + rng.normal(0.0, 20.0, (1, 1, 3))
            pixels[height // 5 : -height // 5, width // 5 : -width // 5, label] += 90.0
            image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
            (image.convert("L") if i % 5 == 0 else image).save(folder / name / f"{i}.jpg", quality=90)


@pytest.fixture(scope="module", params=[32, pytest.param(128, marks=pytest.mark.slow)])
def trained(request, tmp_path_factory):
    """A run folder with a network of that size and both its programs, the folder of its val images, and its size."""
    data, out = (tmp_path_factory.mktemp(f"{name}{request.param}") for name in ("data", "run"))
    draw_photographs(data / "train", 32, 0)
    draw_photographs(data / "val", 12, 1)
    flags = [*FLAGS, "--data", str(data), "--image-size", str(request.param), "--out", str(out)]
    train_eval.run(train_eval.parse([*flags, "--export", str(out / "net.pt2")]))
    evaluation = ["--eval-only", str(out / "best.pt"), "--data", str(data), "-j", "0", "--device", "cpu"]
    if importlib.util.find_spec("onnxscript") is not None:
        train_eval.run(train_eval.parse([*evaluation, "--export", str(out / "net.onnx")]))
    return out, data / "val", request.param


def readme_block(mark):
    """README's Python block with this in it, as two programs: up to the first line on a photograph, and the rest."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    lines = next(block for block in blocks if mark in block).replace("runs/net/", "").splitlines()
    first = next(i for i, line in enumerate(lines) if "photo.jpg" in line)
    return "\n".join(lines[:first]), "\n".join(lines[first:])


def classify(marks, photographs):
    """What the last block prints for each photograph, and the logits that it takes for it."""
    there, names, logits = {"print": lambda name: names.append(name)}, [], []
    for mark in marks:
        before, on_photograph = readme_block(mark)
        exec(before, there)  # noqa: S102, README's own lines
    for path in photographs:
        exec(on_photograph.replace("photo.jpg", str(path)), there)  # noqa: S102
        found = there["logits"] if "logits" in there else there["network"](there["image"][None])
        logits.append(np.asarray(found.detach() if isinstance(found, torch.Tensor) else found)[0])
    return names, np.stack(logits)


@pytest.mark.parametrize(
    "marks",
    [["load_network("], ["torch.export.load("], ["torch.export.load(", "onnxruntime.Inf"]],
    ids=["pt", "pt2", "onnx"],
)
def test_the_lines_of_the_readme_give_the_reported_accuracy(marks, trained, monkeypatch):
    folder, val, _ = trained
    if len(marks) > 1:
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    photographs = sorted(val.glob("*/*.jpg"))
    monkeypatch.chdir(folder)
    names, logits = classify(marks, photographs)
    accuracy = np.mean([name == path.parent.name for name, path in zip(names, photographs, strict=True)])
    epoch = "last" if marks == ["torch.export.load("] else "best"  # --export after a training, and with --eval-only
    reported = json.loads((folder / "result.json").read_text())[epoch]["val_accuracy"]
    assert accuracy == pytest.approx(reported, abs=1e-9)
    classifier = load_classifier(folder / f"{epoch}.pt")
    data = load_data(DataConfig(data=str(val.parent)), split="val", like=classifier)
    order = [data.source.paths.index(path.relative_to(val.parent).as_posix()) for path in photographs]
    with torch.no_grad():
        expected = classifier.model(data.normalise(data.images[order])).numpy()
        raw = classifier.model(data.images[order] / 255.0).numpy()
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-5 * np.abs(expected).max())
    assert np.abs(raw - expected).max() > 0.1 * np.abs(expected).max(), "the preparation matters"


def test_transforms_repeat_the_evaluation_bit_by_bit(trained):
    folder, val, size = trained
    network = load_network(folder / "best.pt")
    assert (network.class_names, network.image_size) == (("ant", "bee", "fly"), size)
    data = load_data(DataConfig(data=str(val.parent)), split="val", like=load_classifier(folder / "best.pt"))
    prepare = network.transforms()
    for index, path in enumerate(data.source.paths[:12]):
        with Image.open(val.parent / path) as image:
            assert torch.equal(prepare(image), data.normalise(data.images[[index]])[0])


def small_network():
    return CifarNetwork(GENOTYPES["PC_DARTS_cifar"], 2, 3, 3, generator=torch.Generator().manual_seed(0)).eval()


def draw_squares(n):
    return torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("suffix", "raw"), [(".pt2", False), (".pt2", True), (".onnx", True)])
def test_a_program_takes_batches_of_any_size(suffix, raw, tmp_path):
    model, squares, path = small_network(), draw_squares(7), tmp_path / f"net{suffix}"
    normalised = (squares / 255 - torch.tensor(PREPARATION.mean)[:, None, None]) / torch.tensor(PREPARATION.std)[
        :, None, None
    ]
    images = normalised if raw else squares
    if suffix == ".onnx":
        runtime = pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    export_network(model, PREPARATION, squares, path, raw=raw)
    if suffix == ".pt2":
        program = torch.export.load(path).module()
    else:
        session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])

        def program(batch):
            return torch.from_numpy(session.run(None, {"images": batch.numpy()})[0])

    for n in (1, 2, 7):
        torch.testing.assert_close(program(images[:n]), model(normalised[:n]), rtol=1e-4, atol=1e-5)


def test_a_program_that_differs_is_not_written(tmp_path):
    """A network that draws in every pass cannot agree with its program."""

    class Restless(torch.nn.Module):
        def forward(self, images):
            return images.mean(dim=(2, 3)) + torch.rand_like(images).mean(dim=(2, 3))

    with pytest.raises(ValueError, match=r"net\.pt2: the exported program differs"):
        export_network(Restless(), PREPARATION, draw_squares(7), tmp_path / "net.pt2", raw=False)
    assert not list(tmp_path.iterdir())


def test_without_onnx_the_command_is_refused_with_the_remedy(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name.startswith("onnx") else find(name))
    with pytest.raises(
        ValueError, match=r"needs onnx and onnxscript: pip install onnx onnxscript, or write .*net\.pt2"
    ):
        check_export(tmp_path / "net.onnx")
    check_export(tmp_path / "net.pt2")


def test_without_the_runtime_the_file_is_written_and_said_to_be_unchecked(tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnxscript")
    load = builtins.__import__

    def without_runtime(name, *rest):
        if name == "onnxruntime":
            raise ImportError
        return load(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_runtime)
    linear = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 3))
    export_network(linear, PREPARATION, draw_squares(2), tmp_path / "net.onnx", raw=False)
    assert (tmp_path / "net.onnx").exists()
    assert "net.onnx was not compared with the network; pip install onnxruntime" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--export", "net.pth"], "--export net.pth: name a file that ends in .pt2 (torch.export) or .onnx."),
        (["--export-raw"], "--export-raw says what the program of --export FILE takes; give that too."),
    ],
)
def test_flags_that_cannot_be_meant_are_refused_at_once(flags, said, capsys):
    assert train_eval.main([*FLAGS, *flags]) == 2
    assert said in capsys.readouterr().err


# -- what a checkpoint says of its images ------------------------------------------------------------------------------


def save(tmp_path, **entries):
    model = small_network()
    model.preparation = PREPARATION
    torch.save({**network_checkpoint(model), **entries}, tmp_path / "net.pt")
    return tmp_path / "net.pt"


def test_the_preparation_comes_back_from_a_checkpoint(tmp_path):
    assert load_network(save(tmp_path)).preparation == PREPARATION


def test_a_network_without_it_says_so(tmp_path):
    for network in (small_network(), load_network(save(tmp_path, mean=None))):
        with pytest.raises(ValueError, match="does not know how its images were prepared: set its `preparation`"):
            network.transforms()


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"class_names": ["ant", "bee"]}, "names 2 classes of 3"),
        ({"class_names": ["ant", "ant", "bee"]}, "class_names must be strings, each for one class"),
        ({"class_names": "ant"}, "class_names must be a list, not str"),
        ({"image_size": 33}, "image_size and resize"),
        ({"image_size": 32.0}, "image_size and resize"),
        ({"std": [0.2, 0.0, 0.3]}, "mean and std of the images cannot be"),
        ({"mean": [0.2, float("nan"), 0.3]}, "mean and std of the images cannot be"),
        ({"mean": [0.2, 0.3]}, "three floats each"),
    ],
)
def test_an_impossible_preparation_is_refused(entry, said, tmp_path):
    with pytest.raises(ValueError, match=rf"Cannot use the checkpoint .*net\.pt: .*{said}"):
        load_network(save(tmp_path, **entry))


@pytest.mark.parametrize("mode", ["I;16", "F"])
def test_images_of_more_than_eight_bits_are_refused(mode):
    with pytest.raises(ValueError, match="8 bits per channel"):
        PREPARATION.transforms()(Image.new(mode, (40, 40)))


@pytest.mark.parametrize("image", [torch.zeros(3, 40, 40), torch.zeros(1, 40, 40, dtype=torch.uint8)])
def test_other_tensors_than_pixels_are_refused(image):
    with pytest.raises(ValueError, match="The transforms take PIL images or uint8 pixels"):
        PREPARATION.transforms()(image)
