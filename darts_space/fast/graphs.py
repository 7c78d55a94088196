"""The bilevel search on a GPU without the time between kernels: every step is a recorded CUDA graph.

A supernet's step is some two thousand small kernels. Launching them one by one takes the CPU longer than a GPU needs
to run them; replaying a recording takes one launch. The arithmetic is that of `Search`, kernel by kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from darts_space.bilevel import Batch, Search
from darts_space.settings import BilevelConfig

WARM_UP = 3  # steps before a recording, in which libraries allocate and optimisers make their state


class _Recording(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: Batch
    outputs: Any


class GraphedSearch(Search):
    """`Search` of the first order for a model on a CUDA device.

    The first three steps with batches of a new shape run as usual; the fourth is recorded, and replayed from then on.
    """

    def __init__(self, model: nn.Module, config: BilevelConfig):
        if config.unrolled or config.amp == "fp16":
            raise ValueError("Only the first order without fp16's loss scaling can be recorded; use `Search`.")
        super().__init__(model, config)
        if self.device.type != "cuda":
            raise ValueError(f"A recorded search needs a CUDA device, the model is on {self.device}; use `Search`.")
        self._calls: dict[Any, int] = {}
        self._recordings: dict[Any, _Recording] = {}
        self.arch_optimizer = torch.optim.Adam(
            self.arch,
            config.arch_lr,
            config.arch_betas,
            weight_decay=config.arch_weight_decay,
            fused=True,
            capturable=True,
        )

        for optimizer in (self.weight_optimizer, self.arch_optimizer):
            for group in optimizer.param_groups:  # a recording reads the rate from the device
                group["lr"] = torch.tensor(float(group["lr"]), device=self.device)

    def set_lr(self, lr: float) -> None:
        for group in self.weight_optimizer.param_groups:
            group["lr"].fill_(lr)

    def set_arch_lr(self, lr: float) -> None:
        for group in self.arch_optimizer.param_groups:
            group["lr"].fill_(lr)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._recordings.clear()  # their optimisers' state is another one now
        self._calls.clear()

    def weight_step(self, train_batch: Batch) -> tuple[Tensor, Tensor]:
        return self._replay("weight_step", super().weight_step, train_batch)

    def arch_step(self, train_batch: Batch, val_batch: Batch) -> Tensor:
        arch_step = super().arch_step
        return self._replay("arch_step", lambda batch: arch_step(batch, batch), val_batch)

    def arch_gradient(self, val_batch: Batch) -> tuple[Tensor, Sequence[Tensor]]:
        return self._replay("arch_gradient", super().arch_gradient, val_batch)

    def _replay(self, name: str, function: Callable[[Batch], Any], batch: Batch) -> Any:
        key = name, batch[0].shape
        recording = self._recordings.get(key)
        if recording is None:
            self._calls[key] = self._calls.get(key, 0) + 1
            if self._calls[key] <= WARM_UP:
                return function(batch)
            inputs = tuple(tensor.clone() for tensor in batch)
            graph = torch.cuda.CUDAGraph()
            # Other threads may use CUDA meanwhile: those that pin the images of the next batches do.
            with torch.cuda.device(self.device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
                outputs = function(inputs)
            recording = self._recordings[key] = _Recording(graph, inputs, outputs)
        for buffer, tensor in zip(recording.inputs, batch, strict=True):
            buffer.copy_(tensor)
        recording.graph.replay()
        return tree_map(torch.clone, recording.outputs)  # the next replay writes to the same places
