"""What a later stage could not do is refused before the first one is trained, and the advice holds."""

import contextlib
import io
import re
import shlex

import numpy as np
import pytest
from conftest import draw_pixels

import search
import train_eval
from nas_kmix.proxy import smallest_ratio
from nas_kmix.sampling import select, split_by_class

FLAGS = shlex.split(
    "--threads 1 --device cpu -j 0 --no-finals --scorer.epochs 1 --scorer.batch-size 8 --scoring.draws 2 --scoring.k 2 "
    "--channels 2 --partial 2 --layers 3 --rest-steps 1 --arch-steps 1 --record-every 1 --batch-size 4 --no-report"
)


def archive(path, counts):
    labels = np.repeat(np.arange(len(counts)), counts)
    np.savez(path, train_images=draw_pixels(len(labels), 16, 16, 3), train_labels=labels)
    return path


def command(data, out, *more):
    """Exit code and what was said to stderr."""
    complained = io.StringIO()
    with contextlib.redirect_stderr(complained), contextlib.redirect_stdout(io.StringIO()):
        code = search.main(["--data", str(data), "--out", str(out), *FLAGS, *more])
    return code, complained.getvalue()


def advised(complaint, flag):
    return re.search(rf"{flag} (\S+?)[.;]?(?=\s|$)", complaint)[1]


@pytest.mark.parametrize("more", [[], ["--method", "random"], ["--no-balanced"]])
@pytest.mark.parametrize("counts", [[10, 10, 10], [2, 1, 1], [9, 4]])
def test_a_ratio_that_leaves_no_image_is_refused_before_the_scorer(counts, more, tmp_path):
    data, out = archive(tmp_path / "set.npz", counts), tmp_path / "run"
    code, said = command(data, out, "--ratio", "0.05", *more)
    assert code == 2 and said.startswith("error: --ratio 0.05 leaves no image to train the architecture"), said
    assert not out.exists()
    code, said = command(data, out, "--ratio", advised(said, "use --ratio"), *more)
    assert code == 0, said
    assert (out / "genotype.json").exists()


@pytest.mark.parametrize("more", [[], ["--proxy", "none"], ["--no-balanced"]])
def test_a_set_without_two_images_of_a_class_is_refused_without_a_ratio(more, tmp_path):
    code, said = command(archive(tmp_path / "set.npz", [1, 1, 1]), tmp_path / "run", *more)
    assert code == 2 and "no class has two images" in said and "--ratio" not in said
    assert not (tmp_path / "run").exists()


def test_the_advised_command_meets_no_file_of_the_first(tmp_path):
    """A proxy of one image a class is one, for other trainers; a search on it is refused, and the advice keeps it."""
    data, out = archive(tmp_path / "set.npz", [10, 10]), tmp_path / "run"
    assert command(data, out, "--ratio", "0.1", "--stop-after", "proxy")[0] == 0
    code, said = command(data, out, "--ratio", "0.1")
    assert code == 2
    code, said = command(
        data, advised(said, "--out"), "--ratio", advised(said, "use --ratio"), "--scores", advised(said, "--scores")
    )
    assert code == 0, said
    code, said = command(data, tmp_path / "third", "--proxy", str(out / "proxy.json"))
    assert code == 2 and f"{out / 'proxy.json'} has no image to train the architecture" in said


@pytest.mark.parametrize("balanced", [True, False])
def test_the_smallest_ratio_is_the_smallest_that_surely_works(balanced):
    """Against the selection itself; unbalanced, with the scores that spread it over the classes."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        counts = rng.integers(1, 40, size=rng.integers(1, 8))
        labels = np.repeat(np.arange(len(counts)), counts)
        first_of_class = np.r_[0, np.cumsum(counts)[:-1]]
        scores = np.isin(np.arange(len(labels)), first_of_class).astype(float)

        def taken(ratio, labels=labels, scores=scores):
            chosen = select(scores, labels, ratio, method="top", balanced=balanced)
            return len(split_by_class(chosen, labels[chosen], 0.5, seed=0)[1])

        least = smallest_ratio(counts, balanced=balanced)
        if least is None:
            assert taken(1.0) == 0
        else:
            assert taken(least) > 0 and taken(least - 2e-6) == 0


def test_a_folder_in_the_place_of_a_last_file_is_refused_at_once(tmp_path):
    data = archive(tmp_path / "set.npz", [4, 4])
    code, said = command(data, tmp_path / "run", "--export-list", str(tmp_path))
    assert code == 2 and f"--export-list {tmp_path} is a folder" in said
    complained = io.StringIO()
    with contextlib.redirect_stderr(complained):
        argv = ["--data", str(data), "--genotype", "PC_DARTS_cifar", "--out", str(tmp_path / "t")]
        assert train_eval.main([*argv, "--export", str(tmp_path)]) == 2
    assert f"--export {tmp_path} is a folder" in complained.getvalue() and not (tmp_path / "t").exists()
    code, said = command(data, tmp_path / "run", "--export-list", str(data / "list.tsv"))
    assert code == 2 and f"list.tsv cannot be written: {data} is no folder" in said and not (tmp_path / "run").exists()
