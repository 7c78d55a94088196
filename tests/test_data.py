"""Every kind of `--data` against plain readers, sizes and constants against Pillow and NumPy, and every bad input."""

import hashlib
import io
import pickle
import shutil
from urllib.error import URLError

import numpy as np
import pytest
import torch
from conftest import cut_in_half, draw_pixels
from PIL import Image
from sklearn.datasets import load_digits
from torchvision.datasets import cifar
from torchvision.transforms.v2 import functional as TF

from nas_kmix.engine import data as data_module
from nas_kmix.engine import datasets, named_sets, sources
from nas_kmix.engine.data import DataConfig, load_data, prepared_for_evaluation
from nas_kmix.engine.feed import epoch_batches


def load(path, *, split="train", workers=0, like=None, **options):
    config = DataConfig(data=str(path), **{"max_bad_share": 1.0, **options})
    return load_data(config, split=split, workers=workers, like=like)


def pillow(path, size=None):
    """RGB pixels (3, H, W) as Pillow reads them: shorter side resized, centre cropped."""
    image = Image.open(path).convert("RGB")
    if size is not None:
        image = TF.center_crop(TF.resize(image, size), size)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def read_all(data, batch_size=3):
    """All batches in order, with images, labels and indices concatenated."""
    batches = list(data.batches(np.split(np.arange(len(data)), range(batch_size, len(data), batch_size))))
    assert all(len(b.images) == len(b.labels) == len(b.indices) for b in batches)
    images = torch.cat([b.images for b in batches if len(b.images)])
    return images, torch.cat([b.labels for b in batches]), np.concatenate([b.indices for b in batches])


# -- digits ------------------------------------------------------------------------------------------------------------


def test_digits_are_scikit_learns_and_every_fifth_of_a_class_is_for_testing():
    train, test, digits = load("digits"), load("digits", split="test"), load_digits()
    assert len(train) + len(test) == 1797 and train.image_size == 32 and train.stem == "cifar"
    assert train.class_names == test.class_names == tuple("0123456789")
    seen, rows = [0] * 10, [0, 0]
    for image, label in zip(digits.images, digits.target, strict=True):
        seen[label] += 1
        testing = seen[label] % 5 == 0
        data, row = (test if testing else train), rows[testing]
        large = Image.fromarray(np.rint(image * 255 / 16).astype(np.uint8)).resize((32, 32), Image.Resampling.BICUBIC)
        assert data.labels[row] == label and (data.images[row] == torch.from_numpy(np.array(large))).all()
        rows[testing] += 1
    assert rows == [len(train), len(test)]


# -- npz ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(12, 8, 8), (12, 8, 8, 1), (12, 8, 8, 3)])
@pytest.mark.parametrize("label_shape", [(12,), (12, 1)])
@pytest.mark.parametrize("names", [None, ["ant", "bee", "Käfer"]])
def test_npz_layouts(npz_file, shape, label_shape, names):
    images, labels = draw_pixels(*shape), np.arange(12, dtype=np.uint8) % 3
    arrays = {"train_images": images, "train_labels": labels.reshape(label_shape), "class_names": names}
    data = load(npz_file(**arrays))
    wanted = np.broadcast_to(images.reshape(12, 8, 8, -1), (12, 8, 8, 3)).transpose(0, 3, 1, 2)
    assert data.images.dtype == torch.uint8 and data.images.is_contiguous() and data.resident
    np.testing.assert_array_equal(data.images.numpy(), wanted)
    assert data.labels.dtype == np.int64 and data.labels.tolist() == labels.tolist()
    assert data.class_names == (("0", "1", "2") if names is None else tuple(names))
    batch = data.fetch([7, 2])
    np.testing.assert_array_equal(batch.images.numpy(), wanted[[7, 2]])
    assert batch.labels.tolist() == [1, 2] and batch.indices.tolist() == [7, 2]


def test_batches_are_copies(npz_file):
    data = load(npz_file())
    before = data.images.clone()
    data.fetch([0, 1]).images.zero_()
    assert torch.equal(data.images, before)


# -- folders -----------------------------------------------------------------------------------------------------------


