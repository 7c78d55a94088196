"""The page against the files it was made from, read back by an HTML parser; faults in those files become sentences."""

import base64
import io
import json
import math
import os
import re
import shlex
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn import functional as F

import search
import train_eval
from darts_space import GENOTYPES, CifarNetwork, Genotype, ImageNetNetwork, cost, random_genotype
from nas_kmix.analysis import live, report
from nas_kmix.analysis.cell_picture import draw_cell
from nas_kmix.analysis.figures import pixels_of
from nas_kmix.analysis.report import __main__ as command_line
from nas_kmix.analysis.report import compare
from nas_kmix.analysis.report import page as page_module
from nas_kmix.analysis.report.charts import Scale, Series, histogram, line_chart, scale_of, stacked_bars
from nas_kmix.analysis.report.drawings import PAGE_COLOURS, drawing
from nas_kmix.analysis.report.markup import Markup, number, table, tag
from nas_kmix.analysis.report.names import spoken
from nas_kmix.analysis.report.page import document
from nas_kmix.analysis.report.record import Record
from nas_kmix.analysis.table_picture import FALL, RISE, panel_figure
from nas_kmix.engine.data import DataConfig, load_data, open_data
from nas_kmix.engine.progress import duration
from nas_kmix.pipeline.scorer import load_scorer
from nas_kmix.proxy import ProxyManifest
from nas_kmix.scores import ScoreTable
from nas_kmix.scoring import ScoringConfig, redraw, score_dataset

OF_A_SEARCH = {"cells", "search", "finals", "proxy", "mixes", "cost"}
OF_A_NETWORK = {"cells", "training", "mixes", "cost", "landscape", "robustness"}
OF_BOTH = {"compare", *OF_A_SEARCH, *OF_A_NETWORK}
NAMES = ('<script>alert("ant")</script>', "b&amp;'ee'", "</style><img src=http://wasp.example/x>")
PAPER = shlex.split("--scoring.loss mixed --scoring.partners fresh --measure cv --method interval")
TINY = shlex.split(
    "--threads 1 --device cpu -j 0 --no-finals --scorer.epochs 2 --scorer.batch-size 24 --scoring.draws 6 --ratio .4 "
    "--channels 2 --partial 2 --layers 3 --rest-steps 2 --arch-steps 4 --record-every 2 --batch-size 8 --arch-lr .02"
)
NETWORK = shlex.split("--threads 1 --device cpu -j 0 --channels 2 --layers 3 --epochs 2 --batch-size 16 --no-auxiliary")
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """A document's tags in order and its text by section; fails where tags are not nested."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text, self.section, self.tables = [], [], {None: ""}, None, []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, name, attributes):
        self.tags.append((name, dict(attributes)))
        if name == "section":
            self.section = dict(attributes)["id"]
            self.text[self.section] = ""
        if name == "tr":
            self.tables.append([])
        if name in ("td", "th"):
            self.tables[-1].append("")
        if name not in VOID:
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name
        if name == "section":
            self.section = None

    def handle_data(self, data):
        self.text[self.section] += data
        if self.open and ("td" in self.open or "th" in self.open):
            self.tables[-1][-1] += data

    def row(self, name):
        """The cells after `name` in its row."""
        (found,) = [row for row in self.tables if row and row[0] == name]
        return found[1:]

    def of(self, name):
        return [attributes for tag, attributes in self.tags if tag == name]


def draw(n, seed=0):
    """Noise with one brighter channel, which gives the class away."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 3
    images = rng.integers(0, 130, (n, 32, 32, 3))
    images[np.arange(n), :, :, labels] += 100
    return images.astype(np.uint8), labels


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    (images, labels), (test_images, test_labels) = draw(72), draw(12, seed=1)
    arrays = {"train_images": images, "train_labels": labels, "test_images": test_images, "test_labels": test_labels}
    np.savez(path, **arrays, class_names=np.array(NAMES))
    return path


@pytest.fixture(scope="module")
def searched(npz, tmp_path_factory):
    """The folder of a finished search with its report, named as if to break out of an attribute."""
    folder = tmp_path_factory.mktemp("runs") / 'search"><i>'
    assert search.main(["--data", str(npz), "--out", str(folder), *TINY, *PAPER]) == 0
    return folder


@pytest.fixture(scope="module")
def trained(npz, searched, tmp_path_factory):
    """The folder of a network trained with what `searched` found."""
    folder = tmp_path_factory.mktemp("runs") / "net"
    genotype = searched / "genotype.json"
    argv = ["--data", str(npz), "--out", str(folder), "--genotype", str(genotype), "--mix", "dcutmix", *NETWORK]
    assert train_eval.main(argv) == 0
    return folder


@pytest.fixture(scope="module")
def written(searched):
    return (searched / "report.html").read_text(encoding="utf-8")


@pytest.fixture
def copy(searched, tmp_path):
    return shutil.copytree(searched, tmp_path / "copy")


@pytest.fixture
def cheap(monkeypatch):
    """Leave the networks of the papers' size unbuilt, where a test needs many pages."""
    monkeypatch.setattr("nas_kmix.analysis.report.cells.network_costs", lambda genotype: {})


# -- one self-contained page -------------------------------------------------------------------------------------------


def remote_references(text):
    """What a browser would fetch: attributes that hold addresses, and those of style sheets."""
    addresses = {"src", "href", "xlink:href", "srcset", "data", "action", "poster", "background"}
    for name, attributes in Page(text).tags:
        for key, value in attributes.items():
            if key in addresses and not value.startswith(("#", "data:image/")):
                yield name, value
            if key == "style" and "url(" in value:
                yield name, value
        if name in ("script", "link", "iframe", "object", "embed", "base"):
            yield name, attributes
    for sheet in re.findall(r"<style>(.*?)</style>", text, re.DOTALL):
        yield from re.findall(r"url\(|@import", sheet)


