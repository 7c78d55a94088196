"""From images to a proxy dataset: K-image mixing, scores of how informative an image is, and a selection by them.

The whole is `search.py`, whose stages lie in `pipeline`. The parts can be used alone:

    from nas_kmix.mixing import DCutMix, DMixup
    from nas_kmix.scoring import ScoringConfig, score_dataset
    from nas_kmix.sampling import select
    from nas_kmix.proxy import ProxyManifest
"""

from nas_kmix.version import __version__

__all__ = ["__version__"]
