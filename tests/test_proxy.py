"""The proxy manifest: which images it holds, how it is divided, and that it finds them again in any copy."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from nas_kmix.engine.data import DataConfig, ImageData, load_data
from nas_kmix.engine.sources import Source
from nas_kmix.proxy import ProxyConfig, ProxyManifest, make_proxy
from nas_kmix.sampling import split_by_class
from nas_kmix.scores import ScoreTable

NAMES = ("ant", "bee", "cow")


def data_of(pixels, labels, names=NAMES):
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    source = Source("generated", "train", np.asarray(labels), names, arrays=pixels)
    return ImageData(source, pixels.shape[1], (0.5,) * 3, (0.2,) * 3, torch.device("cpu"), images)


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, size=(60, 8, 8, 3), dtype=np.uint8)


@pytest.fixture
def labels():
    return np.repeat([0, 1, 2], 20)


@pytest.fixture
def table(labels):
    losses = np.random.default_rng(1).gamma(4.0, size=(60, 6)).astype(np.float32)
    return ScoreTable(np.arange(60), labels, losses)


@pytest.fixture
def proxy(pixels, labels, table):
    return make_proxy(data_of(pixels, labels), table, ProxyConfig(ratio=0.3, measure="cv", method="interval"))


def pixels_of(data, indices):
    return [data.source.arrays[i].tobytes() for i in indices]


def test_measures_choose_different_images(pixels, labels, table):
    data = data_of(pixels, labels)
    for measure in ("cv", "mean", "std"):
        top = make_proxy(data, table, ProxyConfig(ratio=0.1, method="top", measure=measure))
        for label in range(3):
            members = np.flatnonzero(labels == label)
            best = members[np.argsort(-table.measure(measure)[members], kind="stable")[:2]]
            assert set(best) <= set(top.indices.tolist())
        assert len(top.indices) == 6


def test_images_without_a_score_are_left_out(pixels, labels, table):
    kept = np.setdiff1d(np.arange(60), [0, 1, 2, 30])
    partial = ScoreTable(kept, labels[kept], table.losses[kept])
    proxy = make_proxy(data_of(pixels, labels), partial, ProxyConfig(ratio=1.0, measure="cv", method="interval"))
    np.testing.assert_array_equal(proxy.indices, kept)
    np.testing.assert_array_equal(proxy.labels, labels[kept])


def test_random_needs_no_scores_and_follows_its_seed(pixels, labels):
    data = data_of(pixels, labels)
    first, again, other = (
        make_proxy(data, None, ProxyConfig(ratio=0.3, method="random", seed=seed)) for seed in (0, 0, 1)
    )
    assert first.hash() == again.hash() != other.hash()
    assert np.bincount(first.labels).tolist() == [6, 6, 6]
    with pytest.raises(ValueError, match="--scores"):
        make_proxy(data, None, ProxyConfig())


def test_the_hardest_are_dropped_as_told(pixels, labels, table):
    data = data_of(pixels, labels)
    for share, kept in ((0.0, 20), (0.5, 10), (0.9, 6)):  # of a class of 20, of which six are wanted
        config = ProxyConfig(ratio=0.3, measure="mean", method="coverage", drop_hardest=share)
        proxy = make_proxy(data, table, config)
        ranks = np.concatenate([np.argsort(np.argsort(table.mean[labels == c])) for c in range(3)])
        assert ranks[proxy.indices].max() < kept and np.bincount(proxy.labels).tolist() == [6, 6, 6]
        assert proxy.drop_hardest == share
    with pytest.raises(ValueError, match="--drop-hardest"):
        ProxyConfig(drop_hardest=1.0)


def test_files_from_before_coverage_are_read(proxy, tmp_path):
    document = proxy.to_json()
    del document["drop_hardest"], document["checksum"]
    (tmp_path / "proxy.json").write_text(json.dumps(document))
    assert ProxyManifest.load(tmp_path / "proxy.json") == proxy


@given(
    counts=st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(any),
    share=st.floats(0.05, 0.95),
    seed=st.integers(0, 5),
)
def test_halves_are_disjoint_and_stratified(counts, share, seed):
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    indices = np.arange(len(labels)) * 3 + 1
    weights, arch = split_by_class(indices, labels, share, seed=seed)
    np.testing.assert_array_equal(np.sort(np.concatenate([weights, arch])), indices)
    label_of = dict(zip(indices.tolist(), labels.tolist(), strict=True))
    in_arch = np.bincount([label_of[i] for i in arch.tolist()], minlength=len(counts))
    for count, arch_count in zip(counts, in_arch, strict=True):
        if count <= 1:
            assert arch_count == 0
        else:
            assert 1 <= arch_count <= count - 1


@given(counts=st.lists(st.integers(2, 31), min_size=1, max_size=20), seed=st.integers(0, 3))
def test_equal_halves_differ_by_at_most_one(counts, seed):
    labels = np.repeat(np.arange(len(counts)), counts)
    weights, arch = split_by_class(np.arange(len(labels)), labels, 0.5, seed=seed)
    assert abs(len(weights) - len(arch)) <= 1


@pytest.mark.parametrize(
    ("sizes", "share", "large"),
    [([5] * 200 + [500] * 10, 0.1, 50), ([3] * 50 + [100] * 3, 0.2, 20), ([2] * 99 + [40], 0.9, 36)],
)
def test_large_classes_do_not_pay_for_what_small_ones_must_give(sizes, share, large):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    _, taken = split_by_class(np.arange(len(labels)), labels, share, seed=0)
    counts = np.bincount(labels[taken], minlength=len(sizes))
    assert all(abs(count - large) <= 1 for count, size in zip(counts, sizes, strict=True) if size == max(sizes))


@given(counts=st.lists(st.integers(1, 9), min_size=1, max_size=20), data=st.data())
def test_a_wanted_number_of_images_is_that_number(counts, data):
    labels = np.repeat(np.arange(len(counts)), counts)
    wanted = data.draw(st.integers(1, len(labels)))
    kept, taken = split_by_class(np.arange(len(labels)), labels, wanted / len(labels), seed=0, both_sides=False)
    assert len(taken) == wanted and len(np.union1d(kept, taken)) == len(labels)
    given = np.bincount(labels[taken], minlength=len(counts))
    assert all(abs(got - count * wanted / len(labels)) < 1.5 for got, count in zip(given, counts, strict=True))


def test_a_fifth_for_the_architecture():
    labels = np.repeat(np.arange(10), 13)
    weights, arch = split_by_class(np.arange(130), labels, 0.2, seed=0)
    assert (len(weights), len(arch)) == (104, 26)


def test_halves_do_not_follow_the_order_of_the_list():
    """A list sorted by class and cut in the middle would give the halves different classes."""
    weights, arch = split_by_class(np.arange(40), np.repeat([0, 1], 20), 0.5, seed=0)
    assert {i // 20 for i in weights} == {i // 20 for i in arch} == {0, 1}
    assert not np.array_equal(weights, np.arange(0, 40, 2))


def test_save_and_load(proxy, tmp_path):
    path = tmp_path / "proxy.json"
    proxy.save(path)
    loaded = ProxyManifest.load(path)
    assert loaded == proxy and loaded != replace(proxy, seed=1)
    raw = json.loads(path.read_text())
    assert raw["class_counts"] == [6, 6, 6]
    assert sorted(raw["halves"]["weights"] + raw["halves"]["arch"]) == raw["indices"]


def test_applies_to_the_same_images_in_another_order(proxy, pixels, labels):
    data = data_of(pixels, labels)
    assert proxy.apply(data) is proxy
    order = np.random.default_rng(2).permutation(60)
    shuffled = data_of(pixels[order], labels[order])
    applied = proxy.apply(shuffled)
    assert set(pixels_of(shuffled, applied.indices)) == set(pixels_of(data, proxy.indices))
    for half in ("weights", "arch"):
        old, new = getattr(proxy, half), getattr(applied, half)
        assert sorted(pixels_of(shuffled, new)) == sorted(pixels_of(data, old))
    np.testing.assert_array_equal(applied.labels, shuffled.labels[applied.indices])
    assert applied.content == tuple(shuffled.source.content(i) for i in applied.indices)
    assert applied.apply(data).hash() == proxy.hash()


def test_classes_are_matched_by_name(proxy, pixels, labels):
    """The same images under the same names, in reverse order."""
    turned = data_of(pixels, 2 - labels, names=NAMES[::-1])
    np.testing.assert_array_equal(proxy.apply(turned).indices, proxy.indices)
    np.testing.assert_array_equal(proxy.apply(turned).labels, 2 - proxy.labels)


def test_repeated_images_are_told_apart_by_class_and_occurrence(pixels, labels):
    pixels[5] = pixels[3]  # the same image, the same class
    pixels[25] = pixels[7]  # the same image in another class
    data = data_of(pixels, labels)
    everything = make_proxy(data, None, ProxyConfig(ratio=1.0, method="random"))
    order = np.random.default_rng(3).permutation(60)
    applied = everything.apply(data_of(pixels[order], labels[order]))
    np.testing.assert_array_equal(applied.indices, np.arange(60))
    only = replace(everything, indices=np.array([7]), labels=np.array([0]), content=(everything.content[7],))
    only = replace(only, weights=np.array([7]), arch=np.array([], dtype=int))
    found = only.apply(data_of(pixels[order], labels[order])).indices
    np.testing.assert_array_equal(order[found], [7])


def test_the_first_missing_image_is_named(proxy, pixels, labels):
    first = int(proxy.indices[0])
    changed = pixels.copy()
    changed[first] ^= 1
    with pytest.raises(ValueError, match=f"image {first} "):
        proxy.apply(data_of(changed, labels))
    with pytest.raises(ValueError, match="3 classes"):
        proxy.apply(data_of(pixels, labels % 2, names=("ant", "bee")))


def test_an_npz_and_a_folder_of_the_same_pixels_share_a_proxy(pixels, labels, tmp_path):
    np.savez(tmp_path / "set.npz", train_images=pixels, train_labels=labels, class_names=np.array(NAMES))
    order = np.random.default_rng(4).permutation(60)
    for number, index in enumerate(order):
        path = tmp_path / "folder" / "train" / NAMES[labels[index]] / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[index]).save(path)
    archive = load_data(DataConfig(data=str(tmp_path / "set.npz")))
    folder = load_data(DataConfig(data=str(tmp_path / "folder")))
    proxy = make_proxy(archive, None, ProxyConfig(ratio=0.3, method="random"))
    applied = proxy.apply(folder)
    found = {folder.source.read(i).tobytes() for i in applied.indices}
    assert found == set(pixels_of(archive, proxy.indices))
    assert applied.paths == tuple(folder.source.paths[i] for i in applied.indices)


class Pairs(torch.utils.data.Dataset):
    """A user's dataset: PIL images in its own order."""

    def __init__(self, pixels, labels, order):
        self.items = [(Image.fromarray(pixels[i]), int(labels[i])) for i in order]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def test_subset_of_somebody_elses_data_set(proxy, pixels, labels):
    order = np.random.default_rng(5).permutation(60)
    subset = proxy.subset(Pairs(pixels, labels, order))
    assert {np.asarray(image).tobytes() for image, _ in subset} == {pixels[i].tobytes() for i in proxy.indices}


