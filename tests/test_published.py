"""The published proxies: what the files hold, by which names they are found, and that they know their images."""

import numpy as np
import pytest
from conftest import draw_pixels

import search
from nas_kmix import proxies
from nas_kmix.engine.data import DataConfig, load_data
from nas_kmix.manifest import ProxyManifest
from nas_kmix.proxy import ProxyConfig, make_proxy

SHARES = {"5": 0.05, "10": 0.1}  # by the ends of the names


def write(path, pixels, labels, **more):
    np.savez(path, train_images=pixels, train_labels=labels, **more)
    return path


def select(data, out, proxy):
    """What search.py selects with --proxy, in the order of `data`."""
    flags = ["--data", data, "--out", out, "--proxy", proxy, "--stop-after", "proxy", "--device", "cpu", "--no-report"]
    return search.run(search.parse([str(flag) for flag in flags])).proxy


@pytest.fixture
def pixels():
    return draw_pixels(60, 32, 32, 3)


@pytest.fixture
def ours(pixels, tmp_path, monkeypatch):
    """A published proxy of 60 images in three classes, of which it holds 18."""
    monkeypatch.setattr(proxies, "FOLDER", tmp_path / "published")
    data = load_data(DataConfig(data=str(write(tmp_path / "ours.npz", pixels, np.arange(60) % 3))))
    proxy = make_proxy(data, None, ProxyConfig(ratio=0.3, method="random"))
    proxies.FOLDER.mkdir()
    proxy.save(proxies.FOLDER / "sixty-random-30.json")
    return proxy


@pytest.mark.parametrize("name", proxies.published())
def test_every_file_holds_what_its_name_says(name):
    proxy = ProxyManifest.load(name)
    data, method, percent = name.split("-")
    assert (proxy.data, proxy.method, proxy.split, proxy.n) == (data, method, "train", 50_000)
    assert proxy.ratio == SHARES[percent] and proxy.measure == {"interval": "cv", "coverage": "el2n"}[method]
    count = int(proxy.ratio * 500)
    assert np.bincount(proxy.labels, minlength=100).tolist() == [count] * 100
    assert len(proxy.weights) == len(proxy.arch) == 50 * count and len(set(proxy.content)) > 0.99 * len(proxy.content)


def test_names_in_the_help_are_those_of_the_files(capsys):
    with pytest.raises(SystemExit):
        search.parse(["--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert len(proxies.published()) == 4 and all(name in text for name in proxies.published())


def test_a_shuffled_copy_has_the_same_images(ours, pixels, tmp_path):
    order = np.random.default_rng(1).permutation(60)
    found = select(write(tmp_path / "copy.npz", pixels[order], order % 3), tmp_path / "run", "sixty-random-30")
    for half, members in ours.halves.items():
        assert sorted(order[found.halves[half]].tolist()) == members.tolist()
    assert not np.array_equal(found.indices, ours.indices)


def test_a_changed_pixel_of_a_selected_image_is_refused_with_its_number(ours, pixels, tmp_path):
    order = np.random.default_rng(1).permutation(60)
    selected, other = int(ours.indices[7]), int(np.setdiff1d(np.arange(60), ours.indices)[3])
    pixels[other, 5, 5, 1] ^= 1  # nothing hangs on this one
    select(write(tmp_path / "good.npz", pixels[order], order % 3), tmp_path / "good", "sixty-random-30")
    pixels[selected, 5, 5, 1] ^= 1
    with pytest.raises(ValueError, match=f"does not belong to bad.npz: image {selected} "):
        select(write(tmp_path / "bad.npz", pixels[order], order % 3), tmp_path / "bad", "sixty-random-30")


def test_files_go_before_names_and_an_unknown_name_gets_the_list(ours, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match=r"--proxy fifty: there is no such file; published proxies are sixty-random-30"
    ):
        select(tmp_path / "ours.npz", tmp_path / "run", "fifty")
    with pytest.raises(ValueError, match=r"--proxy \. is a folder; name a file in it, e\.g\. proxy\.json"):
        select(tmp_path / "ours.npz", tmp_path / "run", ".")
    data = load_data(DataConfig(data="ours.npz"))
    mine = make_proxy(data, None, ProxyConfig(ratio=0.2, method="random"))
    mine.save("sixty-random-30")
    assert select("ours.npz", "run", "sixty-random-30") == mine


def test_the_bill_is_not_taken_from_the_folder_of_the_command(ours, tmp_path, monkeypatch, capsys):
    """A name is no path beside which a cost.json could lie."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cost.json").write_text('{"stages": {}}')
    assert select("ours.npz", "run", "sixty-random-30") == ours
    assert f"{proxies.FOLDER} has no readable cost.json" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", proxies.published())
def test_cifar100_in_another_order_has_the_same_images(name, whole_cifar100, tmp_path):
    pixels, labels, names = (whole_cifar100[key] for key in ("train_images", "train_labels", "class_names"))
    order = np.random.default_rng(2).permutation(len(pixels))
    copy = write(tmp_path / "copy.npz", pixels[order], labels[order], class_names=names)
    proxy, found = ProxyManifest.load(name), select(copy, tmp_path / "run", name)
    for half, members in proxy.halves.items():
        mine = {(pixels[i].tobytes(), int(labels[i])) for i in members}
        assert mine == {(pixels[order[i]].tobytes(), int(labels[order[i]])) for i in found.halves[half]}
    pixels[proxy.indices[0], 0, 0, 0] ^= 1
    changed = write(tmp_path / "changed.npz", pixels[order], labels[order], class_names=names)
    with pytest.raises(ValueError, match=f"image {proxy.indices[0]} "):
        select(changed, tmp_path / "refused", name)
