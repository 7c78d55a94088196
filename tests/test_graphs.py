"""The recorded search agrees step by step with the one that launches its kernels singly. Needs a GPU."""

import copy

import pytest
import torch

from darts_space import BilevelConfig, Search, SuperNet
from darts_space.fast.graphs import GraphedSearch

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device")


def test_what_cannot_be_recorded_is_refused():
    net = SuperNet(4, 4, 3)
    for settings in (BilevelConfig(unrolled=True), BilevelConfig(amp="fp16")):
        with pytest.raises(ValueError, match="first order without fp16's loss scaling"):
            GraphedSearch(net, settings)
    with pytest.raises(ValueError, match="needs a CUDA device, the model is on cpu"):
        GraphedSearch(net, BilevelConfig())


@needs_cuda
def test_a_recorded_search_is_the_launched_one():
    """Two batch shapes, a falling learning rate and a resume; kernels that sum in any order leave small differences."""
    settings = BilevelConfig(8, 16, lr=0.05, arch_lr=1e-3, epoch_steps=2)
    generator = torch.Generator().manual_seed(0)
    sizes = [8, 8, 5] * settings.steps
    batches = [
        (torch.randn(size, 3, 8, 8, generator=generator).cuda(), torch.randint(4, (size,), generator=generator).cuda())
        for size in sizes[: settings.steps]
    ]
    net = SuperNet(8, 4, 3, generator=torch.Generator().manual_seed(0)).cuda()
    plain, graphed = Search(copy.deepcopy(net), settings), GraphedSearch(copy.deepcopy(net), settings)
    for step, batch in enumerate(batches):
        if step == 20:
            resumed = GraphedSearch(copy.deepcopy(net), settings)
            resumed.load_state_dict(copy.deepcopy(graphed.state_dict()))
            graphed = resumed
        one, other = plain.step(batch, batches[step - 1]), graphed.step(batch, batches[step - 1])
        torch.testing.assert_close(one.train_loss, other.train_loss, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(plain.arch, graphed.arch, rtol=0.1, atol=2e-3)
