"""The supernet against its plain form: time, memory and tensor operations of a search step.

    python -m benchmarks.supernet --threads 2
    python -m benchmarks.supernet --batch-size 256 --pairs 3 --threads 2 --json supernet.json
    python -m benchmarks.supernet --device cuda --batch-size 256
    python -m benchmarks.supernet --threads 1 --channels 16 --layers 5 --size 16 --batch-size 32    # a short search's
    python -m benchmarks.supernet --threads 1 --profile       # where the time goes, on a CPU

The two forms run in turn in one process on the same images; a ratio is the median over the pairs of (time of the plain
form / time of the fast form). The plain form does what PC-DARTS's published loop does: all gradients in both steps.
Memory is what one bilevel step adds to a process that holds the network; each form has a process of its own. Tensor
operations are counted on PyTorch's meta device, as a GPU would launch them; on a CPU, where a launch costs next to
nothing, the fast form uses more of them. The roof is a matrix product and a memory copy, measured in the same run.
Dispatch is the time of the same step on two images of the smallest size, which leave next to nothing to compute.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.measure import in_turn, machine, seconds, write_json
from darts_space import BilevelConfig, PlainSuperNet, Search, SuperNet
from darts_space.bilevel import Batch
from darts_space.search_network import SearchNetwork
from nas_kmix.engine.compute import DeviceConfig, pick_device
from nas_kmix.engine.ledger import peak_rss_bytes

PLAIN_MACS = 56_596_992
PLAIN_OPERATIONS = range(13_000, 15_001)
SMALLEST = 4  # pixels that the supernet takes
FORMS: dict[str, type[SearchNetwork]] = {"plain": PlainSuperNet, "fast": SuperNet}
NOT_COMPUTED = {"empty", "empty_like", "new_empty", "new_empty_strided", "_unsafe_view", "squeeze_", "detach"}
"""Allocations, and views by another name."""


@dataclass(frozen=True)
class Config:
    """What to time: K = 4, 10 classes. The defaults are PC-DARTS's supernet for CIFAR."""

    batch_size: int = 64
    channels: int = 16
    layers: int = 8
    size: int = 32
    """Side of the images in pixels."""
    pairs: int = 7
    device: str = "cpu"
    threads: int = 0
    json: Path | None = None
    """Also write the figures to this file, as JSON."""
    profile: bool = False
    """Only print the seconds of one forward and backward pass, by kind of operation."""
    memory_of: Literal["plain", "fast"] | None = None
    """Only print what one bilevel step of this form adds to the memory, in bytes (used by the benchmark itself)."""


class PublishedLoop:
    """The two steps of PC-DARTS's published search: every backward pass goes to all parameters."""

    def __init__(self, model: SearchNetwork, config: BilevelConfig):
        self.model, self.clip = model, config.grad_clip
        self.arch, self.weights = list(model.arch_parameters()), list(model.weight_parameters())
        self.sgd = torch.optim.SGD(self.weights, config.lr, config.momentum, weight_decay=config.weight_decay)
        self.adam = torch.optim.Adam(
            self.arch, config.arch_lr, config.arch_betas, weight_decay=config.arch_weight_decay
        )

    def arch_step(self, train_batch: Batch, val_batch: Batch) -> None:
        self._backward(val_batch)
        self.adam.step()

    def weight_step(self, train_batch: Batch) -> None:
        self._backward(train_batch)
        nn.utils.clip_grad_norm_(self.weights, self.clip)
        self.sgd.step()

    def _backward(self, batch: Batch) -> None:
        self.model.zero_grad()
        F.cross_entropy(self.model(batch[0]), batch[1]).backward()


def build(form: str, config: Config) -> tuple[SearchNetwork, PublishedLoop | Search, Batch]:
    """The network, its loop and a batch."""
    generator = torch.Generator().manual_seed(0)
    model = FORMS[form](config.channels, layers=config.layers, generator=generator).to(config.device)
    settings = BilevelConfig(rest_steps=0)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(config.batch_size, 3, config.size, config.size, generator=generator)
    labels = torch.randint(10, (config.batch_size,), generator=generator)
    loop = (PublishedLoop if form == "plain" else Search)(model, settings)
    return model, loop, (images.to(config.device), labels.to(config.device))


