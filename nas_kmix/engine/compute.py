"""How to compute, as data: the device, and the precision and memory layout of networks."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor

from nas_kmix.engine.containers import cpu_quota
from nas_kmix.engine.distributed import local_device, local_processes

Amp = Literal["off", "bf16", "fp16"]
AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class DeviceConfig:
    """Where and how to compute. None of it is in a stage's key, so a run may resume on another device."""

    device: str = "auto"
    """auto | cpu | cuda | cuda:1 | mps; auto takes CUDA if there is a GPU."""
    threads: int = 0
    """CPU threads; 0 leaves the number to torch."""
    workers: Annotated[int, tyro.conf.arg(aliases=["-j"])] = field(default_factory=lambda: min(16, cores()))
    """Number of processes or threads that decode image files. Default: this process's share of the cores."""
    amp: Amp = "off"
    """Automatic mixed precision."""
    channels_last: bool = False
    """Run networks in channels_last memory format. On without a GPU, where networks train 1.2 to 1.8 times as fast."""

    def __post_init__(self):
        for name in ("threads", "workers"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} must be 0 or more, not {getattr(self, name)}.")

    def suited_to(self, device: str) -> DeviceConfig:
        """These defaults on a device: channels_last on a CPU (benchmarks/network.py); on a GPU as they are."""
        on_cpu = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
        return replace(self, channels_last=True) if on_cpu else self


def cores() -> int:
    """The CPU cores that this process may use, as far as affinity and a container tell.

    Where torchrun has started several processes on this machine, an equal share.
    """
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min(there, cpu_quota())) // local_processes())


@dataclass(frozen=True)
class Compute:
    """A device, and the precision and layout in which networks run on it."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    amp: Amp = "off"
    channels_last: bool = False

    def autocast(self) -> AbstractContextManager:
        """The autocast region of `--amp`, a null context when it is off."""
        return nullcontext() if self.amp == "off" else torch.autocast(self.device.type, dtype=AMP_DTYPES[self.amp])

    def layout(self, tensor_or_model: Any) -> Any:
        """A tensor or module, in channels_last format if asked for."""
        if not self.channels_last:
            return tensor_or_model
        if isinstance(tensor_or_model, Tensor):
            return tensor_or_model.contiguous(memory_format=torch.channels_last)
        return tensor_or_model.to(memory_format=torch.channels_last)


def pick_compute(config: DeviceConfig) -> Compute:
    """Resolve the flags and set this process up for them. Raises ValueError if the device is not available."""
    return Compute(pick_device(config), config.amp, config.channels_last)


def pick_device(config: DeviceConfig) -> torch.device:
    """Resolve `--device` and set this process up for it. Raises ValueError if the device is not available."""
    if config.threads > 0:
        torch.set_num_threads(config.threads)
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = local_device(torch.device(name))
        if device.index is not None and device.type == "cuda":
            torch.cuda.set_device(device)  # threads of torch, and recordings, take the current one
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {config.device} is not available here ({str(error).splitlines()[0]}).") from error
    if config.amp == "fp16" and device.type != "cuda":
        raise ValueError(f"--amp fp16 needs a CUDA device, but this is {device.type}; use --amp bf16 or off.")
    if device.type == "cpu":
        _keep_freed_memory()
    return device


def _keep_freed_memory() -> None:
    """Make this process reuse the memory of freed tensors instead of returning it to the system.

    Linux's C library returns blocks of 32 MB and more at once. The next tensor of that size gets new pages, which the
    kernel zeroes one by one: that takes a quarter of a small network's forward pass, and half of a supernet's with 256
    images. Other systems keep their allocators as they are.
    """
    trim_threshold, mmap_max = -1, -4  # the numbers of these options in malloc.h
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, -1)  # never


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, hardware and command line, for `env.json`."""
    packages = ("torchvision", "numpy", "scipy", "scikit-learn")
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "python": platform.python_version(),
        "packages": {"torch": torch.__version__, **{name: metadata.version(name) for name in packages}},
        "commit": _commit(),
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(device),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    }


def _commit() -> str | None:
    """The checkout's commit; None outside a checkout or without git."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
    except OSError:
        return None
