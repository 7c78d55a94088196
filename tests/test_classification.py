"""The study of the paper's classification tables on generated images."""

import json
import statistics

import numpy as np
import pytest

from studies.classification import __main__ as study


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    """Two classes that differ in brightness; 8 px."""
    path, arrays = tmp_path_factory.mktemp("data") / "tiny.npz", {}
    for split, n in (("train", 24), ("test", 10)):
        rng, labels = np.random.default_rng(n), np.arange(n) % 2
        images = rng.integers(0, 120, (n, 8, 8, 3)) + 120 * labels[:, None, None, None]
        arrays |= {f"{split}_images": images.astype(np.uint8), f"{split}_labels": labels}
    np.savez(path, **arrays)
    return path


def test_cells_run_over_seeds_resume_and_stand_beside_the_papers(npz, tmp_path, capsys):
    flags = f"--data {npz} --epochs 1 --limit-steps 2 --batch-size 8 --lr .01 --threads 1 --device cpu -j 0"
    cells = ("table2-resnext29-4-24-vanilla", "table2-resnext29-4-24-mixup")
    command = ["--cells", cells[0], "--seeds", "0", "1", "--out", str(tmp_path), "--", *flags.split()]
    assert study.main(command) == 0
    first = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["cell"] for row in first] == [cells[0]] and first[0]["time_ratio"] is None
    command[1:2] = cells
    assert study.main(command) == 0
    bills = [json.loads((tmp_path / c / f"seed-{i}" / "cost.json").read_text()) for c in cells for i in (0, 1)]
    bills = [bill["stages"]["train"] for bill in bills]
    assert [bill["images_backward"] for bill in bills] == [16] * 4  # over all invocations
    assert [bill["skipped"] for bill in bills] == [True, True, False, False]
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert rows[0] == first[0]
    ratio = statistics.mean(rows[1]["seconds"]) / statistics.mean(rows[0]["seconds"])
    assert rows[1]["time_ratio"] == pytest.approx(ratio) and rows[1]["paper_time_ratio"] == 1.02
    for row in rows:
        for seed, error in enumerate(row["errors"]):
            result = json.loads((tmp_path / row["cell"] / f"seed-{seed}" / "result.json").read_text())
            assert error == pytest.approx(100 - 100 * result["last"]["test_accuracy"])
    printed = capsys.readouterr().out.splitlines()[-1]
    assert printed.startswith(cells[1]) and "21.70" in printed and "(1.02x)" in printed and " ± " in printed
    assert f"{statistics.mean(rows[1]['errors']):.2f}" in printed


def test_cells_are_listed_with_the_papers_errors(capsys):
    assert study.main(["--list", "--cells", "imagenet-*"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 16 and "Table 3, ResNet-50 (Baseline): top-1 error 23.68 %, top-5 7.05 %" in printed[0]


def test_a_pattern_without_cells_is_refused(capsys):
    assert study.main(["--cells", "table7-*"]) == 2
    assert "--cells table7-* is no cell" in capsys.readouterr().err
