"""Genotypes printed, converted and drawn: the layout by its geometry, the command line by what it leaves."""

import itertools
import json
import math
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from darts_space import GENOTYPES, PRIMITIVES, Genotype, random_genotype
from nas_kmix.analysis.cell_layout import (
    LABEL_HEIGHT,
    LABEL_WIDTH,
    OUTPUT,
    STATE_HEIGHT,
    STATE_WIDTH,
    Layers,
    lay_out,
)
from nas_kmix.analysis.cell_picture import draw_cells
from nas_kmix.analysis.cells import main

CELLS = [
    cell
    for genotype in [*GENOTYPES.values(), *(random_genotype(np.random.default_rng(seed)) for seed in range(60))]
    for cell in (genotype.normal, genotype.reduce)
]
NAMES = {0: "c_k-2", 1: "c_k-1", 2: "node 0", 3: "node 1", 4: "node 2"}


# --- The layout


def rectangles(layout):
    """(left, right, top, bottom) of all labels and states."""
    for points, width, height in (
        (layout.labels, LABEL_WIDTH, LABEL_HEIGHT),
        (layout.states, STATE_WIDTH, STATE_HEIGHT),
    ):
        for x, y in points.values():
            yield x - width / 2, x + width / 2, y - height / 2, y + height / 2


def test_labels_and_states_stand_apart_and_inside():
    for cell in CELLS:
        layout = lay_out(cell)
        boxes = list(rectangles(layout))
        assert len(boxes) == 8 + 7
        for a, b in itertools.combinations(boxes, 2):
            assert a[1] < b[0] or b[1] < a[0] or a[3] < b[2] or b[3] < a[2]
        for left, right, top, bottom in boxes:
            assert left >= 0 and right <= layout.width
            assert -layout.height / 2 < top and bottom < layout.height / 2


def test_no_line_touches_a_label_that_is_not_its_own():
    for cell in CELLS:
        layout = lay_out(cell)
        boxes = list(rectangles(layout))
        for start, end in itertools.chain(*layout.bundles):
            for left, right, top, bottom in boxes:
                if start[0] < right and left < end[0]:  # beside a label or state, so it passes level
                    assert start[1] == end[1] and not top < start[1] < bottom


def test_lines_join_each_label_to_its_source_and_its_node():
    for cell in CELLS:
        layout = lay_out(cell)
        lines = list(itertools.chain(*layout.bundles))
        exits = {(x + STATE_WIDTH / 2, y): state for state, (x, y) in layout.states.items()}
        entries = {(x - STATE_WIDTH / 2, y): state for state, (x, y) in layout.states.items()}

        def source_of(point, lines=lines, exits=exits):
            while point not in exits:
                (point,) = [start for start, end in lines if end == point]
            return exits[point]

        for place, (x, y) in layout.labels.items():
            assert source_of((x - LABEL_WIDTH / 2, y)) == cell[place][1]
            (end,) = [end for start, end in lines if start == (x + LABEL_WIDTH / 2, y)]
            assert entries[end] == 2 + place // 2
        last = [start for start, end in lines if entries.get(end) == OUTPUT]
        assert sorted(map(source_of, last)) == [2, 3, 4, 5]
        assert len(lines) == len(set(lines)), "a line that is drawn twice looks thicker"


def drawn_crossings(layout):
    """Pairs of lines between the same layers that change their order."""
    pairs = itertools.combinations(itertools.chain(*layout.bundles), 2)
    return sum(a[0][0] == b[0][0] and (a[0][1] - b[0][1]) * (a[1][1] - b[1][1]) < 0 for a, b in pairs)


def fewest_crossings(cell):
    """Over all orders of all layers and of the labels of all nodes; None where those are too many to try."""
    layers = Layers(cell)
    ways = [list(itertools.permutations(members)) for members in layers.members[1:]]
    ways += [(cell[2 * node : 2 * node + 2], cell[2 * node : 2 * node + 2][::-1]) for node in range(4)]
    if math.prod(map(len, ways)) > 6000:
        return None

    def crossings(*choices):
        total, places = 0, {0: 0, 1: 1}
        for layer, order in enumerate(choices[:-4], start=1):
            rows = []  # the state that each row's line comes from
            for state in order:
                own = layers.depth[state] == layer
                rows += [source for _, source in choices[state - 6]] if own else [state]
            total += sum(places[above] > places[below] for above, below in itertools.combinations(rows, 2))
            places = {state: place for place, state in enumerate(order)}
        return total

    return min(itertools.starmap(crossings, itertools.product(*ways)))


def test_lines_cross_as_rarely_as_possible():
    tried = 0
    for cell in CELLS[:60]:
        if (fewest := fewest_crossings(cell)) is not None:
            assert drawn_crossings(lay_out(cell)) == fewest
            tried += 1
    assert tried >= 10


