"""From images to a proxy dataset: mix K images, score how informative each image is, and select by score.

The whole pipeline, from a notebook (or `nas-kmix search` and `nas-kmix train` from a shell):

    import nas_kmix
    found = nas_kmix.search(data="digits")  # found.genotype, found.proxy, found.table, found.folder
    trained = nas_kmix.train(data="digits", genotype=found.genotype)  # trained.result, trained.network()

The parts can also be used alone:

    from nas_kmix.mixing import DCutMix, DMixup
    from nas_kmix.scoring import ScoringConfig, score_dataset
    from nas_kmix.sampling import select
    from nas_kmix.proxy import ProxyManifest
"""

from typing import TYPE_CHECKING, Any

from nas_kmix.version import __version__

if TYPE_CHECKING:
    from nas_kmix.commands.notebook import search, train

__all__ = ["__version__", "search", "train"]


def __getattr__(name: str) -> Any:
    """Load the two pipelines on first use, so that a part does not wait for the whole."""
    if name not in ("search", "train"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from nas_kmix.commands import notebook

    return getattr(notebook, name)
