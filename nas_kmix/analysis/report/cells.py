"""Section `cells`: both cells drawn, the genotype as text, and what networks of it cost."""

from __future__ import annotations

from darts_space.cell import NODES, Edge
from darts_space.genotype import COLLAPSE_POOLS, COLLAPSE_SKIPS
from nas_kmix.analysis.cell_picture import ROW_INCHES, draw_cell
from nas_kmix.analysis.description import COUNTS, edge_text, network_costs
from nas_kmix.analysis.report.drawings import drawing
from nas_kmix.analysis.report.extras import is_run
from nas_kmix.analysis.report.markup import Markup, figure, join, sentence, table, tag
from nas_kmix.analysis.report.parts import UNREADABLE, show
from nas_kmix.analysis.report.record import Record

COST_HEAD = ("network", "parameters", "with auxiliary head", "multiply-adds", "published convention")


def applies(record: Record) -> bool:
    """Whether the run has cells: a trained backbone has none, and analyses are about networks of other runs."""
    try:
        return is_run(record) and not (record.trains and record.config["network"]["genotype"] is None)
    except UNREADABLE:
        return True  # the section says what is wrong


def section(record: Record) -> Markup:
    """Cells, genotype text, skip connections, parameters and multiply-adds of one run."""
    return show(record, cells=_drawings, genotype_text=_text, cost_of_its_networks=_costs)


def cell_drawing(edges: tuple[Edge, ...], title: str, *, reduces: bool) -> Markup:
    """One cell, inputs on the left."""
    alt = f"{title}: " + "; ".join(
        f"node {node} is {edge_text(edges[2 * node])} plus {edge_text(edges[2 * node + 1])}" for node in range(NODES)
    )
    drawn = draw_cell(edges, reduces=reduces)
    # Every cell at one scale, on a narrow screen at a smaller one, from where it scrolls.
    wide, narrow = (drawn.get_figwidth() / ROW_INCHES * rem for rem in (1.6, 1.4))
    style = f"width:{wide:.1f}rem;min-width:{narrow:.1f}rem;max-width:100%"
    return tag("div", tag("div", drawing(drawn, alt, "drawn cell"), style=style), class_="scroll")


def _drawings(record: Record) -> Markup:
    genotype = record.genotype
    how = "c with index k−2 and k−1 are the outputs of the two cells before; each node adds two operations' results."
    return join(
        figure(f"{name} cell", cell_drawing(edges, f"{name} cell", reduces=reduces), caption)
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
    skips, pools = (" and ".join(map(str, counts)) for counts in (genotype.skip_connections(), genotype.pools()))
    health = (
        f"Of the 8 operations of the normal and of the reduction cell {skips} are skip connections, {pools} are pools. "
        f"A search has collapsed if its normal cell has {COLLAPSE_SKIPS} or more skip connections, or {COLLAPSE_POOLS} "
        "or more pools."
    )
    return join([tag("div", *tables, class_="halves"), tag("pre", genotype.to_text()), sentence(health)])


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