def test_the_page_stands_alone(written):
    assert list(remote_references(written)) == []
    assert len(written.encode()) < 5_000_000


def test_remote_references_are_seen():
    for bad in ('<img src="http://x/y">', '<p style="background:url(x)"></p>', "<script></script>", '<a href="x"></a>'):
        assert len(list(remote_references(bad))) == 1
    assert len(list(remote_references("<style>@import 'x'; p { background: url(y) }</style>"))) == 2


def test_every_section_is_there_once_and_linked(written):
    found = Page(written)
    assert [attributes["id"] for attributes in found.of("section")].count("cells") == 1
    assert {attributes["id"] for attributes in found.of("section")} == OF_A_SEARCH
    assert {attributes["href"] for attributes in found.of("a")} == {f"#{name}" for name in OF_A_SEARCH}
    assert all(len(found.text[name].strip()) > 20 for name in OF_A_SEARCH)


def test_everything_drawn_says_what_it_is(written):
    found = Page(written)
    drawings = [attributes for attributes in found.of("svg") if attributes.get("aria-hidden") != "true"]
    assert len(drawings) > 25 and all(one["role"] == "img" and one["aria-label"] for one in drawings)
    assert len(found.of("img")) == 3 * 4 * 5 + 8 and all(one["alt"] for one in found.of("img"))


def test_names_from_files_stay_text(written, searched):
    found = Page(written)
    assert "script" not in {name for name, _ in found.tags} and "i" in {name for name, _ in found.tags}
    assert NAMES[0] in found.text["proxy"] and NAMES[1] in found.text["mixes"] + found.text["proxy"]
    assert searched.name in found.text[None]


def test_text_is_escaped_unless_it_is_markup():
    assert tag("p", "a<b", Markup("<i></i>"), title='"&') == '<p title="&quot;&amp;">a&lt;b<i></i></p>'
    assert tag("rect", x=1.239, y=2.0, fill=None, class_="a", aria_label="b") == (
        '<rect x="1.24" y="2" class="a" aria-label="b"></rect>'
    )
    assert "<b>" not in table(["<b>"], [["<b>"]], caption="<b>")


# -- the same numbers as in the files ----------------------------------------------------------------------------------


def test_cells_and_their_cost(written, searched):
    found, genotype = Page(written), Genotype.load(searched / "genotype.json")
    assert genotype.to_text() in found.text["cells"]
    drawn = [one["aria-label"] for one in found.of("svg") if one.get("class") == "drawn cell"]
    for name, edges, label in zip(("Normal", "Reduction"), (genotype.normal, genotype.reduce), drawn, strict=True):
        assert label.startswith(name) and [edge[0] for edge in edges] == re.findall(r"(\w+)\((?:c_k|node)", label)
    for network, size, name in (
        (CifarNetwork, 32, "CIFAR, C=36, L=20"),
        (ImageNetNetwork, 224, "ImageNet, C=48, L=14"),
    ):
        counts = cost(network(genotype), size)
        expected = [counts[key] for key in ("params_without_aux", "params", "macs", "macs_published")]
        assert [int(cell.replace(",", "")) for cell in found.row(name)] == expected
    normal, reduction = ([operation for operation, _ in cell] for cell in (genotype.normal, genotype.reduce))
    assert f"{normal.count('skip_connect')} and {reduction.count('skip_connect')} are skip" in found.text["cells"]
    pools = [sum(operation in ("max_pool_3x3", "avg_pool_3x3") for operation in cell) for cell in (normal, reduction)]
    assert f"{pools[0]} and {pools[1]} are pools" in found.text["cells"]


def edges_of(genotype):
    """A cell's operations and inputs by node, in no order."""
    return [
        sorted((node, *edge) for node in range(4) for edge in cell[2 * node : 2 * node + 2])
        for cell in (genotype["normal"], genotype["reduce"])
    ]


