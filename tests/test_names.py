"""Names and signatures that other programs import: a rename here breaks somebody's trainer."""

import inspect

import pytest

from darts_space import SuperNet, derive
from darts_space.genotype import GENOTYPES, Genotype, random_genotype
from darts_space.search_network import SearchNetwork
from nas_kmix import mixing
from nas_kmix.proxy import ProxyManifest
from nas_kmix.sampling import select
from nas_kmix.scoring import score_dataset

POSITIONAL = {
    mixing.stick_lengths: ["phi"],
    mixing.paste: ["sources", "plan"],
    mixing.mix_labels: ["labels", "partners", "weights", "num_classes"],
    derive: ["alphas_normal", "betas_normal", "alphas_reduce", "betas_reduce"],
    score_dataset: ["model", "data", "config"],
    select: ["scores", "labels", "ratio"],
    mixing.draw_phi: ["n", "k", "alpha"],
    mixing.nested_boxes: ["v", "size"],
    mixing.owner_map: ["boxes", "size"],
    SearchNetwork: ["channels", "num_classes", "layers", "partial", "stem", "edge_normalisation"],
}
KEYWORDS = {
    mixing.draw_phi: {"rng"},
    mixing.nested_boxes: {"rng"},
    select: {"method", "interval", "balanced", "rng"},
    mixing.DCutMix: {"k", "alpha", "num_classes", "p", "seed"},
    mixing.DMixup: {"k", "alpha", "num_classes", "p", "seed"},
    mixing.DCutMix.__call__: {"rng"},
}


@pytest.mark.parametrize("function", POSITIONAL, ids=lambda function: function.__qualname__)
def test_positional_arguments(function):
    wanted = POSITIONAL[function]
    assert list(inspect.signature(function).parameters)[: len(wanted)] == wanted


@pytest.mark.parametrize("function", KEYWORDS, ids=lambda function: function.__qualname__)
def test_keyword_arguments(function):
    parameters = inspect.signature(function).parameters
    found = {name for name, parameter in parameters.items() if parameter.kind is inspect.Parameter.KEYWORD_ONLY}
    assert KEYWORDS[function] <= found


def test_methods_and_tables():
    assert {"PC_DARTS_cifar", "PC_DARTS_image"} <= GENOTYPES.keys() and callable(random_genotype)
    assert all(callable(getattr(Genotype, name)) for name in ("load", "save", "from_text"))
    assert all(callable(getattr(ProxyManifest, name)) for name in ("load", "save", "apply"))
    state = SuperNet(
        channels=8, num_classes=10, layers=3, partial=4, stem="cifar", edge_normalisation=True
    ).state_dict()
    assert {"alphas_normal", "alphas_reduce", "betas_normal", "betas_reduce"} <= state.keys()
    assert set(mixing.MixPlan.__dataclass_fields__) == {"partners", "weights", "owner"}
