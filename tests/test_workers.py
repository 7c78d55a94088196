"""The processes that decode images: whatever happens to them or to the command, all is over within seconds.

Real processes are killed, stopped, and run with a full or small /dev/shm in a mount namespace of their own.
"""

import errno
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from processes import PATIENCE, ROOT, TINY, draw_images

from nas_kmix.engine import workers
from nas_kmix.engine.data import DataConfig, load_data

SECONDS = 20  # within which everything must be over
SEARCH = [*TINY, "--max-resident-gb", "0", "--scorer.epochs", "500", "-j", "2"]
TRAIN = shlex.split(
    "--threads 1 --device cpu -j 2 --max-resident-gb 0 --genotype PC_DARTS_cifar --channels 2 --layers 3 "
    "--no-auxiliary --epochs 500 --batch-size 8 --val-share .3 --image-size 32 --no-report"
)
COMMANDS = {"search": SEARCH, "train_eval": TRAIN}
EITHER = ["search", pytest.param("train_eval", marks=pytest.mark.slow)]
NAMESPACE = ["unshare", "--map-root-user", "--mount"]
namespaces = pytest.mark.skipif(
    shutil.which("unshare") is None or subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode != 0,
    reason="mount namespaces are not permitted here",
)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for i, (image, label) in enumerate(zip(*draw_images(), strict=True)):
        path = folder / "train" / str(label) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return folder


@contextmanager
def running(argv, log: Path, **environment: str):
    """The process of a command line; nothing of it is left behind."""
    with open(log, "w") as stream:
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
        process = subprocess.Popen(argv, stdout=stream, stderr=stream, env=env, cwd=log.parent, start_new_session=True)
    try:
        yield process
    finally:
        for pid in [*descendants(process.pid), process.pid]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait(10)


def parents() -> dict[int, int]:
    """Of all processes that live, by their ids."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                found[int(path.parent.name)] = int(parent)
    return found


def descendants(pid: int) -> list[int]:
    parent_of, found = parents(), [pid]
    for known in found:
        found += [child for child, parent in parent_of.items() if parent == known]
    return found[1:]


def all_gone(pids, seconds: float = 6) -> bool:
    """Whether they are gone in time; by default in that of a worker, which looks every five seconds for its parent."""
    deadline = time.monotonic() + seconds
    while (alive := set(pids) & set(parents())) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not alive


def script(name: str, images: Path, out: Path) -> list[str]:
    return [str(ROOT / f"{name}.py"), "--data", str(images), "--out", str(out), *COMMANDS[name]]


def started_training(process, log: Path, count: int = 2) -> list[int]:
    """The worker processes, once the command trains."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        found = descendants(process.pid)
        if "judging by the first steps" in log.read_text() and len(found) >= count:
            return found
        time.sleep(0.05)
    pytest.fail(f"it does not train: {log.read_text()}")


def assert_over(process, children, log: Path, code: int) -> str:
    """It ends in time with that exit code, none of its children lives, and nothing is said but one sentence."""
    try:
        assert process.wait(SECONDS) == code, log.read_text()
    except subprocess.TimeoutExpired:
        pytest.fail(f"the command hangs: {log.read_text()}")
    assert all_gone(children)
    said = log.read_text()
    assert "Traceback" not in said, said
    return said.splitlines()[-1]


@pytest.mark.parametrize("name", EITHER)
def test_a_killed_worker_ends_the_command(name, images, tmp_path):
    log = tmp_path / "log"
    with running([sys.executable, *script(name, images, tmp_path / "run")], log) as process:
        children = started_training(process, log)
        os.kill(children[0], signal.SIGKILL)
        said = assert_over(process, children, log, 1)
    assert said == (
        "error: A worker process that decodes images was killed (out of memory?): use fewer --workers, or --workers 0."
    )