def test_when_the_final_genotype_first_appeared(written, copy, cheap):
    def said(folder, text):
        lines = [json.loads(line) for line in (folder / "genotypes.jsonl").read_text().splitlines()]
        same = [edges_of(line["genotype"]) == edges_of(lines[-1]["genotype"]) for line in lines]
        first = same.index(True)
        last_other = max((i for i, value in enumerate(same) if not value), default=-1)
        at = [line["arch_step"] for line in lines]
        kept = "kept from then on" if last_other < first else f"kept from architecture step {at[last_other + 1]} on"
        shown = Page(text).text["search"]
        assert f"first appeared after architecture step {at[first]} (of 0 to {at[-1]})" in shown and kept in shown

    said(copy, written)
    lines = [json.loads(line) for line in (copy / "genotypes.jsonl").read_text().splitlines()]
    names = ["DARTS_V1", "PC_DARTS_cifar", "DARTS_V2", "PC_DARTS_cifar", "PC_DARTS_cifar"]  # it comes, goes and stays
    rows = [{**lines[0], "arch_step": 3 * i, "genotype": GENOTYPES[name].to_json()} for i, name in enumerate(names)]
    swapped = rows[1]["genotype"]["normal"]
    swapped[0], swapped[1] = swapped[1], swapped[0]  # the same sum
    (copy / "genotypes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said(copy, document([Record(copy)]))


def test_curves_end_where_the_metrics_do(written, searched):
    lines = [line.split(",") for line in (searched / "metrics.csv").read_text().splitlines()]
    rows = [dict(zip(lines[0], line, strict=True)) for line in lines[1:]]
    last = [row for row in rows if row["stage"] == "search"][-1]
    shown = Page(written).text["search"]
    for name, column in (("training", "loss"), ("validation", "val_loss"), ("training", "accuracy")):
        assert f"{name} {number(float(last[column]))}" in shown
    for cell in ("normal", "reduce"):
        below = math.log(8) - float(last[f"entropy_{cell}"])  # metrics.csv holds seven digits of the entropy
        found = [float(text) for text in re.findall(r"at the end ([\d.e-]+) \(normal cell\) and ([\d.e-]+)", shown)[0]]
        assert any(value == pytest.approx(below, abs=2e-6, rel=0.05) for value in found)
        assert number(float(last[f"margin_{cell}"]), 2) in shown


def test_scores_reliability_and_overlap(written, searched):
    found, scores = Page(written), ScoreTable.load(searched / "scores.npz")
    losses = scores.losses.astype(np.float64)
    cv = losses.std(axis=1, ddof=1) / losses.mean(axis=1)
    for share in (5, 50, 95):
        assert number(np.percentile(cv, share)) in found.text["proxy"]
    proxy = json.loads((searched / "proxy.json").read_text())
    assert f"{len(proxy['indices'])} of the {proxy['n']} training images" in found.text["proxy"]
    assert f"{scores.reliability():.2f}" in found.text["proxy"]
    # The highest 40 % of each class by standard deviation, by a loop.
    chosen = set()
    for label in range(3):
        members = sorted(np.flatnonzero(scores.label == label), key=lambda row: -losses[row].std(ddof=1))
        chosen |= {int(scores.index[row]) for row in members[: int(0.4 * len(members) + 0.5)]}
    shared = len(chosen & set(proxy["indices"]))
    assert found.row("highest standard deviation") == [str(shared), f"{100 * shared / len(proxy['indices']):.1f} %"]
    assert found.row("highest CV at interval 4") == [str(len(proxy["indices"])), "100.0 %"]


def test_a_proxy_by_the_default_rule_shares_all_its_images_with_it(searched, npz, tmp_path):
    scores = ["--scores", str(searched / "scores.npz"), "--stop-after", "proxy"]
    assert search.main(["--data", str(npz), "--out", str(tmp_path), *TINY, *scores]) == 0
    found = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    count = len(json.loads((tmp_path / "proxy.json").read_text())["indices"])
    assert found.row("EL2N, coverage") == [str(count), "100.0 %"]
    assert "no random draws" in found.text["proxy"] and "without the hardest 50.0 %" in found.text["proxy"]


def test_the_pictures_are_those_of_the_highest_and_lowest_scores(written, searched, npz):
    scores = ScoreTable.load(searched / "scores.npz")
    images = np.load(npz)["train_images"]
    order = np.argsort(-scores.cv, kind="stable")
    shown = [one for one in Page(written).of("img") if one["alt"].startswith("image ")]
    for attributes, row in zip([*shown[:4], *shown[-4:]], [*order[:4], *order[::-1][:4]], strict=True):
        assert attributes["alt"].startswith(f"image {scores.index[row]}: {NAMES[scores.label[row]]}")
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(attributes["src"].split(",")[1]))))
        np.testing.assert_array_equal(pixels, images[scores.index[row]])


@pytest.mark.parametrize("streamed", [False, True])
def test_the_mixes_shown_are_those_that_were_scored(streamed, searched, npz, image_folder):
    """The scorer's losses on redrawn mixes are the recorded ones."""
    data = load_data(DataConfig(data=str(npz)))
    model, data, _ = load_scorer(searched / "scorer.pt", data)
    scores = ScoreTable.load(searched / "scores.npz")
    if streamed:
        folder = image_folder(classes=("ant", "bee", "wasp"), per_class=8, sizes=((32, 32),))
        data = load_data(DataConfig(data=str(folder), image_size=32, max_resident_gb=0.0))
        scores = score_dataset(model, data, ScoringConfig(draws=3, pool_size=9, seed=5, loss="mixed"))
        assert not data.resident and len(scores.key["pool"]) == 9
    for row in (0, 5, len(scores.index) - 1):
        mixes, soft = redraw(scores, data, int(scores.index[row]))
        with torch.inference_mode():
            losses = F.cross_entropy(model.eval()(data.normalise(mixes)), soft, reduction="none").numpy()
        np.testing.assert_allclose(losses, scores.losses[row], rtol=1e-4)


def test_the_ledger_and_the_speed_up(written, searched):
    found, ledger = Page(written), json.loads((searched / "cost.json").read_text())
    proxy = json.loads((searched / "proxy.json").read_text())
    for stage, bill in ledger["stages"].items():
        if stage == "finals":
            assert bill["wall_s"] == 0  # nothing to show
            continue
        seconds, _, forward, backward, memory = found.row(stage)
        assert seconds == number(bill["wall_s"]) and memory == f"{bill['peak_rss_bytes'] / 2**30:.2f}"
        assert [forward, backward] == [f"{bill['images_forward']:,}", f"{bill['images_backward']:,}"]
    assert found.row("total")[0] == number(sum(bill["wall_s"] for bill in ledger["stages"].values()))
    took = {name: bill["wall_s"] for name, bill in ledger["stages"].items()}
    # 50 epochs of all images, half of them for the weights, and 35 of the other half, at the search's rate.
    full = took["search"] / ledger["stages"]["search"]["images_forward"] * proxy["n"] / 2 * (50 + 35)
    billed = took["search"]
    for name, stages in (("search alone", ()), ("with scoring", ("scoring", "selection")), ("all in", ("scorer",))):
        billed += sum(took[stage] for stage in stages)
        (row,) = [row for row in found.tables if row and row[0].startswith(name)]
        assert row[1:] == [number(billed), f"{full / billed:.2f}×"]