def write_folder(folder, pixels, labels):
    for index in range(60):
        path = folder / "train" / NAMES[labels[index]] / f"{index:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[index]).save(path)


def test_subset_of_an_image_folder_with_a_transform(pixels, labels, tmp_path):
    from torchvision import datasets, transforms

    write_folder(tmp_path, pixels, labels)
    ours = load_data(DataConfig(data=str(tmp_path)))
    proxy = make_proxy(ours, None, ProxyConfig(ratio=0.3, method="random"))
    theirs = datasets.ImageFolder(str(tmp_path / "train"), transform=transforms.ToTensor())
    subset = proxy.subset(theirs)
    chosen = {theirs.samples[i][0] for i in subset.indices}
    assert chosen == {str(tmp_path / path) for path in proxy.paths}
    assert subset[0][0].shape == (3, 8, 8)


def test_only_the_images_of_a_proxy_are_read_where_the_files_lie_as_before(pixels, labels, tmp_path, monkeypatch):
    from torchvision import datasets

    write_folder(tmp_path, pixels, labels)
    proxy = make_proxy(load_data(DataConfig(data=str(tmp_path))), None, ProxyConfig(ratio=0.3, method="random"))
    read, content = [], Source.content
    monkeypatch.setattr(Source, "content", lambda source, i: read.append(i) or content(source, i))
    subset = proxy.subset(datasets.ImageFolder(str(tmp_path / "train")))
    assert sorted(read) == sorted(subset.indices) and len(read) == len(proxy.indices)

    moved = tmp_path / proxy.paths[0]
    moved.rename(moved.with_stem("elsewhere"))
    again = proxy.subset(datasets.ImageFolder(str(tmp_path / "train")))
    assert {again.dataset.samples[i][0] for i in again.indices} == {
        str(moved.with_stem("elsewhere")), *(str(tmp_path / path) for path in proxy.paths[1:])
    }  # fmt: skip


