"""From images to a proxy dataset: mix K images, score how informative each image is, and select by score.

`search.py` runs all of it, stage by stage (`pipeline`). The parts can also be used alone:

    from nas_kmix.mixing import DCutMix, DMixup
    from nas_kmix.scoring import ScoringConfig, score_dataset
    from nas_kmix.sampling import select
    from nas_kmix.proxy import ProxyManifest
"""

from nas_kmix.version import __version__

__all__ = ["__version__"]
