"""A genotype in words and numbers: its edges, and what the networks of the papers' presets cost with it."""

from __future__ import annotations

import torch

from darts_space import CifarNetwork, Genotype, ImageNetNetwork, cost
from darts_space.cell import NODES, Edge

COUNTS = ("params_without_aux", "params", "macs", "macs_published")  # of `darts_space.cost`
NETWORKS = (("CIFAR, C=36, L=20", CifarNetwork, 32), ("ImageNet, C=48, L=14", ImageNetNetwork, 224))


def describe(genotype: Genotype) -> str:
    """Both cells, a line per node, and what the networks of the two presets cost."""
    lines = []
    for name, edges in (("normal cell", genotype.normal), ("reduction cell", genotype.reduce)):
        lines.append(name)
        for node in range(NODES):
            first, second = (edge_text(edge) for edge in edges[2 * node : 2 * node + 2])
            lines.append(f"  node {node} = {first} + {second}")
    columns = "{:24}{:>12}{:>22}{:>16}{:>22}"
    lines.append(columns.format("cost", "parameters", "with auxiliary head", "multiply-adds", "published convention"))
    for name, found in network_costs(genotype).items():
        lines.append(columns.format(f"  {name}", *(f"{found[key]:,}" for key in COUNTS)))
    return "\n".join(lines)


def network_costs(genotype: Genotype) -> dict[str, dict[str, int]]:
    """`darts_space.cost` of the papers' networks, for 10 CIFAR classes and for ImageNet's 1,000, by their names."""
    generator = torch.Generator()  # so that PyTorch's own is left alone
    return {name: cost(network(genotype, generator=generator), size) for name, network, size in NETWORKS}


def edge_text(edge: Edge) -> str:
    """An edge as text, such as `sep_conv_3x3(c_k-1)`."""
    operation, source = edge
    return f"{operation}({('c_k-2', 'c_k-1')[source] if source < 2 else f'node {source - 2}'})"
