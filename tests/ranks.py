"""Processes under torchrun, for tests: start, find and await them."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import train_eval

ROOT = Path(train_eval.__file__).parent
PATIENCE = 600  # seconds until processes that hang fail their test

needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes through /proc")


def torchrun(log, *arguments, restarts=0, processes=2):
    """Some processes with gloo, started like the README's eight, with output in `log`."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes, "--max-restarts", restarts]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    with open(log, "w") as stream:
        return subprocess.Popen(
            [sys.executable, *map(str, [*command, *arguments])], stdout=stream, stderr=stream, env=environment, cwd=ROOT
        )


def run_ranks(server, count, function, *arguments):
    """The same without torchrun, for what ends by itself: forked from `server`, which has imported everything."""
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    processes = [server.Process(target=_rank, args=(rank, count, port, function, arguments)) for rank in range(count)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + PATIENCE
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0] * count, codes


def _rank(rank, count, port, function, arguments):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    function(*arguments)


def ended(process, log):
    try:
        return process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        os.kill(process.pid, signal.SIGKILL)
        pytest.fail(f"the processes hang: {log.read_text()}")


def wait_for(process, reached):
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None and not reached() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert reached()


def ranks_of(process):
    """Process ids by rank."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ranks = {}
    for child in children:
        variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        ranks |= {int(v[5:]): int(child) for v in variables if v.startswith(b"RANK=")}
    return ranks
