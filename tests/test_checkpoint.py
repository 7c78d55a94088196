"""Networks through files: what is written comes back, and nothing else gets in."""

import os
import pickle

import pytest
import torch

from darts_space import GENOTYPES, CifarNetwork, ImageNetNetwork, build_network, load_network, network_checkpoint

GENOTYPE = GENOTYPES["PC_DARTS_image"]


def build(network=CifarNetwork, **arguments):
    arguments = {"channels": 4, "layers": 3, "num_classes": 5, **arguments}
    return network(GENOTYPE, **arguments, generator=torch.Generator().manual_seed(0))


def draw_images(size):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def written(tmp_path):
    """Writes the checkpoint of a network with single entries replaced, or left out where they are None."""

    def write(trained=None, /, **entries):
        checkpoint = {**network_checkpoint(trained or build()), **entries}
        torch.save({key: value for key, value in checkpoint.items() if value is not None}, tmp_path / "best.pt")
        return tmp_path / "best.pt"

    return write


@pytest.mark.parametrize("auxiliary", [True, False])
@pytest.mark.parametrize(("network", "size"), [(CifarNetwork, 32), (ImageNetNetwork, 128)])
def test_a_network_comes_back_from_its_checkpoint(written, network, size, auxiliary):
    model = build(network, auxiliary=auxiliary)
    model(draw_images(size))  # the running statistics move
    loaded = load_network(written(model, epoch=3, optimizer={"state": {}}))
    assert type(loaded) is network and not loaded.training
    assert loaded.description() == model.description()
    assert torch.equal(loaded(draw_images(size)), model.eval()(draw_images(size)))
    loaded.train()(draw_images(size))
    assert all(parameter.requires_grad for parameter in loaded.parameters()), "it can be trained further"


def test_loading_draws_no_random_numbers_and_keeps_the_precision(written):
    path = written(build().to(torch.bfloat16).to(memory_format=torch.channels_last))
    before = torch.get_rng_state()
    loaded = load_network(str(path))
    assert torch.equal(torch.get_rng_state(), before)
    assert loaded(draw_images(32).bfloat16()).dtype == torch.bfloat16


def test_a_description_is_plain_data_that_builds_the_same_network():
    model = build(ImageNetNetwork, auxiliary=False)
    description = model.description()
    assert list(description) == ["kind", "genotype", "channels", "layers", "num_classes", "auxiliary"]
    again = build_network(description, generator=torch.Generator().manual_seed(0))
    assert again.description() == description and type(again) is ImageNetNetwork
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "mnist"}, "no network of the kind 'mnist'; use cifar or imagenet"),
        ({"kind": ["cifar"]}, "no network of the kind"),
        ({"channels": True}, "channels is True; it must be an integer from 1 to 65536"),
        ({"channels": 1 << 40}, "channels is 1099511627776"),
        ({"layers": 2}, "layers is 2; it must be an integer from 3"),
        ({"layers": 10**9}, "layers is 1000000000"),
        ({"num_classes": "10"}, "num_classes is '10'"),
        ({"auxiliary": 1}, "auxiliary is 1; it must be true or false"),
        ({"genotype": {"format": "x"}}, "genotype JSON must have format"),
        ({"depth": 3}, "is described by the keys auxiliary, channels"),
    ],
)
def test_impossible_descriptions_are_refused(written, change, message):
    description = {**build().description(), **change}
    with pytest.raises(ValueError, match=message):
        build_network(description)
    with pytest.raises(ValueError, match=rf"Cannot use the checkpoint .*best\.pt: .*{message}"):
        load_network(written(network=description))


@pytest.mark.parametrize("entries", [{"network": None}, {"network": "cifar"}, {"model": None}, {"model": []}])
def test_missing_parts_are_refused(written, entries):
    with pytest.raises(ValueError, match=r"Cannot use the checkpoint .*best\.pt: "):
        load_network(written(**entries))


def test_weights_of_another_network_are_refused(written):
    state = build().state_dict()
    name = "cells.1.preprocess0.1.weight"
    for value in (state[name][:1], state[name].long(), state[name].tolist(), state[name].to_sparse()):
        with pytest.raises(ValueError, match=rf"{name} is not the tensor \(8, 12, 1, 1\)"):
            load_network(written(model={**state, name: value}))


def test_missing_and_unexpected_weights_are_named(written):
    state = build().state_dict()
    with pytest.raises(ValueError, match=r"its weights .*'other' is missing or unexpected"):
        load_network(written(model={**state, "other": torch.zeros(1)}))
    del state["classifier.bias"]
    with pytest.raises(ValueError, match=r"its weights .*'classifier.bias' is missing or unexpected"):
        load_network(written(model=state))


def test_a_description_of_a_huge_network_takes_no_memory(written):
    huge = {**build().description(), "channels": 1 << 16, "num_classes": 1 << 24}
    with pytest.raises(ValueError, match="is not the tensor"):  # its classifier alone would be 70 TB
        load_network(written(network=huge))


class Malicious:
    """Runs a command where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_cannot_run_code(tmp_path, zipped):
    trap, path = tmp_path / "trap", tmp_path / "best.pt"
    torch.save({**network_checkpoint(build()), "extra": Malicious(trap)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"best\.pt is cut short, or holds more than tensors and plain values"):
        load_network(path)
    path.write_bytes(pickle.dumps(Malicious(trap), protocol=2))
    with pytest.raises(ValueError, match=r"best\.pt is cut short, or holds more"):
        load_network(path)
    assert not trap.exists()


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_checkpoint_is_named(written, share):
    path = written()
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"best\.pt is cut short, or holds more"):
        load_network(path)


@pytest.mark.parametrize("foreign", [{"format": "nas_kmix/classifier"}, {}, [1, 2], torch.zeros(3)])
def test_foreign_checkpoints_are_refused(tmp_path, foreign):
    torch.save(foreign, tmp_path / "scorer.pt")
    with pytest.raises(ValueError, match=r"scorer\.pt is not a checkpoint of the format 'darts_space/network'"):
        load_network(tmp_path / "scorer.pt")


def test_unreadable_paths_are_named(tmp_path):
    for path in (tmp_path, tmp_path / "none.pt"):
        with pytest.raises(ValueError, match=f"Cannot read the checkpoint {path}: .*Check its path"):
            load_network(path)
