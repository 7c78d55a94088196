"""A data set of which more than a tenth cannot be read is refused, wherever that comes to light."""

import contextlib
import io
import shlex

import pytest
import torch
from conftest import cut_in_half
from processes import TINY

import search
import train_eval
from nas_kmix.analysis import robustness
from nas_kmix.engine.bad_files import BadFiles
from nas_kmix.engine.data import DataConfig, load_data

TRAIN = shlex.split(
    "--threads 1 --device cpu -j 0 --genotype PC_DARTS_cifar --channels 2 --layers 3 --no-auxiliary --epochs 1 "
    "--batch-size 8 --limit-steps 1 --image-size 32 --val-share .3 --no-report"
)
COMMANDS = {"search": (search.main, TINY), "train_eval": (train_eval.main, [*TRAIN, "--skip-bad"])}


@pytest.fixture
def damaged(image_folder):
    """20 images in train, val and test each; of the split, 3 are cut in half."""

    def make(split):
        folder = image_folder(f"bad-{split}", splits=("train", "val", "test"), per_class=10, sizes=((32, 32),))
        for i in range(3):
            cut_in_half(folder / split / "ant" / f"{i}.png")
        return folder

    return make


def ended(main, argv):
    complained = io.StringIO()
    with contextlib.redirect_stderr(complained), contextlib.redirect_stdout(io.StringIO()):
        return main([*map(str, argv)]), complained.getvalue()


@pytest.mark.parametrize("streamed", [[], ["--max-resident-gb", "0"]])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_refuses_it_before_anything_is_trained(name, streamed, damaged, tmp_path):
    main, flags = COMMANDS[name]
    argv = [*flags, *streamed, "--data", damaged("train"), "--out", tmp_path / "run"]
    code, said = ended(main, argv)
    assert code == 2 and said.startswith("error: 3 of 20 image files cannot be read, more than --max-bad-share 0.1")
    assert "train/ant/0.png" in said and not (tmp_path / "run").exists()
    code, said = ended(main, [*argv, "--max-bad-share", ".15"])
    assert code == 0, said


@pytest.mark.parametrize("split", ["val", "test"])
def test_an_unreadable_split_is_found_before_the_first_epoch(split, damaged, tmp_path):
    argv = [*TRAIN, "--skip-bad", "--max-resident-gb", "0", "--data", damaged(split), "--out", tmp_path / "run"]
    code, said = ended(train_eval.main, argv)
    assert code == 2 and "3 of 20 image files cannot be read" in said and not (tmp_path / "run").exists()


def test_without_skip_bad_too_many_are_counted_and_a_few_named(damaged, tmp_path):
    folder = damaged("train")
    argv = [*TRAIN, "--data", folder, "--out", tmp_path / "run"]
    code, said = ended(train_eval.main, argv)
    assert code == 2 and "3 of 20 image files" in said and "--skip-bad" not in said
    code, said = ended(train_eval.main, [*argv, "--max-bad-share", "1"])
    assert code == 2 and "train/ant/0.png" in said and said.endswith("leave it out with --skip-bad.\n")


def test_an_analysis_refuses_it_and_takes_the_flag(damaged, tmp_path):
    folder = damaged("test")
    argv = [*TRAIN, "--skip-bad", "--max-bad-share", "1", "--data", folder, "--out", tmp_path / "run"]
    assert ended(train_eval.main, argv)[0] == 0
    attack = [tmp_path / "run", "--attack", "fgsm"]
    code, said = ended(robustness.main, attack)
    assert code == 2 and "3 of 20 image files cannot be read, more than --max-bad-share" in said
    assert ended(robustness.main, [*attack, "--max-bad-share", ".2"])[0] == 0
    natural = [tmp_path / "run", "--natural", folder / "test", "--split", "val"]
    code, said = ended(robustness.main, natural)
    assert code == 2 and "3 of 20 image files cannot be read" in said


def test_files_that_vanish_while_they_are_read_count(damaged):
    """A disk that goes away in the middle of an epoch is no reason to train on what is left."""
    folder = damaged("train")
    data = load_data(DataConfig(data=str(folder), max_resident_gb=0, max_bad_share=0.2), device=torch.device("cpu"))
    assert len(data.good()) == 17
    for path in (folder / "train" / "bee").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="of 20 image files cannot be read"):
        list(data.batches([data.good()]))


def test_a_share_is_a_share():
    with pytest.raises(ValueError, match=r"--max-bad-share must lie in \[0, 1\], not 10"):
        DataConfig(max_bad_share=10)
    bad = BadFiles(10, 0.1)
    bad.add({3: "x"})
    with pytest.raises(ValueError, match="2 of 10"):
        bad.add({4: "y"})
    with pytest.raises(ValueError, match="1 of 5"):
        BadFiles(5, 0.0).add({1: "z"})
