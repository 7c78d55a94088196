"""Exported programs against their networks."""

import pytest
import torch

from darts_space import GENOTYPES, CifarNetwork, ImageNetNetwork
from nas_kmix.engine.data import DataConfig, load_data
from nas_kmix.engine.export import export_model


@pytest.mark.parametrize("kind", ["cifar", "imagenet"])
def test_a_program_agrees_with_its_network_on_real_images(kind, tmp_path, request):
    if kind == "cifar":
        config, network = DataConfig(data=str(request.getfixturevalue("real_cifar100"))), CifarNetwork
    else:
        folder = request.getfixturevalue("real_imagenette")
        config, network = DataConfig(data=str(folder), image_size=128, max_resident_gb=0), ImageNetNetwork
    data = load_data(config)
    model = network(GENOTYPES["PC_DARTS_cifar"], 4, 3, 10, generator=torch.Generator().manual_seed(0)).eval()
    images = data.normalise(data.fetch(data.good()[:7]).images)
    export_model(model, images, tmp_path / "net.pt2")
    program = torch.export.load(tmp_path / "net.pt2").module()
    for n in (1, 7):
        torch.testing.assert_close(program(images[:n]), model(images[:n]), rtol=1e-5, atol=1e-5)


def test_a_program_that_differs_is_not_written(tmp_path):
    """A network that draws in every pass cannot agree with its program."""

    class Restless(torch.nn.Module):
        def forward(self, images):
            return images.mean(dim=(2, 3)) + torch.rand_like(images).mean(dim=(2, 3))

    with pytest.raises(ValueError, match=r"net\.pt2: the exported program differs"):
        export_model(Restless(), torch.zeros(7, 3, 8, 8), tmp_path / "net.pt2")
    assert not list(tmp_path.iterdir())
