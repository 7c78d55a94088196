"""Lay out a cell for drawing: eight (operation, input) edges in, a `Layout` of points out.

A cell (DARTS section 2.1) runs from left to right: its two inputs c_{k-2} and c_{k-1}, the nodes 0..3, each the sum of
two labelled edges, and c_{k}, the concatenation of the nodes. Nodes stand in layers by their depth. A layer is a
stack of rows: each node takes two, one for the label of each of its edges, and each state that is needed further right
takes one for its line to pass. So labels cannot overlap, and lines cross only between layers; the order of the rows is
one with the fewest crossings. The height of a row is the unit of all lengths.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

from darts_space.cell import NODES, Edge

OUTPUT = 2 + NODES  # the state c_{k}, after the two inputs and the nodes

LABEL_WIDTH, LABEL_HEIGHT = 3.75, 0.65
STATE_WIDTH, STATE_HEIGHT = 1.5, 1.0
GAP = 2.5  # between layers, where lines change their rows
STUB = 1.25  # between the labels of a node and the node
LAYER = GAP + LABEL_WIDTH + STUB + STATE_WIDTH

Point = tuple[float, float]


@dataclass
class Layout:
    """Where everything is: x runs to the right from 0, y downwards, centred on 0."""

    states: dict[int, Point] = field(default_factory=dict)
    """Centres of the seven states."""
    labels: dict[int, Point] = field(default_factory=dict)
    """Centres of the labels, by the place of their edge in the genotype."""
    bundles: list[list[tuple[Point, Point]]] = field(default_factory=list)
    """Lines that part from one point or meet in one; each from a point to one on its right, level at both."""
    branches: list[Point] = field(default_factory=list)
    """Points at which a line that has passed a layer branches."""
    width: float = 0.0
    height: float = 0.0


class Layers:
    """Which states stand in each layer of a cell or pass through it, and the best order of them."""

    def __init__(self, edges: tuple[Edge, ...]):
        self.edges = edges
        self.depth = [0, 0]
        for node in range(NODES):
            self.depth.append(1 + max(self.depth[source] for _, source in self._inputs(2 + node)))
        self.last = max(self.depth)
        last_use = [max(self.depth[2 + i // 2] for i, (_, source) in enumerate(edges) if source == s) for s in (0, 1)]
        last_use += [self.last + 1] * NODES  # every node goes on to the output
        self.members = [
            [s for s in range(OUTPUT) if self.depth[s] == layer or self.depth[s] < layer < last_use[s]]
            for layer in range(self.last + 1)
        ]

    def _inputs(self, state: int) -> tuple[Edge, ...]:
        return self.edges[2 * (state - 2) : 2 * (state - 2) + 2]

    def rows(self, order: tuple[int, ...], layer: int) -> dict[int, float]:
        """The y of each member of a layer, stacked in this order; a node takes two rows, a passing line one."""
        heights = [2.0 if self.depth[state] == layer else 1.0 for state in order]
        tops = itertools.accumulate(heights, initial=-sum(heights) / 2)
        return {state: top + height / 2 for state, top, height in zip(order, tops, heights, strict=False)}

    def label_rows(self, state: int, y: float, sources: dict[int, float]) -> dict[int, float]:
        """The y of a node's two labels by their place in the genotype, the one with the higher source above."""
        first = 2 * (state - 2)
        places = sorted((first, first + 1), key=lambda place: sources[self.edges[place][1]])
        return {places[0]: y - 0.5, places[1]: y + 0.5}

    def connections(
        self, sources: dict[int, float], order: tuple[int, ...], layer: int
    ) -> list[tuple[int, float, float]]:
        """(state, y where it leaves the layer before, y where it enters this one) of all lines between the two."""
        if layer > self.last:
            return [(state, y, 0.0) for state, y in sources.items()]
        found = []
        for state, y in self.rows(order, layer).items():
            if self.depth[state] < layer:
                found.append((state, sources[state], y))
                continue
            for place, row in self.label_rows(state, y, sources).items():
                source = self.edges[place][1]
                found.append((source, sources[source], row))
        return found

    def best_orders(self) -> list[tuple[int, ...]]:
        """An order for each layer, with the fewest crossings and then the shortest way up and down.

        Only neighbouring layers affect each other, so the best way to reach each order of a layer is one more step
        from the best ways to reach the orders of the layer before.
        """
        best = {(0, 1): (0.0, [(0, 1)])}
        for layer in range(1, self.last + 2):
            orders = itertools.permutations(self.members[layer]) if layer <= self.last else [()]
            best = {
                order: min(
                    (
                        before + self._badness(self.connections(self.rows(way[-1], layer - 1), order, layer)),
                        [*way, order],
                    )
                    for before, way in best.values()
                )
                for order in orders
            }
        return best[()][1][:-1]

    @staticmethod
    def _badness(connections: list[tuple[int, float, float]]) -> float:
        pairs = itertools.combinations(connections, 2)
        crossings = sum((a[1] - b[1]) * (a[2] - b[2]) < 0 for a, b in pairs)
        return 100 * crossings + sum(abs(start - end) for _, start, end in connections)


def lay_out(edges: tuple[Edge, ...]) -> Layout:
    """Places for the states, labels and lines of one cell."""
    layers = Layers(edges)
    orders = layers.best_orders()
    layout = Layout(states={0: (STATE_WIDTH / 2, -1.0), 1: (STATE_WIDTH / 2, 1.0)})
    sources = layers.rows(orders[0], 0)
    right = STATE_WIDTH  # where the layer before ends
    for layer, order in enumerate([*orders[1:], ()], start=1):
        left = right + GAP
        connections = layers.connections(sources, order, layer)
        if layer > layers.last:
            layout.bundles.append([((right, start), (left, end)) for _, start, end in connections])
            break
        for state, y in sources.items():
            leaving = [((right, y), (left, end)) for source, _, end in connections if source == state]
            layout.bundles.append(leaving)
            if layers.depth[state] < layer - 1 and len(leaving) > 1:
                layout.branches.append((right, y))
        right += LAYER
        rows = layers.rows(order, layer)
        for state, y in rows.items():
            if layers.depth[state] < layer:
                layout.bundles.append([((left, y), (right, y))])
                continue
            layout.states[state] = (right - STATE_WIDTH / 2, y)
            labels = layers.label_rows(state, y, sources)
            layout.labels |= {place: (left + LABEL_WIDTH / 2, row) for place, row in labels.items()}
            layout.bundles.append([((left + LABEL_WIDTH, row), (right - STATE_WIDTH, y)) for row in labels.values()])
        sources = rows
    layout.states[OUTPUT] = (left + STATE_WIDTH / 2, 0.0)
    layout.width = left + STATE_WIDTH
    layout.height = 2 * max(abs(y) + 0.7 for _, y in [*layout.states.values(), *layout.labels.values()])
    return layout
