"""Whether a batch fits into memory, foreseen before anything is trained.

A training step keeps the results of its operations for the backward pass, and they grow with the batch: what autograd
keeps of two images and of four tells what it keeps of any number. A step needs more than that (gradients, the
optimiser's state, work space), so a batch that is refused could not have run, and one that barely passes may still
end with `out of memory`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from nas_kmix.engine.compute import Compute
from nas_kmix.engine.containers import GROUPS, MOUNT, control_groups
from nas_kmix.engine.distributed import World, local_processes

FEW, MORE = 2, 4  # images of the two small batches
WHOLE_STEP = 1.5  # times what is kept: about what a step takes in all, for the batch size that is advised


def check_fits(
    model: nn.Module,
    batch_size: int,
    side: int,
    compute: Compute,
    *,
    flag: str,
    images: int,
    world: World | None = None,
    parts: int = 1,
) -> None:
    """Raise ValueError, with a batch size that fits, where a step of `model` on `batch_size` of the images cannot.

    images: size of the set, which caps a batch; side: their side in pixels. The processes of the `world` divide a
    batch, and each computes its share in `parts` parts. The model is left as it is.
    """
    world = world or World()
    divided = parts * world.size
    count = math.ceil(min(batch_size, images) / divided)
    if count <= MORE:
        return
    few, more = (kept_bytes(model, n, side, compute) for n in (FEW, MORE))
    each = (more - few) / (MORE - FEW)
    free = free_bytes(compute.device, processes=local_processes() if world.size > 1 else 1)
    if count * each <= free:
        return
    fitting = int(free / (WHOLE_STEP * each)) * divided
    advice = f"use {flag} {fitting}" if fitting else "not even one image fits: use a smaller network or smaller images"
    raise ValueError(
        f"{flag} {batch_size} needs more than {count * each / 1e9:,.1f} GB of memory on {compute.device}"
        f"{' for each process' if world.size > 1 else ''}, where {free / 1e9:,.1f} GB are free; {advice}."
    )


def kept_bytes(model: nn.Module, images: int, side: int, compute: Compute) -> int:
    """What autograd keeps for the backward pass of a training step on `images` blank images, weights included."""
    model = copy.deepcopy(model).train()  # a forward pass changes running statistics
    device = compute.device
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> None:
        kept[tensor.untyped_storage().data_ptr()] = tensor  # alive, so that no other gets its address

    keeping = torch.autograd.graph.saved_tensors_hooks(pack, lambda _: None)
    drawing = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])  # as dropout does
    with drawing, compute.autocast(), keeping:
        model(compute.layout(torch.zeros(images, 3, side, side, device=device)))
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def free_bytes(device: torch.device, *, processes: int = 1) -> float:
    """Memory that this process can still take, where so many share the machine's; infinite where nothing tells."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type != "cpu":
        return math.inf
    return min([*_of_the_machine(), *_of_the_container()], default=math.inf) / processes


def _of_the_machine() -> Iterator[float]:
    with suppress(OSError, ValueError, KeyError):
        rows = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        yield 1024 * sum(int(rows[name].split()[0]) for name in ("MemAvailable", "SwapFree"))


def _of_the_container(groups: Path = GROUPS, mount: Path = MOUNT) -> Iterator[float]:
    """What is left of the limits of this process's control groups, whose files the system can drop from memory."""
    for version, folder in control_groups("memory", groups, mount):
        limit, resident = ("memory.max", "anon") if version == 2 else ("memory.limit_in_bytes", "total_rss")
        with suppress(OSError, ValueError, KeyError):
            counts = dict(row.split() for row in (folder / "memory.stat").read_text().splitlines())
            yield int((folder / limit).read_text()) - int(counts[resident])