def works(form: str, config: Config) -> dict[str, Callable[[], object]]:
    """What is timed, by its name in the table."""
    model, loop, batch = build(form, config)

    def forward() -> None:
        with torch.no_grad():
            model(batch[0])

    return {
        "forward": forward,
        "forward_backward": lambda: forward_backward(model, batch),
        "weight_step": lambda: loop.weight_step(batch),
        "arch_step": lambda: loop.arch_step(batch, batch),
        "bilevel": lambda: (loop.arch_step(batch, batch), loop.weight_step(batch)),
    }


def forward_backward(model: SearchNetwork, batch: Batch) -> None:
    """The gradients of all parameters."""
    torch.autograd.grad(F.cross_entropy(model(batch[0]), batch[1]), list(model.parameters()))


class OperationCount(TorchDispatchMode):
    """Counts the operations that reach the dispatcher below autograd and compute something."""

    count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.overloadpacket.__name__ if hasattr(operation, "overloadpacket") else operation.__name__
        self.count += not (operation.is_view or name.split(".")[0] in NOT_COMPUTED)
        return operation(*args, **(kwargs or {}))


KINDS = {
    "BatchNorm": {"native_batch_norm", "native_batch_norm_backward", "batch_norm_update_stats", "addcmul_"},
    "ReLU": {"relu", "relu_", "threshold_backward"},
    "pools": {"max_pool2d_with_indices", "max_pool2d_with_indices_backward", "avg_pool2d", "avg_pool2d_backward"},
    "matrix products": {"mm", "addmm", "bmm"},
    "sums and scales": {"add", "add_", "mul", "sum"},
    "copies and zeros": {"cat", "clone", "copy_", "constant_pad_nd", "new_zeros", "slice_backward", "zeros", "stack"},
}


class Profile(TorchDispatchMode):
    """Seconds below autograd by kind of operation, on a CPU."""

    def __init__(self):
        super().__init__()
        self.seconds: dict[str, float] = dict.fromkeys(
            ["depthwise convolutions", "other convolutions", *KINDS, "all else"], 0.0
        )

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        start = time.perf_counter()
        result = operation(*args, **(kwargs or {}))
        self.seconds[self._kind(operation.overloadpacket.__name__, args)] += time.perf_counter() - start
        return result

    @staticmethod
    def _kind(name: str, args: tuple) -> str:
        if name.startswith("convolution"):
            weight = args[2] if name.endswith("backward") else args[1]
            depthwise = weight.shape[1] == 1 and weight.shape[2:].numel() > 1
            return "depthwise convolutions" if depthwise else "other convolutions"
        return next((kind for kind, names in KINDS.items() if name in names), "all else")


def profile(config: Config) -> dict[str, dict[str, float]]:
    """Seconds by kind of operation of both forms, after three passes of warm-up."""
    found = {}
    for form in FORMS:
        model, _, batch = build(form, config)
        for _ in range(3):
            forward_backward(model, batch)
        with Profile() as measured:
            forward_backward(model, batch)
        found[form] = measured.seconds
    return found


def operations(form: str, config: Config, device: str) -> int:
    """Tensor operations of one forward and backward pass, whatever the size of the batch."""
    model, _, batch = build(form, config)
    model, batch = model.to(device), tuple(part[:2].to(device) for part in batch)
    with OperationCount() as counted:
        forward_backward(model, batch)
    return counted.count


def multiply_adds(config: Config) -> int:
    """Multiply-adds of the plain form per image: those of convolutions and the linear layer, counted while they run."""
    model, _, (images, _) = build("plain", config)
    counts: list[int] = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(lambda m, _, out: counts.append(out.numel() * m.weight[0].numel()))
    with torch.no_grad():
        model.eval()(images[:1])
    return sum(counts)


def added_memory(form: str, config: Config) -> int:
    """Peak memory of one bilevel step in bytes, less what the process held before it."""
    _, loop, batch = build(form, config)
    cuda = config.device.startswith("cuda")
    before = torch.cuda.memory_allocated() if cuda else _resident_bytes()
    loop.arch_step(batch, batch)
    loop.weight_step(batch)
    peak = torch.cuda.max_memory_allocated() if cuda else peak_rss_bytes()
    return peak - before