PATCHED = """
import runpy, sys
import torch
from nas_kmix.engine import learner, workers
{patch}
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def patched(patch: str) -> list[str]:
    return [sys.executable, "-c", PATCHED.format(patch=patch)]


ERRORS = {
    'torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 3 has a total capacity of 8 GiB")': (
        "error: Out of memory on cuda:3: lower --batch-size."
    ),
    "MemoryError()": "error: Out of memory: lower --batch-size.",
    'OSError(5, "Input/output error")': "error: [Errno 5] Input/output error",
    'ValueError("this")': "error: this",
    'KeyError("a bug")': "KeyError: 'a bug'",
}


@pytest.mark.parametrize(
    "error",
    [pytest.param(error, marks=() if error == "MemoryError()" else pytest.mark.slow) for error in ERRORS],
)
def test_an_error_of_a_step_ends_the_workers(error, images, tmp_path):
    """Such as they come up in the first step, while the workers read ahead. A bug is a traceback, but ends, too."""
    log = tmp_path / "log"
    patch = f"def fail(*_, **__):\n    raise {error}\ntorch.Tensor.backward = fail"
    with running([*patched(patch), *script("train_eval", images, tmp_path / "run")], log) as process:
        seen, deadline = set(), time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline and not log.read_text().count("rror"):
            seen |= set(descendants(process.pid))
            time.sleep(0.02)
        process.wait(SECONDS)
        assert seen and all_gone(seen)
    assert process.returncode == (2 if "ValueError" in error else 1)
    said = log.read_text().splitlines()[-1]
    assert said.startswith(ERRORS[error]), said
    assert ("Traceback" in log.read_text()) == ("a bug" in error)


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_command_whose_workers_are_stuck(signum, images, tmp_path):
    log = tmp_path / "log"
    with running([sys.executable, *script("search", images, tmp_path / "run")], log) as process:
        children = started_training(process, log)
        for child in children:
            os.kill(child, signal.SIGSTOP)
        time.sleep(3)
        assert process.poll() is None  # a slow disk looks like this
        process.send_signal(signum)
        said = assert_over(process, children, log, 128 + signum)
    assert said == f"stopped by {signum.name}; run the same command again to resume from the last checkpoint"


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_one_lost_worker_ends_a_job_of_two_processes(name, images, tmp_path):
    """A rank that hung would keep torchrun from starting anew."""
    log = tmp_path / "log"
    with running([*TORCHRUN, *script(name, images, tmp_path / "run")], log) as process:
        children = started_training(process, log, count=6)  # two ranks, two workers each
        of_a_rank = next(child for child in children if parents()[child] != process.pid)
        os.kill(of_a_rank, signal.SIGKILL)
        assert all_gone(children, SECONDS)  # torchrun itself then needs a second of CPU time to end
        assert process.wait(PATIENCE) == 1
    assert "was killed (out of memory?): use fewer --workers" in log.read_text()


# -- shared memory -----------------------------------------------------------------------------------------------------


def with_shared_memory(kb: int, argv: list[str]) -> list[str]:
    mount = f"mount -t tmpfs -o size={kb}k tmpfs /dev/shm && exec {shlex.join(argv)}"
    return [*NAMESPACE, "sh", "-c", mount]


@namespaces
@pytest.mark.parametrize("name", EITHER)
def test_too_little_shared_memory_is_refused_at_once(name, images, tmp_path):
    log = tmp_path / "log"
    with running(with_shared_memory(16, [sys.executable, *script(name, images, tmp_path / "run")]), log) as process:
        process.wait(120)  # for the imports
    said = log.read_text()
    assert process.returncode == 2 and "Traceback" not in said
    assert "of shared memory, but /dev/shm has 0 MB free. Use --workers 0, or give" in said and "--shm-size=" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@namespaces
def test_too_little_shared_memory_ends_a_job_of_two_processes(images, tmp_path):
    log = tmp_path / "log"
    argv = [*TORCHRUN, *script("search", images, tmp_path / "run")]
    with running(with_shared_memory(16, argv), log) as process:
        children, deadline = set(), time.monotonic() + 120  # for the imports
        while "error: " not in log.read_text() and time.monotonic() < deadline:
            children |= set(descendants(process.pid))
            time.sleep(0.05)
        assert children and all_gone(children, SECONDS)
        assert process.wait(PATIENCE) == 1
    assert "of shared memory, but /dev/shm has 0 MB free. Use --workers 0" in log.read_text()


@namespaces
@pytest.mark.parametrize(
    ("name", "strategy"),
    [
        ("search", "file_descriptor"),
        pytest.param("train_eval", "file_descriptor", marks=pytest.mark.slow),
        pytest.param("search", "file_system", marks=pytest.mark.slow),
    ],
)
def test_shared_memory_that_fills_up_ends_the_command(name, strategy, images, tmp_path):
    """As if others had taken it after the start."""
    log = tmp_path / "log"
    patch = (
        f"torch.multiprocessing.set_sharing_strategy('{strategy}')\n"
        "from pathlib import Path\nworkers.SHARED_MEMORY = Path('/nowhere')"
    )
    argv = with_shared_memory(112, [*patched(patch), *script(name, images, tmp_path / "run")])
    with running(argv, log) as process:
        deadline, children = time.monotonic() + 120, set()
        while process.poll() is None and time.monotonic() < deadline:
            children |= set(descendants(process.pid))
            time.sleep(0.02)
        assert process.returncode == 1, log.read_text()
        assert all_gone(children)
    said = log.read_text()
    assert "error: The worker processes have no room in shared memory for a batch" in said, said
    assert "--workers 0" in said and "--shm-size" in said and "Traceback" not in said


def test_no_room_for_the_locks_of_workers_is_a_sentence(monkeypatch):
    """They lie in shared memory, too, where ENOSPC is no full disk."""

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(workers.DataLoader, "__iter__", full)
    with pytest.raises(workers.WorkerError, match=r"no room in shared memory.*--workers 0.*--shm-size"):
        next(workers.read(workers.DataLoader([1])))


def test_the_room_that_is_needed(monkeypatch):
    """Two batches a worker and one in use, of every process; fewer workers are advised where they would do."""
    free = 1_000_000
    monkeypatch.setattr(workers.shutil, "disk_usage", lambda _: type("Usage", (), {"free": free}))
    monkeypatch.setattr(workers, "SHARED_MEMORY", ROOT)
    batch = 3 * 32 * 32
    workers.check_room(free // (5 * batch), 32, 2)
    workers.check_room(10**9, 32, 0)
    with pytest.raises(ValueError, match="Use --workers 1 or --workers 0, or give"):
        workers.check_room(free // (5 * batch) + 1, 32, 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"need 2 MB .* 1 MB free. Use --workers 0"):
        workers.check_room(free // (5 * batch), 32, 2)
    with pytest.raises(ValueError, match="Use --workers 0, or give"):
        workers.check_room(free, 32, 2)


def test_passes_that_overlap_keep_to_their_own_images_after_an_evaluation(images):
    """The two halves of a search are read side by side, from a set that the scorer's evaluation has read before."""
    data = load_data(DataConfig(data=str(images), max_resident_gb=0), workers=1)
    for _ in range(2):
        evaluation = [batch.indices.tolist() for batch in data.batches([np.arange(4)], persistent=True)]
        assert evaluation == [[0, 1, 2, 3]]
    plans = [[np.array([0, 1]), np.array([2, 3]), np.array([4])], [np.array([9, 8]), np.array([7, 6]), np.array([5])]]
    read = [[], []]
    for batches in zip(*map(data.batches, plans), strict=True):
        for half, batch in zip(read, batches, strict=True):
            half.append(batch.indices.tolist())
    assert read == [[indices.tolist() for indices in plan] for plan in plans]


def test_what_cannot_be_sent_ends_its_worker(images):
    """multiprocessing would drop it, and the main process wait for ever."""

    class Unsendable(workers.torch.utils.data.Dataset):
        def __getitem__(self, _):
            return np.zeros(1)

    loader = workers.DataLoader(
        Unsendable(),
        batch_size=None,
        sampler=range(3),
        num_workers=1,
        timeout=1,
        multiprocessing_context="fork",
        collate_fn=lambda _: lambda: None,  # a function without a name cannot be pickled
        worker_init_fn=workers.prepare_worker,
    )
    with pytest.raises(workers.WorkerError, match="has ended: use fewer --workers"):
        list(workers.read(loader))
    workers.end_workers()