def test_a_search_of_an_earlier_version_is_shown_by_epoch(copy, cheap):
    """Its history and metrics count epochs; pools that they do not count are counted from the genotypes."""
    lines = [json.loads(line) for line in (copy / "genotypes.jsonl").read_text().splitlines()]
    for epoch, line in enumerate(lines):
        for name in ("step", "arch_step", "pools_normal", "pools_reduce"):
            del line[name]
        line["epoch"] = epoch
    (copy / "genotypes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shown = Page(document([Record(copy)])).text["search"]
    assert "(of 0 to 2)" in shown and "after epoch" in shown and "architecture step" not in shown


def test_a_trained_network(trained):
    found = Page((trained / "report.html").read_text(encoding="utf-8"))
    assert {attributes["id"] for attributes in found.of("section")} == OF_A_NETWORK
    result = json.loads((trained / "result.json").read_text())
    shown = found.row("trained here: cifar, C=2, L=3")
    assert shown == [f"{result[key]:,}" for key in ("params_without_aux", "params", "macs", "macs_published")]
    assert f"{100 * result['last']['test_accuracy']:.2f} %" in found.text[None]
    assert f"test {number(result['last']['test_accuracy'])}" in found.text["training"]
    assert len(found.of("img")) == 8 and str(trained) in found.text["landscape"]


def test_a_genotype_is_named_as_shortly_as_can_be():
    typed = random_genotype(np.random.default_rng(3))
    published = GENOTYPES["PC_DARTS_cifar"]
    for genotype, given, name in (
        (published, published.to_text(), "PC_DARTS_cifar"),
        (typed, typed.to_text(), "typed in, "),
        (typed, "elsewhere/genotype.json", "elsewhere/genotype.json"),
    ):
        assert compare._network_name({"genotype": given}, genotype).startswith(name)
    assert compare._network_name({"backbone": "tiny"}, None) == "tiny"


def test_folders_of_one_name_are_told_apart(tmp_path):
    folders = [tmp_path / name for name in ("a/run", "b/run", "c/other")]
    assert list(compare._short_names([Record(f) for f in folders]).values()) == ["a/run", "b/run", "c/other"]
    assert list(compare._short_names([Record(f) for f in folders[1:]]).values()) == ["run", "other"]


def test_a_genotype_of_another_search_in_its_folder_is_not_its_own(searched, trained):
    """As after search.py --fresh in the folder that the network's genotype was read from."""
    (search,) = [compare._searched(Record(searched))]
    found = compare._trained(Record(trained), [search])
    assert found.search_seconds == search.seconds and found.origin == search.proxy
    other = replace(search, genotype=GENOTYPES["PC_DARTS_cifar"])
    network = Record(trained).config["network"]
    assert compare._origin({"genotype": str(searched / "g.json")}, GENOTYPES["DARTS_V2"], [other]) is None
    assert compare._origin(network, GENOTYPES["PC_DARTS_cifar"], [other]) is other


# -- several runs ------------------------------------------------------------------------------------------------------


def changed(folder, target, name, **values):
    """A copy of a run folder whose JSON file `name` holds other values."""
    shutil.copytree(folder, target)
    content = json.loads((target / name).read_text())
    (target / name).write_text(json.dumps({**content, **values}))
    return target


def test_runs_are_compared(searched, trained, tmp_path, cheap):
    other = changed(searched, tmp_path / "other", "config.json", seed=7)
    GENOTYPES["PC_DARTS_cifar"].save(other / "genotype.json")
    result = json.loads((trained / "result.json").read_text())
    last = {**result["last"], "test_accuracy": 0.5}
    again = changed(trained, tmp_path / "again", "result.json", last=last)
    folders = (searched, other, trained, again)
    short = {folder: folder.name for folder in folders}  # no two are called the same
    assert len(set(short.values())) == len(folders)
    text = document([Record(folder) for folder in folders])
    found = Page(text)
    assert list(remote_references(text)) == [] and {one["id"] for one in found.of("section")} == OF_BOTH
    seconds = sum(bill["wall_s"] for bill in json.loads((searched / "cost.json").read_text())["stages"].values())
    assert found.row(short[searched])[-2] == f"{number(seconds)} s"
    accuracies = [result["last"]["test_accuracy"], 0.5]
    for folder, accuracy in zip((trained, again), accuracies, strict=True):
        row = found.row(short[folder])
        assert row[0] == "tiny.npz, test" and row[3] == f"{100 * accuracy:.2f} %" and row[-1] == f"{number(seconds)} s"
    spread = f"{100 * np.mean(accuracies):.2f} % ± {100 * np.std(accuracies, ddof=1):.2f}"
    assert spread in found.row("mean of 2")
    entries = [
        {(cell, i // 2, *edge) for cell in ("normal", "reduce") for i, edge in enumerate(getattr(genotype, cell))}
        for genotype in (Genotype.load(searched / "genotype.json"), GENOTYPES["PC_DARTS_cifar"])
    ]
    (row,) = [row for row in found.tables if row and row[0].startswith("2  ")]
    assert row == [f"2  {short[other]}", str(len(entries[0] & entries[1])), "–"]
    labels = [one["aria-label"] for one in found.of("svg") if "aria-label" in one]
    assert "Accuracy on tiny.npz, test, against the all-in cost of the search" in labels


def test_trainings_that_differ_in_more_than_the_seed_have_no_mean(searched, trained, tmp_path, cheap):
    config = json.loads((trained / "config.json").read_text())
    seed = changed(trained, tmp_path / "seed", "config.json", seed=7)
    longer = changed(trained, tmp_path / "longer", "config.json", optim={**config["optim"], "epochs": 99})
    found = Page(document([Record(folder) for folder in (searched, trained, seed, longer)]))
    assert [row[0] for row in found.tables if row and row[0].startswith("mean of")] == ["mean of 2"]


def test_data_sets_of_one_name_are_told_apart(searched, trained, tmp_path, cheap):
    config = json.loads((trained / "config.json").read_text())
    input = {**config["input"], "data": f"/other/{Path(config['input']['data']).name}"}
    other = changed(trained, tmp_path / "other", "config.json", input=input, seed=7)
    found = Page(document([Record(folder) for folder in (searched, trained, other)]))
    names = [found.row(folder.name)[0] for folder in (trained, other)]
    assert all(name.startswith("tiny.npz, test of /") for name in names) and len(set(names)) == 2
    assert not [row for row in found.tables if row and row[0].startswith("mean of")]


def test_a_search_without_a_scorer_shows_no_mixes(copy, cheap):
    ledger = json.loads((copy / "cost.json").read_text())
    ledger["stages"]["scorer"].update(wall_s=0.0, images_forward=0, images_backward=0)
    (copy / "cost.json").write_text(json.dumps(ledger))
    assert "mixes" not in {one["id"] for one in Page(document([Record(copy)])).of("section")}


def test_accuracies_on_other_images_share_neither_axis_nor_mean(searched, trained, tmp_path, cheap):
    """One network is measured on validation images, another on other data; all have one search and differ in seed."""
    result = json.loads((trained / "result.json").read_text())
    last = {name: value for name, value in result["last"].items() if not name.startswith("test_")}
    without = changed(trained, tmp_path / "val-only", "result.json", last=last, best=last)
    config = json.loads((trained / "config.json").read_text())
    other = changed(trained, tmp_path / "other-data", "config.json", input={**config["input"], "data": "/sets/flowers"})
    found = Page(document([Record(folder) for folder in (searched, trained, without, other)]))
    assert [found.row(folder.name)[0] for folder in (trained, without, other)] == [
        "tiny.npz, test", "tiny.npz, validation", "flowers, test"
    ]  # fmt: skip
    charts = [one["aria-label"] for one in found.of("svg") if "all-in cost" in one.get("aria-label", "")]
    assert [label.split("Accuracy on ")[1].split(", against")[0] for label in charts] == [
        "flowers, test", "tiny.npz, test", "tiny.npz, validation"
    ]  # fmt: skip
    assert not [row for row in found.tables if row and row[0].startswith("mean of")]
    assert "Accuracy on the test images" not in found.text["compare"]


def test_a_network_without_test_images_is_called_validated(trained, tmp_path, cheap):
    result = json.loads((trained / "result.json").read_text())
    last = {name: value for name, value in result["last"].items() if not name.startswith("test_")}
    folder = changed(trained, tmp_path / "val-only", "result.json", last=last)
    heading = Page(document([Record(folder)])).text[None]
    assert "validation accuracy, last epoch" in heading and "test accuracy" not in heading


def test_a_backbone_trained_without_mixing_has_no_cells_and_no_mixes(trained, tmp_path, cheap):
    config = json.loads((trained / "config.json").read_text())
    network = {**config["network"], "genotype": None, "backbone": "tiny"}
    folder = changed(trained, tmp_path / "net", "config.json", network=network, mix={**config["mix"], "mix": "none"})
    sections = {one["id"] for one in Page(document([Record(folder)])).of("section")}
    assert sections == OF_A_NETWORK - {"cells", "mixes"}


def test_the_heading_says_when_and_how_long_and_what_is_estimated(written, searched):
    found = Page(written)
    began = json.loads((searched / "env.json").read_text())["date"]
    seconds = sum(bill["wall_s"] for bill in json.loads((searched / "cost.json").read_text())["stages"].values())
    assert f"Began on {began[:10]} {began[11:16]} UTC, took {duration(seconds)}" in found.text[None]
    assert "estimated, all in" in found.text[None] and "which was not run" in found.text["cost"]


def test_random_genotypes_share_as_many_edges_as_the_page_says():
    rng = np.random.default_rng(0)
    shared = [random_genotype(rng).shared_edges(random_genotype(rng)) for _ in range(2000)]
    assert np.mean(shared) == pytest.approx(1.5, abs=0.1)


def test_a_page_too_large_leaves_out_and_says_so(searched, trained, monkeypatch, cheap):
    records = [Record(searched), Record(trained), Record(searched)]
    monkeypatch.setattr(page_module, "LARGEST_PAGE", 150_000)
    text = document(records)
    assert "Left out, as the page would be too large" in text and len(text.encode()) < 250_000
    assert {one["id"] for one in Page(text).of("section")} == OF_BOTH


# -- faults become sentences -------------------------------------------------------------------------------------------

FILES = (
    "config.json", "env.json", "metrics.csv", "genotypes.jsonl", "alphas.npz", "cost.json", "scores.npz", "proxy.json",
    "genotype.json",
)  # fmt: skip
DAMAGES = {
    "missing": lambda content: None,
    "empty": lambda content: b"",
    "cut in half": lambda content: content[: len(content) // 2],
    "an empty object": lambda content: b"{}",
    "a list": lambda content: b"[1, 2]",
    "binary": lambda content: bytes(range(256)) * 4,
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_missing_or_damaged_is_a_sentence(name, copy, cheap):
    content = (copy / name).read_bytes()
    for damage, change in DAMAGES.items():
        (copy / name).unlink(missing_ok=True)
        if (new := change(content)) is not None:
            (copy / name).write_bytes(new)
        found = Page(document([Record(copy)]))
        assert {one["id"] for one in found.of("section")} == OF_A_SEARCH, damage
        said = " ".join(found.text.values())
        if damage == "missing":
            assert f"There is no {name} in {copy}." in said
        elif (name, damage) != ("metrics.csv", "cut in half"):  # a shorter table is a table
            assert name in said, damage


def test_an_empty_folder_is_a_page_of_sentences(tmp_path):
    found = Page(document([Record(tmp_path)]))
    assert {one["id"] for one in found.of("section")} == OF_A_SEARCH and not found.of("svg") and not found.of("img")


def test_data_that_is_gone_or_changed_shows_no_images(copy, npz, tmp_path, cheap):
    config = json.loads((copy / "config.json").read_text())
    for place, words in ((tmp_path / "gone.npz", "there is no such file"), (tmp_path / "other.npz", "has changed")):
        config["input"]["data"] = str(place)
        (copy / "config.json").write_text(json.dumps(config))
        if "other" in place.name:
            arrays = dict(np.load(npz))
            arrays["train_images"] = arrays["train_images"][::-1]
            np.savez(place, **arrays)
        found = Page(document([Record(copy)]))
        assert words in found.text["proxy"] and "CV of 72 images" in found.text["proxy"]
        assert not [one for one in found.of("img") if one["alt"].startswith("image ")]


def test_cifar_is_not_downloaded_for_a_report(copy, tmp_path, cheap, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.CIFAR10.download", lambda self: pytest.fail("a download"))
    config = json.loads((copy / "config.json").read_text())
    config["input"] |= {"data": "cifar10", "data_root": str(tmp_path / "nowhere")}
    (copy / "config.json").write_text(json.dumps(config))
    assert "is not downloaded" in Page(document([Record(copy)])).text["proxy"]


@pytest.mark.parametrize("older", [False, True])
def test_what_a_flag_named_is_shown_and_not_what_lies_in_the_folder(older, copy, searched, tmp_path):
    """An earlier command may have left a proxy and scores there; config.json may be of an older version."""
    other = shutil.copytree(searched, tmp_path / "other")
    manifest = ProxyManifest.load(other / "proxy.json")
    replace(manifest, ratio=0.125).save(other / "elsewhere.json")
    config = json.loads((copy / "config.json").read_text())
    parts = {name: value for name, value in config.items() if name != "given"}

    def give(flag, path):
        given = {flag: str(path)} if older else {"given": config["given"] | {flag: str(path)}}
        (copy / "config.json").write_text(json.dumps(parts | given))

    give("proxy", other / "elsewhere.json")
    record = Record(copy)
    assert record.proxy.ratio == 0.125
    with pytest.raises(ValueError, match=r"was given --proxy .*elsewhere\.json, so there are no scores"):
        _ = record.scores
    give("scores", other / "gone.npz")
    with pytest.raises(ValueError, match=r"There is no .*gone\.npz"):
        _ = Record(copy).scores
    for own in (copy / "proxy.json", Path(config["out"]) / "proxy.json"):  # as the folder is called now, and was then
        give("proxy", own)
        assert Record(copy).proxy.ratio == 0.4 and len(Record(copy).scores.index) == 72


def test_a_report_older_than_its_results_is_written_anew(copy, npz):
    argv = ["--data", str(npz), "--out", str(copy), *TINY, *PAPER]
    report_of_proxy = copy / "report.html"
    report_of_proxy.write_text("of a run that ended with its proxy")
    os.utime(report_of_proxy, (0, 0))
    assert search.main(argv) == 0
    assert Page(report_of_proxy.read_text()).text.keys() >= OF_A_SEARCH
    report_of_proxy.write_text("newer than all results")
    assert search.main(argv) == 0
    assert report_of_proxy.read_text() == "newer than all results"


def test_a_chosen_search_outside_the_folder_is_refused(copy, cheap):
    genotype = json.loads((copy / "genotype.json").read_text())
    genotype["provenance"]["chosen"] = "../../etc"
    (copy / "genotype.json").write_text(json.dumps(genotype))
    assert "names '../../etc' as the chosen search" in Page(document([Record(copy)])).text["search"]


def test_a_report_that_fails_does_not_fail_the_run(searched, monkeypatch):
    data = load_data(DataConfig())
    monkeypatch.setattr(page_module, "document", lambda records: 1 / 0)
    said = report.write_report_of_run(searched, data)
    assert said.startswith("warning: ") and "ZeroDivisionError" in said and said.count("\n") == 0


# -- the command line --------------------------------------------------------------------------------------------------


def test_the_command_writes_where_it_is_told(copy, tmp_path, capsys, cheap):
    (copy / "report.html").unlink()
    assert command_line.main([str(copy)]) == 0 and (copy / "report.html").exists()
    assert command_line.main([str(copy), str(copy), "-o", str(tmp_path / "both.html")]) == 0
    assert "2 runs compared" in (tmp_path / "both.html").read_text()
    assert command_line.main([str(tmp_path / "nowhere")]) == 2
    assert "is not a run folder" in capsys.readouterr().err


# -- landscape and robustness ------------------------------------------------------------------------------------------


def test_landscape_and_robustness_where_their_files_are(copy, cheap):
    axis, rng = np.linspace(-0.5, 0.5, 5), np.random.default_rng(0)
    arrays = {"axis": axis, "slice_axis": axis, "sigmas": np.array([0.01, 0.02]), "loss": np.array(1.25)}
    arrays |= {"surface": rng.random((5, 5)), "slice": rng.random(5), "noise": rng.random((3, 2))}
    arrays["eigenvalues"] = np.array([12.5, 3.5])
    (copy / "landscape").mkdir()
    np.savez(copy / "landscape" / "net.npz", **arrays)
    (copy / "robustness.csv").write_text("run,threat,fgsm_accuracy,images\nnet,white,0.1234,100\n")
    (copy / "proxy.csv").write_text("train/ant/0.png,0,ant\n")  # of --export-list
    np.savez(copy / "own.npz", loss=np.zeros(3))
    found = Page(document([Record(copy)]))
    assert "Loss 1.25; largest eigenvalues 12.5 and 3.5" in found.text["landscape"]
    assert found.row("net") == ["white", "12.34 %", "100"]
    assert not any(name in str(found.text) for name in ("proxy.csv", "own.npz"))
    (copy / "landscape" / "net.npz").write_bytes(b"")
    (copy / "robustness.csv").write_text("")
    found = Page(document([Record(copy)]))
    assert "net.npz" in found.text["landscape"] and "robustness.csv cannot be used" in found.text["robustness"]


def test_the_folder_of_an_analysis_is_shown_when_it_is_passed(searched, tmp_path, cheap):
    axis, rng = np.linspace(-0.5, 0.5, 5), np.random.default_rng(0)
    arrays = {"axis": axis, "slice_axis": axis, "sigmas": np.array([0.01, 0.02]), "loss": np.array(1.25)}
    arrays |= {"surface": rng.random((5, 5)), "slice": rng.random(5), "noise": rng.random((3, 2))}
    (tmp_path / "around").mkdir()
    np.savez(tmp_path / "around" / "net.npz", **arrays, eigenvalues=np.array([12.5, 3.5]))
    (tmp_path / "attacks").mkdir()
    (tmp_path / "attacks" / "grey.csv").write_text("run,threat,fgsm_accuracy\nnet,grey,0.5\n")
    records = [Record(folder) for folder in (searched, tmp_path / "around", tmp_path / "attacks")]
    found = Page(document(records))
    assert {one["id"] for one in found.of("section")} == {*OF_A_SEARCH, "landscape", "robustness"}
    assert "largest eigenvalues 12.5 and 3.5" in found.text["landscape"]
    assert found.row("net") == ["grey", "50.00 %"] and "There is no" not in found.text["landscape"]
    alone = Page(document(records[1:2]))
    assert {one["id"] for one in alone.of("section")} == {"landscape"}


# -- names -------------------------------------------------------------------------------------------------------------


def test_wordnet_ids_are_spelt_out_where_a_list_knows_them(tmp_path):
    ids = ("n01443537", "n02123045", "n02124075", "n99999999", "other")
    for name in ids:
        (tmp_path / "set" / "train" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "set" / "train" / name / "0.png")
    data = open_data(DataConfig(data=str(tmp_path / "set")))
    assert spoken(data) == ("goldfish", "tabby", "Egyptian cat", "n99999999", "other"), "as in ImageNet"
    lines = ["n01443537\tgoldfish, Carassius auratus", "n02123045\tcat, tabby", "n02124075\tcat", "x"]
    (tmp_path / "set" / "words.txt").write_text("\n".join(lines))
    assert spoken(data) == ("goldfish", "cat (n02123045)", "cat (n02124075)", *ids[3:])
    (tmp_path / "set" / "words.txt").unlink()
    (tmp_path / "LOC_synset_mapping.txt").write_text("n01443537 goldfish, Carassius auratus\n")
    assert spoken(data) == ("goldfish", *ids[1:])


# -- charts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("log", [False, True])
def test_ticks_are_few_round_and_inside(log):
    rng = np.random.default_rng(0)
    for _ in range(300):
        values = 10.0 ** rng.uniform(-6, 6, 2) * (1 if log else rng.choice([-1, 1], 2))
        scale = scale_of(values.tolist(), 0.0, 100.0, log=log)
        ticks = scale.ticks()
        assert 2 <= len(ticks) <= (12 if log else 7) and all(scale.low <= tick * (1 + 1e-9) for tick in ticks)
        assert all(-1e-6 <= scale(tick) <= 100 + 1e-6 for tick in ticks)
        steps = np.diff(np.log10(ticks) if log else ticks)
        np.testing.assert_allclose(steps, steps[0], rtol=1e-6)


def test_no_two_ticks_read_alike():
    for low, high in ((2.0794401, 2.0794415), (0, 3e-7), (99_990, 100_010), (-1e-4, 2e-4)):
        scale = Scale(low, high, 0, 1)
        labels = scale.labels(scale.ticks())
        assert len(set(labels)) == len(labels) > 1, labels
    assert Scale(0, 1, 0, 1).labels([0, 0.5, 1.0]) == ["0", "0.5", "1"]


def test_names_below_bars_do_not_overlap():
    for classes in (3, 10, 30):
        names = [f"a long class name {i}" for i in range(classes)]
        found = Page(stacked_bars("t", names, {"a": [1] * classes}, "class"))
        middle = [float(one["x"]) for one in found.of("text") if one["class"] == "tick middle"]
        if classes > 3:
            assert len(middle) in (0, classes)
        room = min(np.diff(middle), default=math.inf)
        shown = re.findall(r">(a[^<]*)</text>", str(stacked_bars("t", names, {"a": [1] * classes}, "class")))
        assert all(6 * len(name) < room for name in shown)


def test_numbers_never_change_to_powers_of_ten_by_rounding():
    assert [number(value, digits) for value, digits in ((9999.7, 4), (99.97, 2), (1234.56, 4), (0.12345, 4))] == [
        "10,000", "100", "1,235", "0.1235"
    ]  # fmt: skip
    assert number(-9999.7) == "-10,000" and number(1.234e-7) == "1.234e-07"


def test_whole_numbers_have_whole_ticks():
    assert scale_of([0, 1, 2], 0, 1).ticks() == [0, 1, 2] and Scale(0, 2, 0, 1).ticks() == [0, 0.5, 1, 1.5, 2]


def test_a_line_goes_through_its_points():
    """Positions are an affine function of the values, of their logarithms on a log scale; gaps are left out."""
    x, y = np.arange(6), np.array([3.0, 1.0, np.nan, 10.0, 0.0, 100.0])
    for log, kept in ((False, [0, 1, 3, 4, 5]), (True, [0, 1, 3, 5])):
        drawn = Page(line_chart("t", [Series("a", x, y)], "x", "y", log=log))
        (path,) = [one["d"] for one in drawn.of("path") if one.get("class", "").startswith("line")]
        points = np.array([point.split() for point in path[1:].split("L")], dtype=float)
        for column, values in ((0, x[kept]), (1, np.log10(y[kept]) if log else y[kept])):
            fit = np.polyfit(values, points[:, column], 1)
            np.testing.assert_allclose(points[:, column], np.polyval(fit, values), atol=0.11)
            assert (fit[0] > 0) == (column == 0)
        assert len(drawn.of("circle")) == len(kept)
    assert "no values" in line_chart("t", [Series("a", [0.0], [float("nan")])], "x", "y")


def test_histogram_bars_hold_every_value():
    values = np.random.default_rng(0).normal(size=500)
    marked = values > 1
    titles = re.findall(r"([\d,]+) images, ([\d,]+) selected", histogram("t", values, marked, "v"))
    edges = np.histogram_bin_edges(values, 48)
    shown = {(int(n), int(m)) for n, m in titles}
    counts = [np.histogram(v, edges)[0] for v in (values, values[marked])]
    assert shown == {(n, m) for n, m in zip(*(c.tolist() for c in counts), strict=True) if n}


def test_stacked_bars_reach_their_sums():
    parts = {"a": [1, 2, 3], "b": [3, 2, 0]}
    bars = Page(stacked_bars("t", ["x", "y", "z"], parts, "class")).of("rect")
    heights = np.array([float(one["height"]) for one in bars]).reshape(2, 3)
    np.testing.assert_allclose(heights / heights[0, 0], [[1, 2, 3], [3, 2, 0]], atol=0.02)


def test_a_heat_panel_is_its_values():
    values = np.random.default_rng(0).normal(size=(14, 5))
    drawn = Page(drawing(panel_figure(values, 2.0, (3, 4)), "t"))
    (image,) = drawn.of("image")
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(image["xlink:href"].split(",")[1]))))
    assert pixels.shape == (14, 5, 4) and len(drawn.of("use")) == 2, "a dot for each of the two rows"
    for row, column in np.ndindex(values.shape):
        value = values[row, column]
        np.testing.assert_allclose(pixels[row, column, :3], ImageColor.getrgb(RISE if value > 0 else FALL), atol=1)
        assert abs(pixels[row, column, 3] - 255 * min(1, abs(value) / 2)) <= 2
    rows = [14 * float(dot["y"]) / (126 - 16) for dot in drawn.of("use")]
    assert [math.floor(row) for row in rows] == [3, 4]


def test_figures_take_on_the_colours_of_the_page():
    """In SVG every colour that a cell is drawn in is one of the style sheet's, and no name is used twice on a page."""
    cells = [GENOTYPES["DARTS_V2"].normal, GENOTYPES["DARTS_V2"].reduce]
    drawn = "".join(drawing(draw_cell(cell, reduces=False), f"cell {i}") for i, cell in enumerate(cells))
    assert not re.findall("#[0-9a-f]{6}", drawn)
    style = Path(report.__file__).with_name("style.css").read_text(encoding="utf-8")
    used = set(re.findall(r"var\(--(\w+)\)", drawn))
    assert used <= set(PAGE_COLOURS.values()) and {"ground", "ink", "sep", "c0"} <= used
    assert all(style.count(f"--{name}: #") == 2 for name in PAGE_COLOURS.values()), "in light and in dark"
    names = [attributes["id"] for _, attributes in Page(drawn).tags if "id" in attributes]
    assert names and len(names) == len(set(names))


def test_numbers_are_short_and_right():
    assert [number(v) for v in (12345, 12345.6, 0.123456, 1.23456e-5, 0, None, float("nan"))] == [
        "12,345", "12,346", "0.1235", "1.235e-05", "0", "–", "–",
    ]  # fmt: skip


# -- live --------------------------------------------------------------------------------------------------------------


def test_tensorboard_shows_alpha_cells_and_flags(searched):
    events = EventAccumulator(str(searched)).Reload()
    tags = events.Tags()
    assert {"search/alpha", "search/cells"} <= set(tags["images"]) and "search/val_loss" in tags["scalars"]
    assert [event.step for event in events.Images("search/cells")] == [2, 4, 6]
    flags = events.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    assert b"selection.ratio" in flags and b"search.arch_lr" in flags


def test_the_heat_map_shows_where_alpha_moved():
    """Only one entry of one cell moves: its operations' panels change in its row, and the other cell's do not."""
    start = {name: torch.zeros(14, 8) for name in ("alphas_normal", "alphas_reduce")}
    moved = {
        **start,
        "alphas_normal": torch.zeros(14, 8).index_put((torch.tensor(3), torch.tensor(2)), torch.tensor(1.0)),
    }
    drawn = live.draw_alphas([start, moved])
    panels = np.stack([axes.images[0].get_array() for axes in drawn.axes])  # (2 * 8, 14, records)
    expected = moved["alphas_normal"].double().softmax(-1).numpy() - 1 / 8
    np.testing.assert_allclose(panels[:8, :, 1].T, expected)
    assert not panels[:, :, 0].any() and not panels[8:].any()
    pixels = pixels_of(drawn)
    assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3 and np.ptp(pixels) > 200