def _resident_bytes() -> int:
    """What Linux says this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def memory(form: str, config: Config) -> int:
    """`added_memory` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.supernet", "--memory-of", form]
    for name in ("batch_size", "channels", "layers", "size", "device", "threads"):
        command += [f"--{name.replace('_', '-')}", str(getattr(config, name))]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def roof(config: Config) -> dict[str, float]:
    """What the machine can do: multiply-adds per second of a matrix product, bytes per second of a copy."""
    a = torch.randn(2048, 2048, device=config.device)
    b, c = torch.empty_like(a), torch.randn(2**24, device=config.device)
    d = torch.empty_like(c)
    product = [seconds(lambda: torch.mm(a, a, out=b), config.device) for _ in range(5)]
    copy = [seconds(lambda: d.copy_(c), config.device) for _ in range(5)]
    return {"gemm_macs_per_s": 2048**3 / min(product), "copy_bytes_per_s": 2 * 4 * 2**24 / min(copy)}


def main(config: Config) -> dict[str, float]:
    device = pick_device(DeviceConfig(device=config.device, threads=config.threads))
    config = replace(config, device=str(device))
    if config.memory_of is not None:
        print(added_memory(config.memory_of, config))
        return {}
    if config.profile:
        plain, fast = profile(config).values()
        print(f"{'seconds':<24}   plain    fast")
        for kind in plain:
            print(f"{kind:<24}{plain[kind]:8.3f}{fast[kind]:8.3f}")
        return {}
    macs = multiply_adds(config)
    counts = {form: operations(form, config, "meta") for form in FORMS}
    if (config.channels, config.layers, config.size) == (16, 8, 32):  # an honest reference
        assert macs == PLAIN_MACS and counts["plain"] in PLAIN_OPERATIONS, (macs, counts)
    bytes_added = {form: memory(form, config) for form in FORMS}
    figures = {
        "memory_ratio": bytes_added["fast"] / bytes_added["plain"],
        "op_ratio": counts["fast"] / counts["plain"],
        "plain_ops": counts["plain"],
        "fast_ops": counts["fast"],
        "fast_ops_on_cpu": operations("fast", config, "cpu"),
        **{f"{form}_memory_bytes": value for form, value in bytes_added.items()},
        **roof(config),
    }
    plain, fast = (works(form, config) for form in FORMS)
    print(machine(config.device))
    print(f"batch {config.batch_size}, {config.pairs} pairs    plain      fast     ratio  (lowest, highest)")
    for name in plain:
        pairs = in_turn([form[name] for form in (plain, fast)], config.pairs, device)
        ratios = [before / after for before, after in pairs]
        figures[f"{name}_ratio"] = statistics.median(ratios)
        figures[f"{name}_plain_s"], figures[f"{name}_fast_s"] = map(statistics.median, zip(*pairs, strict=True))
        print(
            f"{name:<20}{figures[f'{name}_plain_s']:9.3f} s{figures[f'{name}_fast_s']:8.3f} s"
            f"{figures[f'{name}_ratio']:9.2f}  ({min(ratios):.2f}, {max(ratios):.2f})"
        )
    nothing = works("fast", replace(config, batch_size=2, size=SMALLEST))
    for name in ("weight_step", "bilevel"):
        spent = statistics.median(taken for (taken,) in in_turn([nothing[name]], config.pairs, device))
        figures[f"{name}_dispatch"] = spent / figures[f"{name}_fast_s"]
        print(f"dispatch in {name}: {figures[f'{name}_dispatch']:.0%} of the fast form's time")
    compute = 3 * macs * config.batch_size / figures["gemm_macs_per_s"]
    figures["forward_backward_over_gemm_roof"] = figures["forward_backward_fast_s"] / compute
    numbers = ("memory_ratio", "op_ratio", "plain_ops", "fast_ops", "fast_ops_on_cpu")
    for name in (*numbers, "plain_memory_bytes", "fast_memory_bytes"):
        print(f"{name:<20}{figures[name]:12,.2f}")
    print(
        f"roof: {figures['gemm_macs_per_s'] / 1e9:.0f} G multiply-adds/s, "
        f"{figures['copy_bytes_per_s'] / 1e9:.1f} GB/s; a fast forward and backward takes"
        f" {figures['forward_backward_over_gemm_roof']:.0f} times as long as its "
        f"multiply-adds would in a matrix product, and could move "
        f"{figures['forward_backward_fast_s'] * figures['copy_bytes_per_s'] / 1e9:.1f} GB"
    )
    if config.json is not None:
        write_json(figures, config.json)
    return figures


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
