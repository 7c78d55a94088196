"""A run's file for TensorBoard, whose own writer is a thread whose failures nobody catches; this one fails in place."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any


class EventFile:
    """`events.out.tfevents.*` in `folder`; every event is on its way to the disk when `add` returns."""

    def __init__(self, folder: Path):
        self._path = folder / f"events.out.tfevents.{int(time.time()):010}.{socket.gethostname()}.{os.getpid()}"

    def add(self, epoch: int, *summaries: Any) -> None:
        """Write summaries as `torch.utils.tensorboard.summary` makes them. Raises OSError."""
        from tensorboard.compat.proto.event_pb2 import Event  # takes seconds to import
        from tensorboard.summary.writer.record_writer import RecordWriter

        with open(self._path, "ab") as file:
            writer = RecordWriter(file)
            if file.tell() == 0:
                writer.write(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())
            for summary in summaries:
                writer.write(Event(wall_time=time.time(), step=epoch, summary=summary).SerializeToString())