class Unreadable(torch.utils.data.Dataset):
    """A Subset of it reads no other items than its own."""

    def __len__(self):
        return 10**9

    def __getitem__(self, index):
        raise ValueError(f"its item was read: {index}")


def test_subset_of_a_subset(pixels, labels, tmp_path):
    from torchvision import datasets

    write_folder(tmp_path, pixels, labels)
    proxy = make_proxy(load_data(DataConfig(data=str(tmp_path))), None, ProxyConfig(ratio=0.3, method="random"))
    whole = datasets.ImageFolder(str(tmp_path / "train"))
    order = np.random.default_rng(5).permutation(60).tolist()
    subset = proxy.subset(torch.utils.data.Subset(whole, order))
    chosen = {whole.samples[order[i]][0] for i in subset.indices}
    assert chosen == {str(tmp_path / path) for path in proxy.paths}
    with pytest.raises(ValueError, match="its item was read"):
        proxy.subset(torch.utils.data.Subset(Unreadable(), [0]))
    with pytest.raises(ValueError, match="by their bytes, but Pairs gives pixels; give an ImageFolder"):
        proxy.subset(Pairs(pixels, labels, range(60)))


def test_subset_of_images_of_several_sizes_and_modes(tmp_path):
    """As Pillow opens them: palettes and greyscale are converted as our own reader does it."""
    sizes, modes = ((9, 12), (12, 9)), ("RGB", "L", "P")
    opened, labels = [], [i % 2 for i in range(12)]
    for index, label in enumerate(labels):
        path = tmp_path / "train" / "ab"[label] / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(np.random.default_rng(index).integers(0, 256, (*sizes[index % 2], 3), dtype=np.uint8))
        image.convert(modes[index % 3]).save(path)
        opened.append(Image.open(path))
    ours = load_data(DataConfig(data=str(tmp_path), image_size=8))
    proxy = make_proxy(ours, None, ProxyConfig(ratio=0.5, method="random"))
    subset = proxy.subset(list(zip(opened, labels, strict=True)))
    assert {image.filename for image, _ in subset} == {str(tmp_path / path) for path in proxy.paths}