def test_classes_and_files_come_in_sorted_order(image_folder):
    folder = image_folder(classes=("wasp", "Ant", "bee"), per_class=11)
    (folder / "train" / "bee" / "more").mkdir()
    shutil.copy(folder / "train" / "bee" / "3.png", folder / "train" / "bee" / "more" / "X.PNG")
    (folder / "train" / "bee" / "notes.txt").write_text("no image")
    (folder / "train" / ".cache").mkdir()
    data = load(folder)
    assert data.class_names == ("Ant", "bee", "wasp")
    names = [f"{i}.png" for i in (0, 1, 10, *range(2, 10))]
    paths = [f"train/{c}/{n}" for c in data.class_names for n in [*names, *(["more/X.PNG"] if c == "bee" else [])]]
    assert list(data.source.paths) == paths
    assert data.labels.tolist() == [data.class_names.index(path.split("/")[1]) for path in paths]
    for i, path in enumerate(paths):
        assert torch.equal(data.images[i], pillow(folder / path))


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp", ".ppm"])
def test_formats_and_greyscale_files(image_folder, suffix):
    folder = image_folder(suffix=suffix, sizes=((16, 16),), grey=("train/ant/1.bmp", "train/ant/1.jpg"))
    data = load(folder)
    for i, path in enumerate(data.source.paths):
        assert torch.equal(data.images[i], pillow(folder / path))
    if suffix in (".jpg", ".bmp"):
        assert Image.open(folder / data.source.paths[1]).mode == "L"
        assert (data.images[1] == data.images[1, :1]).all()


# -- sizes -------------------------------------------------------------------------------------------------------------

SIZES = ((20, 32), (32, 20), (16, 16), (40, 17), (9, 11), (100, 80))


def test_images_are_resized_by_the_shorter_side_and_cropped_in_the_centre(image_folder):
    folder = image_folder(sizes=SIZES, per_class=6)
    data = load(folder, image_size=16)
    for i, path in enumerate(data.source.paths):
        assert (data.images[i].int() - pillow(folder / path, 16).int()).abs().max() <= 1, path
    assert torch.equal(data.images[2], pillow(folder / data.source.paths[2]))


def test_a_shorter_side_that_fits_is_only_cropped(npz_file):
    images = draw_pixels(12, 20, 32, 3)
    data = load(npz_file(train_images=images), image_size=20)
    np.testing.assert_array_equal(data.images.numpy(), images[:, :, 6:26].transpose(0, 3, 1, 2))


@pytest.mark.parametrize(("size", "stem"), [(28, "cifar"), (64, "cifar"), (65, "imagenet")])
def test_native_up_to_64_pixels(npz_file, size, stem):
    path = npz_file(train_images=draw_pixels(12, size, size))
    if size <= 64:
        assert load(path).image_size == size
    else:
        with pytest.raises(ValueError, match=r"set\.npz.* 65x65.*--image-size"):
            load(path)
    data = load(path, image_size=size)
    assert data.stem == stem and data.images.shape == (12, 3, size, size)


def test_sizes_that_differ_or_are_not_square_must_be_given(image_folder, npz_file):
    with pytest.raises(ValueError, match=r"mixed.*several sizes.*--image-size"):
        load(image_folder("mixed", sizes=((16, 16), (16, 17))))
    with pytest.raises(ValueError, match=r"wide.*16x17; only squares.*--image-size"):
        load(image_folder("wide", sizes=((16, 17),)))
    with pytest.raises(ValueError, match=r"set\.npz.*20x32; only squares.*--image-size"):
        load(npz_file(train_images=draw_pixels(12, 20, 32)))


@pytest.mark.parametrize("size", [-8, 0, 3])
def test_senseless_sizes_are_refused(npz_file, size):
    with pytest.raises(ValueError, match=f"--image-size {size} is too small"):
        load(npz_file(), image_size=size)


# -- constants ---------------------------------------------------------------------------------------------------------