@pytest.mark.parametrize("operation", PRIMITIVES[1:])
def test_labels_hold_their_text(operation):
    other = "sep_conv_5x5"
    cell = [(operation, 0), (other, 1)] * 4
    figure = draw_cells(Genotype(cell, (2, 3, 4, 5), cell, (2, 3, 4, 5)), "title")
    renderer = FigureCanvasAgg(figure).get_renderer()
    axes = figure.axes[1]  # the reduction cell, whose texts are longer
    texts = [text for text in axes.texts if "_" in text.get_text() and "$" not in text.get_text()]
    assert [text.get_text() for text in texts].count(f"{operation} /2") == (8 if operation == other else 4)
    scale = axes.transData.transform([(0, 0), (LABEL_WIDTH, 0)])[:, 0]
    assert all(text.get_window_extent(renderer).width < 0.9 * (scale[1] - scale[0]) for text in texts)


# --- The command line


def test_a_genotype_is_printed_with_its_cost(capsys):
    assert main(["PC_DARTS_cifar"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for part, edges in ((1, GENOTYPES["PC_DARTS_cifar"].normal), (6, GENOTYPES["PC_DARTS_cifar"].reduce)):
        for node in range(4):
            first, second = (f"{name}({NAMES[source]})" for name, source in edges[2 * node : 2 * node + 2])
            assert lines[part + node] == f"  node {node} = {first} + {second}"
    assert lines[11].split()[-4:] == ["3,634,678", "4,111,104", "556,670,592", "575,526,528"]
    assert lines[12].split()[-4:] == ["5,270,560", "6,531,336", "571,137,408", "585,945,600"]


def test_conversions_are_inverse_to_each_other(tmp_path, capsys):
    genotype = random_genotype(np.random.default_rng(7))
    legacy, new = tmp_path / "legacy.txt", tmp_path / "made" / "new.json"
    assert main([genotype.to_text(), "--out", str(new)]) == 0
    assert Genotype.load(new) == genotype
    assert main([str(new), "--out", str(legacy)]) == 0
    assert legacy.read_text() == genotype.to_text() + "\n"
    assert capsys.readouterr().out == "", "what is written is not printed too"
    assert main([str(legacy), "--to", "json"]) == 0
    assert Genotype.from_json(json.loads(capsys.readouterr().out)) == genotype
    assert main([str(new), "--to", "text"]) == 0
    assert capsys.readouterr().out == genotype.to_text() + "\n"
    assert main([str(new), "--to", "text", "--out", str(tmp_path / "cells.py")]) == 0
    assert Genotype.load(tmp_path / "cells.py") == genotype


def test_a_png_is_drawn(tmp_path):
    assert main(["DARTS_V2", "--to", "text", "--picture", str(tmp_path / "cells.png")]) == 0
    image = np.asarray(Image.open(tmp_path / "cells.png").convert("RGB"))
    height, width, _ = image.shape
    assert 800 < height < 2000 and 1000 < width < 2500
    blue = (image == (0xCF, 0xE6, 0xF5)).all(2)
    assert 0.01 < blue[: height // 2].mean() < 0.2, "separable convolutions are in the normal cell"
    assert not blue[height * 6 // 10 :].any(), "and not in the reduction cell"


def test_an_svg_is_the_same_every_time_and_holds_all_labels(tmp_path):
    paths = [tmp_path / name for name in ("one.svg", "two.svg")]
    for path in paths:
        assert main(["PC_DARTS_image", "--to", "text", "--picture", str(path)]) == 0
    assert paths[0].read_bytes() == paths[1].read_bytes()
    texts = [
        "".join(element.itertext()).strip()
        for element in ElementTree.parse(paths[0]).iter()
        if element.tag.endswith("text")
    ]
    genotype = GENOTYPES["PC_DARTS_image"]
    expected = [name for name, _ in genotype.normal]
    expected += [f"{name} /2" if source < 2 else name for name, source in genotype.reduce]
    assert sorted(text for text in texts if text.split(" ")[0] in PRIMITIVES) == sorted(expected)
    assert "PC_DARTS_image" in texts


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.json"], "'nowhere.json' is neither a genotype file nor one of PC_DARTS_cifar"),
        (["Genotype(normal=__import__('os'))"], "Genotype(...) takes"),
        (["DARTS_V1", "--picture", "{}/cells.gif"], "cells.gif must end in .png or .svg"),
        (["DARTS_V1", "--out", "{}/cells.yaml"], "cells.yaml ends in neither .json nor .txt; choose a form with --to"),
        (["DARTS_V1", "--picture", "{}/file/cells.png"], "cells.png could not be written"),
        (["DARTS_V1", "--out", "{}/file/cells.json"], "cells.json could not be written"),
        (["DARTS_V1", "--out", "{}/file/cells.txt"], "cells.txt could not be written"),
    ],
)
def test_what_cannot_be_done_is_a_sentence(tmp_path, capsys, arguments, message):
    (tmp_path / "file").write_text("")
    code = main([argument.replace("{}", str(tmp_path)) for argument in arguments])
    assert code == (1 if "written" in message else 2)
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and message in captured.err
    assert captured.err.count("\n") == 1 and "Errno" not in captured.err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_unknown_flags_exit_with_2(capsys):
    assert main(["DARTS_V1", "--form", "json"]) == 2
    assert "--form" in capsys.readouterr().err