def test_export_list(proxy, tmp_path):
    proxy.export_list(tmp_path / "proxy.tsv")
    rows = [line.split("\t") for line in (tmp_path / "proxy.tsv").read_text().splitlines()]
    assert [int(row[0]) for row in rows] == proxy.indices.tolist()
    assert all(NAMES[int(label)] == name for _, label, name in rows)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"format": "else"}, "not a proxy manifest"),
        ({"version": 2}, "version 2"),
        ({"indices": [3, 2, 1]}, "ascend"),
        ({"indices": ["1"]}, "whole numbers"),
        ({"n": 1}, "ascend"),
        ({"halves": {"weights": [], "arch": []}}, "halves"),
        ({"halves": {"weights": []}}, "lacks 'arch'"),
        ({"content": []}, "content"),
        ({"labels": None}, "labels"),
    ],
)
def test_a_damaged_manifest_is_named(proxy, tmp_path, change, complaint):
    path = tmp_path / "proxy.json"
    path.write_text(json.dumps({**proxy.to_json(), **change}))
    with pytest.raises(ValueError, match=rf"proxy\.json.*{complaint}"):
        ProxyManifest.load(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": 1}'])
def test_what_is_no_manifest_is_named(tmp_path, text):
    path = tmp_path / "proxy.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"proxy\.json"):
        ProxyManifest.load(path)


@pytest.mark.parametrize(
    "settings", [{"ratio": 0.0}, {"ratio": 2.0}, {"interval": 0}, {"arch_share": 0.0}, {"arch_share": 1.0}]
)
def test_bad_settings_are_named(settings):
    with pytest.raises(ValueError, match=f"--{next(iter(settings)).replace('_', '-')}"):
        ProxyConfig(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"measure": "cv"},
        {"measure": "k_centre"},
        {"measure": "residual", "method": "histogram"},
        {"method": "interval"},
    ],
)
def test_a_measure_and_a_method_that_contradict_each_other_are_refused(settings):
    """A user who names one of the two may think of the paper's other one."""
    with pytest.raises(ValueError, match=r"--measure .*--method|--method .*--measure"):
        ProxyConfig(**settings)
    ProxyConfig(measure="cv", method="interval")
    ProxyConfig(measure="el2n", method="top")