def test_constants_are_measured(image_folder):
    data = load(image_folder(per_class=300), max_resident_gb=0)
    pixels = np.stack([data.source.read(i) for i in range(600)]) / 255.0
    np.testing.assert_allclose(data.mean, pixels.mean(axis=(0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(data.std, pixels.std(axis=(0, 1, 2)), rtol=1e-12)
    normalised = data.normalise(read_all(data)[0])
    assert abs(float(normalised.mean())) < 1e-5 and abs(float(normalised.std()) - 1) < 1e-3


def test_constants_of_large_sets_come_from_evenly_spaced_images(npz_file):
    data = load(npz_file(train_images=draw_pixels(50, 8, 8, 3), train_labels=np.arange(50) % 2))
    mean, std = data_module.augment.measure_constants(data, sample=20)
    pixels = data.source.arrays[::3] / 255.0
    np.testing.assert_allclose(mean, pixels.mean(axis=(0, 1, 2)))
    np.testing.assert_allclose(std, pixels.std(axis=(0, 1, 2)))


def test_bad_files_do_not_count_in_the_constants(image_folder):
    data = load(image_folder(truncated=("train/ant/1.png",)))
    pixels = np.stack([data.source.read(i) for i in data.good()]) / 255.0
    np.testing.assert_allclose(data.mean, pixels.mean(axis=(0, 1, 2)))


def test_a_constant_channel_is_not_divided_by_zero(npz_file):
    images = draw_pixels(12, 8, 8, 3)
    images[..., 1] = 77
    data = load(npz_file(train_images=images))
    assert data.std[1] == 1.0 and data.normalise(data.images)[:, 1].abs().max() < 1e-6


# -- streaming ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def mixed_folder(image_folder):
    """Files of several sizes, one of them grey, two of them damaged."""
    damaged = ("train/ant/2.jpg", "train/bee/0.jpg")
    return image_folder(sizes=SIZES, suffix=".jpg", per_class=6, grey=("train/ant/4.jpg",), truncated=damaged)


@pytest.mark.parametrize("workers", [0, 2])
def test_streaming_equals_resident(mixed_folder, workers):
    resident = load(mixed_folder, image_size=16, workers=workers)
    streamed = load(mixed_folder, image_size=16, workers=workers, max_resident_gb=0)
    assert resident.resident and not streamed.resident
    assert streamed.mean == resident.mean and streamed.std == resident.std
    assert streamed.fingerprint == resident.fingerprint and streamed.bad == resident.bad
    order = [np.array([3, 11, 0]), np.array([2, 5]), np.array([2, 6]), np.array([9, 9, 1, 8])]
    pairs = list(zip(resident.batches(order), streamed.batches(order), strict=True))
    assert [pair[0].indices.tolist() for pair in pairs] == [[3, 11, 0], [5], [], [9, 9, 1, 8]]
    for ours, theirs in pairs:
        assert torch.equal(ours.images.flatten(1), theirs.images.flatten(1)) or len(ours.images) == 0
        assert torch.equal(ours.labels, theirs.labels) and np.array_equal(ours.indices, theirs.indices)
        assert theirs.images.dtype == torch.uint8 and theirs.labels.tolist() == resident.labels[theirs.indices].tolist()


@pytest.mark.parametrize("max_resident_gb", [4.0, 0.0])
def test_bad_files_are_named_and_never_replaced(image_folder, max_resident_gb):
    folder = image_folder(per_class=5, truncated=("train/ant/1.png",))
    (folder / "train/bee/0.png").write_bytes(b"")
    (folder / "train/bee/2.png").write_text("not an image")
    (folder / "train/bee/3.png").unlink()
    (folder / "train/bee/3.png").symlink_to(folder / "nowhere.png")
    data = load(folder, image_size=8, max_resident_gb=max_resident_gb)
    images, labels, indices = read_all(data)
    assert set(data.bad) == {1, 5, 7, 8} and len(data) == 10
    for index, sentence in data.bad.items():
        assert sentence.startswith(str(folder / data.source.paths[index]) + ": ") and len(sentence.split(": ")[-1]) > 5
    assert data.good().tolist() == indices.tolist() == [0, 2, 3, 4, 6, 9]
    assert labels.tolist() == [0, 0, 0, 0, 1, 1]
    for image, index in zip(images, indices, strict=True):
        assert torch.equal(image, pillow(folder / data.source.paths[index]))
    assert len(data.fetch([1, 5]).indices) == 0


def test_a_file_that_turns_bad_later_is_found_while_streaming(image_folder):
    folder = image_folder()
    data = load(folder, max_resident_gb=0)
    assert data.bad == {}
    cut_in_half(folder / "train/ant/3.png")
    assert data.fetch([2, 3, 4]).indices.tolist() == [2, 4] and list(data.bad) == [3]


def test_streaming_draws_nothing_from_torchs_global_state(image_folder):
    data = load(image_folder(), max_resident_gb=0)
    before = torch.random.get_rng_state()
    read_all(data)
    assert torch.equal(before, torch.random.get_rng_state())


# -- recognising a set and its images ----------------------------------------------------------------------------------


def test_fingerprint_of_an_archive(npz_file):
    images, labels = draw_pixels(12, 8, 8, 3), np.arange(12) % 3
    pixel, label = images.copy(), labels.copy()
    pixel[11, 7, 7, 2] ^= 1
    label[[0, 1]] = label[[1, 0]]
    original = load(npz_file())
    assert (
        load(npz_file("other.npz", save=np.savez_compressed, test_images=np.zeros(3))).fingerprint
        == original.fingerprint
    )
    changed = [
        load(npz_file(train_images=pixel)),
        load(npz_file(train_labels=label)),
        load(npz_file(class_names=["a", "b", "c"])),
        load(npz_file(train_images=images[:, ::-1])),
        load(npz_file(), image_size=16),
    ]
    assert len({data.fingerprint for data in (original, *changed)}) == 6


def test_fingerprint_of_greyscale_is_that_of_its_three_channels(npz_file):
    grey = draw_pixels(12, 8, 8)
    one, three = (load(npz_file(train_images=a)) for a in (grey, np.stack([grey] * 3, axis=3)))
    assert one.fingerprint == three.fingerprint


def test_fingerprint_of_a_folder(image_folder, tmp_path):
    folder = image_folder(splits=("train", "test"))
    prints = [load(folder).fingerprint]
    shutil.rmtree(folder / "test")
    shutil.copytree(folder, tmp_path / "copy")
    assert load(folder).fingerprint == load(tmp_path / "copy", workers=2).fingerprint == prints[0]
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / "train/ant/0.png")
    prints.append(load(folder).fingerprint)
    (folder / "train/ant/0.png").rename(folder / "train/ant/00.png")
    prints.append(load(folder).fingerprint)
    (folder / "train/ant/00.png").rename(folder / "train/bee/00.png")
    prints.append(load(folder).fingerprint)
    (folder / "train/bee").rename(folder / "train/cow")
    prints.append(load(folder).fingerprint)
    assert len(set(prints)) == 5


def test_content_is_the_same_in_an_archive_and_in_png_files(npz_file, tmp_path):
    images = draw_pixels(12, 20, 32, 3)
    images[5] = images[5, ..., :1]
    archive = load(npz_file(train_images=images, train_labels=np.repeat([0, 1], 6)), image_size=16)
    for i, image in enumerate(images):
        path = tmp_path / "png" / "train" / "ab"[i // 6] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[..., 0] if i == 5 else image).save(path)
    folder = load(tmp_path / "png", image_size=16)
    contents = [archive.source.content(i) for i in range(12)]
    assert contents == [folder.source.content(i) for i in range(12)] and len(set(contents)) == 12
    assert all(len(content) == 16 and int(content, 16) >= 0 for content in contents)


def test_content_sees_one_pixel_and_the_shape(npz_file):
    images = np.zeros((12, 4, 9, 3), np.uint8)
    images[1, 3, 8, 2] = 1
    wide = load(npz_file(train_images=images), image_size=8)
    tall = load(npz_file(train_images=images.reshape(12, 9, 4, 3)), image_size=8)
    assert (
        wide.source.content(0) == wide.source.content(2)
        and len({wide.source.content(0), wide.source.content(1), tall.source.content(0)}) == 3
    )


def test_content_of_jpeg_is_that_of_the_file(image_folder):
    folder = image_folder(suffix=".JPEG")
    data = load(folder)
    for i, path in enumerate(data.source.paths):
        assert data.source.content(i) == hashlib.blake2b((folder / path).read_bytes(), digest_size=8).hexdigest()


# -- only the split asked for ------------------------------------------------------------------------------------------


def test_no_other_split_of_a_folder_is_opened(image_folder, monkeypatch):
    folder = image_folder(splits=("train", "val"))
    (folder / "test").write_text("not even a folder")
    opened, original = [], Image.open
    monkeypatch.setattr(sources.Image, "open", lambda path, **options: opened.append(path) or original(path, **options))
    for split in ("train", "val"):
        opened.clear()
        data = load(folder, split=split)
        assert data.fingerprint and data.source.content(0)
        assert data.source.split == split and {path.relative_to(folder).parts[0] for path in opened} == {split}


def test_classes_are_those_of_train(image_folder):
    folder = image_folder(splits=("train", "val"), classes=("ant", "bee", "cow"))
    (folder / "val" / "aardvark").mkdir()
    assert load(folder, split="val").class_names == ("ant", "bee", "cow")


def test_a_class_that_train_lacks_is_refused_or_one_of_the_splits_own(image_folder):
    folder = image_folder(classes=("ant", "bee"), splits=("train", "val"))
    (folder / "train" / "bee").rename(folder / "train" / "bea")
    with pytest.raises(ValueError, match=r"val/bee/0\.png belongs to no class of .*train; rename"):
        datasets.open_source(str(folder), folder, "val")
    assert datasets.open_source(str(folder), folder, "val", own_classes=True).class_names == ("ant", "bee")


@pytest.mark.parametrize("max_resident_gb", [0.0, 4.0])
def test_images_held_out_are_prepared_as_those_of_another_split(image_folder, max_resident_gb):
    """Above 64 px: the centre of a larger image."""
    folder = image_folder(sizes=((90, 100), (120, 80)), splits=("train", "val"))
    for path in sorted((folder / "val").rglob("*.png")):
        path.write_bytes((folder / "train" / path.relative_to(folder / "val")).read_bytes())
    config = DataConfig(data=str(folder), image_size=72, max_resident_gb=max_resident_gb)
    train = load_data(config)
    val, held_out = load_data(config, split="val", like=train), prepared_for_evaluation(train, np.array([1, 3, 6]))
    assert held_out.resident == train.resident == (max_resident_gb > 0)
    assert held_out.labels.tolist() == train.labels[[1, 3, 6]].tolist()
    found = held_out.fetch(np.arange(3)).images
    assert torch.equal(found, val.fetch(np.array([1, 3, 6])).images)
    assert not torch.equal(found, train.fetch(np.array([1, 3, 6])).images)


def test_images_of_an_archive_held_out_are_prepared_as_those_of_another_split(npz_file):
    pixels, labels = draw_pixels(4, 80, 80, 3), np.arange(4) % 2
    path = npz_file(train_images=pixels, train_labels=labels, val_images=pixels, val_labels=labels)
    config = DataConfig(data=str(path), image_size=80)
    train = load_data(config)
    val, held_out = load_data(config, split="val", like=train), prepared_for_evaluation(train, np.array([3, 0]))
    assert torch.equal(held_out.fetch(np.arange(2)).images, val.fetch(np.array([3, 0])).images)


def test_no_other_split_of_an_archive_is_read(npz_file):
    poison = np.array([{}, []], dtype=object)  # NumPy refuses to read it
    data = load(npz_file(test_images=poison, test_labels=poison, val_images=poison))
    assert len(data) == 12
    with pytest.raises(ValueError, match="Python objects"):
        load(npz_file(test_images=poison, test_labels=poison), split="test")


def test_an_archive_whose_test_images_lack_a_class_must_name_them_all(npz_file):
    pixels = draw_pixels(6, 8, 8, 3)
    train, test = {"train_images": pixels, "train_labels": np.arange(6) % 3}, np.arange(6) % 2
    path = npz_file(**train, test_images=pixels, test_labels=test)
    with pytest.raises(ValueError, match=r"\(2 and 3\); name all classes in the archive's class_names"):
        load(path, split="test", like=load(path))
    path = npz_file(**train, test_images=pixels, test_labels=test, class_names=np.array(["a", "b", "c"]))
    assert load(path, split="test", like=load(path)).num_classes == 3


def test_splits_of_an_archive_are_told_apart(npz_file):
    arrays = {f"{split}_images": draw_pixels(6, 8, 8, seed=i) for i, split in enumerate(("train", "val", "test"))}
    labels = {f"{split}_labels": np.arange(6) % 3 for split in ("train", "val", "test")}
    path = npz_file(**arrays, **labels)
    for split in ("train", "val", "test"):
        np.testing.assert_array_equal(load(path, split=split).images[:, 0].numpy(), arrays[f"{split}_images"])


@pytest.mark.parametrize("name", ["digits", "cifar10", "cifar100"])
def test_a_split_that_does_not_exist_is_refused(name, tmp_path):
    with pytest.raises(ValueError, match=f"--data {name} has the splits train and test, not 'val'"):
        load(name, split="val", data_root=tmp_path)


# -- CIFAR through torchvision -----------------------------------------------------------------------------------------


@pytest.fixture
def small_cifar(tmp_path, monkeypatch):
    """CIFAR archives of ten images per file as torchvision unpacks them; test files hold no pickle."""
    monkeypatch.setattr(cifar, "check_integrity", lambda path, md5=None: True)
    for name, reader in (("cifar10", cifar.CIFAR10), ("cifar100", cifar.CIFAR100)):
        folder, fine = tmp_path / reader.base_folder, "fine_labels" if name == "cifar100" else "labels"
        folder.mkdir()
        for seed, (file, _) in enumerate(reader.train_list):
            batch = {"data": draw_pixels(10, 3072, seed=seed), fine: [(i + seed) % 3 for i in range(10)]}
            (folder / file).write_bytes(pickle.dumps(batch | {"coarse_labels": [0] * 10}))
        for file, _ in reader.test_list:
            (folder / file).write_bytes(b"poison")
        meta = {reader.meta["key"]: ["apple", "bear", "chair"]}
        (folder / reader.meta["filename"]).write_bytes(pickle.dumps(meta))
    return tmp_path


@pytest.mark.parametrize(("name", "files"), [("cifar10", 5), ("cifar100", 1)])
def test_cifar_is_torchvisions_with_the_published_constants(small_cifar, name, files):
    data = load(name, data_root=small_cifar)
    planes = np.concatenate([draw_pixels(10, 3072, seed=seed) for seed in range(files)]).reshape(-1, 3, 32, 32)
    np.testing.assert_array_equal(data.images.numpy(), planes)
    assert data.images.is_contiguous() and data.class_names == ("apple", "bear", "chair")
    assert data.labels.tolist() == [(i + seed) % 3 for seed in range(files) for i in range(10)]
    published = {
        "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
        "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    }[name]
    np.testing.assert_allclose((data.mean, data.std), published, atol=5e-5)


@pytest.mark.parametrize(
    "error", [URLError("no network"), RuntimeError("File not found or corrupted."), TimeoutError()]
)
def test_cifar_that_cannot_be_had(tmp_path, monkeypatch, error):
    def refuse(*arguments, **keywords):
        raise error

    monkeypatch.setattr(cifar, "download_and_extract_archive", refuse)
    with pytest.raises(ValueError, match=rf"--data cifar100 is not under --data-root {tmp_path}.*\.npz"):
        load("cifar100", data_root=tmp_path)


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_folders_that_are_no_image_folders(tmp_path, image_folder):
    with pytest.raises(ValueError, match=f"--data {tmp_path}/none: there is no such folder. Give digits, "):
        load(tmp_path / "none")
    (tmp_path / "bare").mkdir()
    with pytest.raises(ValueError, match=f"--data {tmp_path}/bare has no subfolder train; images belong in "):
        load(tmp_path / "bare")
    (tmp_path / "bare" / "train").mkdir()
    with pytest.raises(ValueError, match=f"{tmp_path}/bare/train has no class folders; images belong in "):
        load(tmp_path / "bare")
    (tmp_path / "bare" / "train" / "ant").mkdir()
    with pytest.raises(ValueError, match=f"{tmp_path}/bare/train holds no images"):
        load(tmp_path / "bare")
    with pytest.raises(ValueError, match=f"{tmp_path}/images/test holds no images"):
        load(image_folder(), split="test")


def test_classes_without_images(image_folder):
    folder = image_folder("garden", classes=("ant", "bee", "cow"))
    shutil.rmtree(folder / "train" / "bee")
    (folder / "train" / "bee").mkdir()
    with pytest.raises(
        ValueError, match="garden: class 'bee' has no readable train images; add some, or leave the class out"
    ):
        load(folder)
    with pytest.raises(ValueError, match="lonely has the single class 'ant'; two or more are needed"):
        load(image_folder("lonely", classes=("ant",)))


def test_a_class_none_of_whose_files_can_be_read(image_folder):
    folder = image_folder("garden", truncated=[f"train/ant/{p.name}" for p in image_folder("x").glob("train/ant/*")])
    with pytest.raises(ValueError, match=r"garden: class 'ant' has no readable train images; .*ant/0\.png"):
        load(folder)


def test_sixteen_bits_are_refused_rather_than_saturated(image_folder):
    folder = image_folder()
    Image.fromarray(np.full((16, 16), 40_000, dtype=np.uint16)).save(folder / "train" / "ant" / "0.png")
    data = load(folder, image_size=16)
    assert list(data.bad) == [0] and "8 bits" in data.bad[0]


def test_archives_with_a_class_too_few(npz_file):
    with pytest.raises(ValueError, match=r"set\.npz has the single class '0'"):
        load(npz_file(train_labels=np.zeros(12, np.int64)))
    with pytest.raises(
        ValueError, match=r"set\.npz: train_labels must lie in \[0, 2\), the number of different labels"
    ):
        load(npz_file(train_labels=np.arange(12) % 2 * 2))


@pytest.mark.parametrize("max_resident_gb", [4.0, 0.0])
@pytest.mark.parametrize("damage", [cut_in_half, lambda path: path.write_bytes(b"")], ids=["truncated", "empty"])
@pytest.mark.parametrize("image_size", [None, 8])
def test_not_one_file_can_be_read(image_folder, max_resident_gb, damage, image_size):
    folder = image_folder()
    for path in folder.rglob("*.png"):
        damage(path)
    with pytest.raises(ValueError, match=f"repair the files. The first is {folder}/train/ant/0.png"):
        load(folder, max_resident_gb=max_resident_gb, image_size=image_size)


def test_an_image_that_claims_to_be_huge_is_bad(image_folder, monkeypatch):
    folder = image_folder()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    Image.fromarray(draw_pixels(20, 20, 3)).save(folder / "train/ant/0.png")
    data = load(folder)
    assert list(data.bad) == [0] and data.image_size == 8


def archive_bytes(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


IMAGES, LABELS = draw_pixels(12, 8, 8, 3), np.arange(12) % 3
BAD_ARRAYS = {
    "no images": ({"train_images": None}, "lacks the array train_images; it has train_labels"),
    "no labels": ({"train_labels": None}, "lacks the array train_labels; it has train_images"),
    "float images": ({"train_images": IMAGES / 255}, r"must be uint8 .* not float64 \(12, 8, 8, 3\)"),
    "flat images": ({"train_images": IMAGES.reshape(12, -1)}, r"must be uint8 \(N, H, W\) .* not uint8 \(12, 192\)"),
    "channels first": ({"train_images": IMAGES.transpose(0, 3, 1, 2)}, r"or \(N, H, W, 3\), not uint8 \(12, 3, 8, 8\)"),
    "no image": ({"train_images": IMAGES[:0], "train_labels": LABELS[:0]}, "train_labels must be 0 integers"),
    "too few labels": ({"train_labels": LABELS[:9]}, r"train_labels must be 12 integers, not int64 \(9,\)"),
    "one-hot labels": ({"train_labels": np.eye(3, dtype=int)[LABELS]}, r"must be 12 integers, not int64 \(12, 3\)"),
    "float labels": ({"train_labels": LABELS / 1.0}, "must be 12 integers, not float64"),
    "words as labels": ({"train_labels": LABELS.astype(str)}, "must be 12 integers, not <U"),
    "negative label": ({"train_labels": LABELS - 1}, r"must lie in \[0, 3\), .* from -1 to 1"),
    "stray label": ({"train_labels": np.where(LABELS == 2, 300_000_000, LABELS)}, "run from 0 to 300000000"),
    "empty images": ({"train_images": IMAGES[:, :0]}, r"must be uint8 .* not uint8 \(12, 0, 8, 3\)"),
    "class names in bytes of another kind": ({"class_names": np.arange(3)}, "class_names must be a list of strings"),
    "one class name": ({"class_names": np.array("abc")}, "class_names must be a list of strings"),
    "class names twice": ({"class_names": ["a", "b", "a"]}, "class_names has a name twice"),
    "class names that are no Unicode": ({"class_names": np.array([b"a", b"b", b"\xff"])}, "not Unicode text"),
    "label above": ({"train_labels": LABELS, "class_names": ["a", "b"]}, r"must lie in \[0, 2\), .* class_names"),
    "object images": ({"train_images": np.array([{}] * 12)}, "holds Python objects; save plain arrays"),
    "object names": ({"class_names": np.array(["a", 2, None], dtype=object)}, "holds Python objects"),
}


@pytest.mark.parametrize(("arrays", "words"), BAD_ARRAYS.values(), ids=BAD_ARRAYS.keys())
def test_archives_with_bad_arrays(npz_file, arrays, words):
    path = npz_file(**arrays)
    with pytest.raises(ValueError, match=f"--data {path}.*{words}"):
        load(path)


def test_files_that_are_no_archives(npz_file, tmp_path):
    complete = npz_file(save=np.savez_compressed).read_bytes()
    damaged = bytearray(complete)
    damaged[80:200] = b"\xff" * 120
    path = tmp_path / "bad.npz"
    for payload in (b"", b"hello", b"PK\x03\x04", complete[:500], bytes(damaged), archive_bytes(IMAGES)):
        path.write_bytes(payload)
        with pytest.raises(ValueError, match=rf"--data {path} is not a complete \.npz file .*make it again"):
            load(path)
    path.unlink()
    with pytest.raises(ValueError, match=f"--data {path}: there is no such file"):
        load(path)
    path.mkdir()
    with pytest.raises(ValueError, match=f"--data {path} cannot be read: Is a directory"):
        load(path)


def test_a_pickle_in_an_archive_is_not_run(npz_file, tmp_path):
    class Bomb:
        def __reduce__(self):
            return open, (str(tmp_path / "bang"), "w")

    with pytest.raises(ValueError, match="Python objects"):
        load(npz_file(train_images=np.array([Bomb()] * 12)))
    assert not (tmp_path / "bang").exists()


# -- batches -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "size", "steps"), [(10, 4, 3), (10, 10, 1), (7, 3, 9), (3, 8, 4), (1, 1, 5), (10, 3, 2)])
def test_batches_are_shuffled_passes_one_after_the_other(n, size, steps):
    indices = np.arange(n) * 7 + 100
    batches = epoch_batches(indices, size, steps, seed=(1, 2, 3))
    assert [len(b) for b in batches[:-1]] == [size] * (steps - 1) and 1 <= len(batches[-1]) <= size
    order = np.concatenate(batches)
    for start in range(0, len(order), n):
        one_pass = order[start : start + n]
        assert len(set(one_pass)) == len(one_pass) and set(one_pass) <= set(indices)
    if steps * size >= n:
        assert set(order) == set(indices)


def test_batches_are_a_function_of_the_seed():
    indices = np.arange(100)

    def orders(*seed):
        return np.concatenate(epoch_batches(indices, 30, 7, seed=seed)).tolist()

    assert orders(0, 1, 2) == orders(0, 1, 2) and np.array_equal(indices, np.arange(100))
    different = [orders(0, 1, 2), orders(0, 1, 3), orders(0, 2, 2), orders(1, 1, 2), orders(0, 1)]
    assert len(set(map(tuple, different))) == 5
    assert orders(0, 1, 2)[:100] != orders(0, 1, 2)[100:200]  # every pass has its own order


# -- real images -------------------------------------------------------------------------------------------------------


def test_real_cifar100(real_cifar100, tmp_path):
    data = load(real_cifar100)
    assert len(data) == 2000 and data.num_classes == 100 and data.image_size == 32
    np.testing.assert_allclose(data.mean, named_sets.CIFAR_CONSTANTS["cifar100"][0], atol=0.02)
    np.testing.assert_allclose(data.std, named_sets.CIFAR_CONSTANTS["cifar100"][1], atol=0.02)
    few = np.flatnonzero(data.labels < 2)
    for i in few:
        path = tmp_path / "png" / "train" / data.class_names[data.labels[i]] / f"{i:05}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(data.source.arrays[i]).save(path)
    files = load(tmp_path / "png")
    wanted = {(data.source.content(i), data.class_names[data.labels[i]]) for i in few}
    assert {(files.source.content(i), files.class_names[files.labels[i]]) for i in range(len(files))} == wanted


def test_real_photographs(real_imagenette, tmp_path):
    for path in real_imagenette.glob("train/*/*"):
        link = tmp_path / "few" / path.relative_to(real_imagenette)
        link.parent.mkdir(parents=True, exist_ok=True)
        if len(list(link.parent.iterdir())) < 6:
            link.symlink_to(path)
    with pytest.raises(ValueError, match="--image-size"):
        load(tmp_path / "few")
    resident = load(tmp_path / "few", image_size=224)
    streamed = load(tmp_path / "few", image_size=224, max_resident_gb=0, workers=2)
    assert resident.stem == "imagenet" and len(resident) == 60 and resident.bad == streamed.bad == {}
    assert torch.equal(read_all(streamed, 16)[0], resident.images) and streamed.mean == resident.mean
    for i in (0, 17, 59):
        difference = (resident.images[i].int() - pillow(tmp_path / "few" / resident.source.paths[i], 224).int()).abs()
        assert difference.max() <= 1
