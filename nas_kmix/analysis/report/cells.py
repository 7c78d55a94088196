"""Section `cells`: both cells drawn, the genotype as text, and what networks of it cost."""

from __future__ import annotations

from darts_space.cell import NODES, Edge
from darts_space.genotype import COLLAPSE_SKIPS
from nas_kmix.analysis.cell_layout import LABEL_HEIGHT, LABEL_WIDTH, OUTPUT, STATE_HEIGHT, STATE_WIDTH, Layout, lay_out
from nas_kmix.analysis.description import COUNTS, edge_text, network_costs
from nas_kmix.analysis.report.charts import svg
from nas_kmix.analysis.report.markup import Markup, figure, join, sentence, table, tag
from nas_kmix.analysis.report.parts import show
from nas_kmix.analysis.report.record import Record

UNIT = 26.0  # of the layout's lengths
MARGIN = 0.5
SUBSCRIPTS = {0: "k−2", 1: "k−1", OUTPUT: "k"}  # of c, at the cell's inputs and output
COST_HEAD = ("network", "parameters", "with auxiliary head", "multiply-adds", "published convention")


def section(record: Record) -> Markup:
    """Cells, genotype text, skip connections, parameters and multiply-adds of one run."""
    return show(record, cells=_drawings, genotype_text=_text, cost_of_its_networks=_costs)


def cell_svg(edges: tuple[Edge, ...], title: str, *, reduces: bool) -> Markup:
    """One cell, inputs on the left; the colours of the page's style sheet tell kinds of operations apart."""
    layout = lay_out(edges)
    top = layout.height / 2
    shift = f"translate({MARGIN * UNIT:g} {top * UNIT:.1f}) scale({UNIT:g})"
    drawn = tag("g", *_lines(layout), *_labels(layout, edges, reduces), *_states(layout), transform=shift)
    alt = f"{title}: " + "; ".join(
        f"node {node} is {edge_text(edges[2 * node])} plus {edge_text(edges[2 * node + 1])}" for node in range(NODES)
    )
    width = (layout.width + 2 * MARGIN) * UNIT
    drawing = svg(alt, drawn, width=width, height=layout.height * UNIT, class_="cell")
    # Every cell at one scale, on a narrow screen at a smaller one, from where it scrolls.
    wide, narrow = (width / UNIT * rem for rem in (1.6, 1.3))
    return tag("div", drawing, style=f"width:{wide:.1f}rem;min-width:{narrow:.1f}rem;max-width:100%")


def _lines(layout: Layout) -> list[Markup]:
    paths = []
    for bundle in layout.bundles:
        curves = []
        for (x0, y0), (x1, y1) in bundle:
            middle = (x0 + x1) / 2
            curves.append(f"M{x0:g} {y0:g}C{middle:g} {y0:g} {middle:g} {y1:g} {x1:g} {y1:g}")
        # Below in the colour of the page, so that where two lines cross one is seen to pass over the other.
        paths += [tag("path", d="".join(curves), class_=class_) for class_ in ("halo", "wire")]
    return paths + [tag("circle", cx=x, cy=y, r=0.1, class_="branch") for x, y in layout.branches]


def _labels(layout: Layout, edges: tuple[Edge, ...], reduces: bool) -> list[Markup]:
    labels = []
    for place, (x, y) in layout.labels.items():
        operation, source = edges[place]
        box = {"x": x - LABEL_WIDTH / 2, "y": y - LABEL_HEIGHT / 2, "width": LABEL_WIDTH, "height": LABEL_HEIGHT}
        labels.append(tag("rect", **box, rx=0.2, class_=f"op {operation.split('_')[0]}"))
        labels.append(tag("text", operation + (" /2" if reduces and source < 2 else ""), x=x, y=y + 0.14))
    return labels


def _states(layout: Layout) -> list[Markup]:
    states = []
    for state, (x, y) in layout.states.items():
        name: Markup | str = str(state - 2)
        if state in SUBSCRIPTS:
            name = join(["c", tag("tspan", SUBSCRIPTS[state], dy="0.14", class_="sub")])
        states.append(tag("ellipse", cx=x, cy=y, rx=STATE_WIDTH / 2, ry=STATE_HEIGHT / 2, class_="state"))
        states.append(tag("text", name, x=x, y=y + 0.16, class_="state-name"))
    return states


def _drawings(record: Record) -> Markup:
    genotype = record.genotype
    how = "c with index k−2 and k−1 are the outputs of the two cells before; each node adds two operations' results."
    return join(
        figure(f"{name} cell", tag("div", cell_svg(edges, f"{name} cell", reduces=reduces), class_="scroll"), caption)
        for name, edges, reduces, caption in (
            ("Normal", genotype.normal, False, how),
            ("Reduction", genotype.reduce, True, "“/2” marks operations of stride 2, which halve the resolution."),
        )
    )


def _text(record: Record) -> Markup:
    genotype = record.genotype
    rows = [
        (node, *(tag("code", edge_text(edge)) for edge in cell[2 * node : 2 * node + 2]))
        for cell in (genotype.normal, genotype.reduce)
        for node in range(NODES)
    ]
    tables = [
        table(("node", "first edge", "second edge"), part, caption=f"The {name} cell in words", text_columns=3)
        for name, part in (("normal", rows[:NODES]), ("reduction", rows[NODES:]))
    ]
    normal, reduction = genotype.skip_connections()
    skips = f"Skip connections: {normal} of 8 operations in the normal cell, {reduction} of 8 in the reduction cell. "
    skips += f"{COLLAPSE_SKIPS} or more in the normal cell are the known sign of a collapsed search."
    return join([tag("div", *tables, class_="halves"), tag("pre", genotype.to_text()), sentence(skips)])


def _costs(record: Record) -> Markup:
    genotype = record.genotype
    rows = [(name, *(f"{found[key]:,}" for key in COUNTS)) for name, found in network_costs(genotype).items()]
    if record.trains and record.path("result.json").is_file():
        network, result = record.result["network"], record.result
        name = f"trained here: {network['kind']}, C={network['channels']}, L={network['layers']}"
        rows.append((name, *(f"{result[key]:,}" for key in COUNTS)))
    how = (
        "Multiply-adds of one image: of convolutions and linear layers; and by the convention behind the papers' "
        "tables, with two per BatchNorm output and one per ReLU output besides. 10 and 1,000 classes."
    )
    return join([table(COST_HEAD, rows, caption="Parameters and multiply-adds"), sentence(how, "note")])
