"""The run folder: one run at a time, complete records over many invocations, checkpoints of this command only, signals.

Also the device as data, which a run is given.
"""

import csv
import errno
import json
import os
import platform
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nas_kmix.engine import compute as compute_module
from nas_kmix.engine import run as run_module
from nas_kmix.engine.compute import Compute, DeviceConfig, pick_device
from nas_kmix.engine.files import TEMPORARY_SUFFIX
from nas_kmix.engine.keys import StageMismatchError, check_key, stage_key
from nas_kmix.engine.ledger import Ledger, peak_rss_bytes
from nas_kmix.engine.run import Run, StoppedError, checkpoint_name

STAGES = ("scorer", "scoring", "search")
KEY = stage_key("scorer", {"epochs": 3, "lr": 0.1}, {"data": "f" * 64})
CHECKPOINT = checkpoint_name("scorer")


def open_run(folder, **options):
    return Run(folder, stages=STAGES, **options)


def bill(folder):
    return json.loads((folder / "cost.json").read_text())


def rows(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until a test moves it: clock[0] += seconds."""
    now = [1000.0]
    monkeypatch.setattr(run_module.time, "monotonic", lambda: now[0])
    return now


# -- one run at a time -------------------------------------------------------------------------------------------------


def test_a_folder_in_use_is_refused_and_free_again_afterwards(tmp_path):
    with pytest.raises(KeyError), open_run(tmp_path):
        with pytest.raises(ValueError, match=f"--out {tmp_path} is in use by another run"), open_run(tmp_path):
            pass
        raise KeyError
    with open_run(tmp_path):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EIO])
def test_a_file_system_without_locks_is_no_folder_in_use(number, tmp_path, monkeypatch, capsys):
    """Lustre without its option, some NFS: the run goes on, and says that a second one would not be refused."""

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(run_module.fcntl, "flock", refuse)
    with open_run(tmp_path) as run, run.stage("scorer"):
        pass
    assert f"warning: the file system of --out {tmp_path} has no locks ({os.strerror(number)})" in "".join(
        capsys.readouterr()
    )


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EACCES])
def test_only_a_lock_that_is_taken_means_in_use(number, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(run_module.fcntl, "flock", refuse)
    with pytest.raises(ValueError, match="in use by another run"), open_run(tmp_path):
        pass


@pytest.mark.skipif(not hasattr(os, "fork"), reason="its processes start without their parent's files")
def test_a_worker_that_outlives_its_run_keeps_no_other_out(tmp_path):
    (started, starts), (until, ends) = os.pipe(), os.pipe()
    with open_run(tmp_path):
        worker = os.fork()
        if worker == 0:
            os.close(ends)
            os.write(starts, b"!")
            os.read(until, 1)  # nothing, once the other end is closed
            os._exit(0)
        assert os.read(started, 1) == b"!"
        with pytest.raises(ValueError, match="in use"), open_run(tmp_path):
            pass
    with open_run(tmp_path):
        pass
    os.close(ends)
    assert os.waitpid(worker, 0)[1] == 0
    for end in (started, starts, until):
        os.close(end)


def test_the_folder_of_another_command_is_refused_and_stays(tmp_path):
    with open_run(tmp_path) as run, run.stage("scorer"):
        pass
    before = (tmp_path / "cost.json").read_bytes()
    with pytest.raises(ValueError, match=r"holds the run of another command \(stages scorer, scoring"):
        Run(tmp_path, stages=("train",)).__enter__()
    assert (tmp_path / "cost.json").read_bytes() == before


def test_another_process_finds_the_folder_locked(tmp_path):
    code = f"import fcntl; fcntl.flock(open({str(tmp_path / '.lock')!r}, 'w'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    with open_run(tmp_path):
        locked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    free = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "BlockingIOError" in locked.stderr and free.returncode == 0


def test_a_refused_run_changes_nothing(tmp_path):
    with open_run(tmp_path) as run:
        run.ledger.write()
        half = tmp_path / f"cost.json{TEMPORARY_SUFFIX}"
        half.write_text("being written")
        with pytest.raises(ValueError, match="in use"), open_run(tmp_path):
            pass
        assert half.exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=f"--out {tmp_path / 'file' / 'out'} cannot be written to"):
        open_run(tmp_path / "file" / "out").__enter__()


def test_half_written_files_of_a_killed_run_are_removed(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    for name in ("checkpoints/scorer.pt", "proxy.json"):
        (tmp_path / f"{name}{TEMPORARY_SUFFIX}").write_text("half")
    with open_run(tmp_path):
        assert not list(tmp_path.rglob(f"*{TEMPORARY_SUFFIX}"))


def test_half_written_files_of_others_stay(tmp_path):
    (tmp_path / "film.mp4.part").write_text("a browser's download")
    with open_run(tmp_path):
        assert (tmp_path / "film.mp4.part").exists()


def test_a_command_that_fails_before_its_first_file_leaves_no_folder(tmp_path):
    new, old, used = (tmp_path / name for name in ("new/run", "old", "used"))
    old.mkdir()
    for folder in (new, old, used):
        with pytest.raises(ValueError, match="no such data"), open_run(folder) as run:
            if folder == used:
                run.path("result.json").write_text("{}")
            raise ValueError("no such data")
    assert not new.exists() and old.exists()
    assert (used / "result.json").exists()


# -- costs -------------------------------------------------------------------------------------------------------------


def test_costs_add_up_over_invocations(tmp_path, clock):
    for _ in range(2):
        with open_run(tmp_path) as run:
            with run.stage("scorer") as cost:
                cost.images_forward += 10
                cost.images_backward += 5
                clock[0] += 3
            clock[0] += 100  # between the stages nothing is billed
            with run.stage("scoring") as cost:
                cost.images_forward += 7
                clock[0] += 2
    stages, total = bill(tmp_path)["stages"], bill(tmp_path)["total"]
    peak = stages["scorer"].pop("peak_rss_bytes")
    assert stages["scorer"] == {"wall_s": 6.0, "images_forward": 20, "images_backward": 10, "skipped": False}
    assert stages["scoring"]["wall_s"] == 4.0 and stages["scoring"]["images_forward"] == 14
    assert stages["search"] == dict.fromkeys(stages["search"], 0) | {"skipped": True}
    assert peak > 1e7 and total.pop("peak_rss_bytes") >= peak
    assert total == {"wall_s": 10.0, "images_forward": 34, "images_backward": 10}


def test_the_peak_is_this_process_s_own():
    """Not the memory of the parent process, from which Linux's ru_maxrss starts."""
    command = "from nas_kmix.engine.ledger import peak_rss_bytes as f; a = f(); b = b'1' * 2**28; print(a, f())"
    ballast = torch.ones(2**28)  # 1 GiB
    done = subprocess.run([sys.executable, "-c", command], check=True, capture_output=True, text=True)
    before, after = map(int, done.stdout.split())
    assert 1e7 < before < peak_rss_bytes() - ballast.nbytes // 2
    assert after - before > 0.9 * 2**28


def test_a_stage_that_is_skipped_keeps_its_cost_and_says_so(tmp_path, clock):
    with open_run(tmp_path) as run, run.stage("scorer"):
        clock[0] += 3
    with open_run(tmp_path) as run:
        run.ledger.write()
    assert bill(tmp_path)["stages"]["scorer"]["skipped"] is True
    assert bill(tmp_path)["stages"]["scorer"]["wall_s"] == 3.0


def test_a_stage_is_billed_up_to_its_failure_and_its_last_checkpoint(tmp_path, clock):
    with open_run(tmp_path) as run, pytest.raises(KeyError), run.stage("scorer") as cost:
        cost.images_forward += 4
        clock[0] += 5
        run.save_checkpoint(CHECKPOINT, KEY, {})
        assert bill(tmp_path)["stages"]["scorer"]["wall_s"] == 5.0  # what a SIGKILL now would leave
        clock[0] += 1
        raise KeyError
    assert bill(tmp_path)["total"]["wall_s"] == 6.0 and bill(tmp_path)["total"]["images_forward"] == 4


@pytest.mark.parametrize("text", ["", "[]", '{"stages": {"scorer": {"hours": 1}}}', '{"stages": {"scorer": 3}}'])
def test_a_damaged_bill_starts_anew(tmp_path, text):
    (tmp_path / "cost.json").write_text(text)
    with open_run(tmp_path) as run:
        run.ledger.write()
    assert bill(tmp_path)["total"]["wall_s"] == 0


def test_reused_results_bring_their_costs_along(tmp_path, clock):
    with open_run(tmp_path / "a") as run, run.stage("scorer"):
        clock[0] += 3
    with open_run(tmp_path / "b") as run:
        assert run.ledger.adopt(tmp_path / "a" / "cost.json", ("scorer",))
        assert not run.ledger.adopt(tmp_path / "c" / "cost.json", ("scoring",))
        run.ledger.write()
    assert bill(tmp_path / "b")["stages"]["scorer"]["wall_s"] == 3.0
    assert bill(tmp_path / "b")["stages"]["scorer"]["skipped"] is True


# -- metrics -----------------------------------------------------------------------------------------------------------


def test_a_repeated_epoch_replaces_its_row_also_in_a_later_invocation(tmp_path):
    with open_run(tmp_path) as run:
        for epoch, loss in ((0, 3.0), (1, 2.0), (1, 1.5)):
            run.log.add("scorer", epoch, loss=loss)
        run.ledger.write()
    with open_run(tmp_path) as run:
        run.log.add("scorer", 1, loss=1.25)
        run.log.add("search", 0, loss=4.0, entropy=1 / 3)
    assert [(r["stage"], r["epoch"], r["loss"], r["entropy"]) for r in rows(tmp_path)] == [
        ("scorer", "0", "3", ""),
        ("scorer", "1", "1.25", ""),
        ("search", "0", "4", "0.3333333"),
    ]
    assert list(tmp_path.glob("events.out.tfevents.*"))


def test_speed_goes_to_tensorboard_and_the_listener_but_not_into_the_table(tmp_path):
    heard = []
    with open_run(tmp_path, on_log=lambda *row: heard.append(row)) as run:
        run.log.add("search", 3, machine={"images_per_second": 7.5}, step=40, loss=2.0)
    assert heard == [("search", 40, {"step": 40, "loss": 2.0, "images_per_second": 7.5})]
    assert rows(tmp_path) == [{"stage": "search", "epoch": "3", "step": "40", "loss": "2"}]
    events = EventAccumulator(str(tmp_path)).Reload()
    (event,) = events.Scalars("search/images_per_second")
    assert (event.step, event.value) == (40, 7.5)


def test_what_a_listener_raises_ends_the_run(tmp_path):
    def listener(*_):
        raise ConnectionError("no tracker")

    with pytest.raises(ConnectionError), open_run(tmp_path, on_log=listener) as run:
        run.log.add("scorer", 0, loss=1.0)


def test_a_quiet_run_says_its_warnings_alone(tmp_path, capsys):
    with open_run(tmp_path, quiet=True) as run:
        run.say("scorer: 3 epochs")
        run.say("warning: too few")
        run.progress("scorer", 3).tell("epoch 3/3")
    assert capsys.readouterr().out == "warning: too few\n"


def test_damaged_rows_are_dropped(tmp_path):
    (tmp_path / "cost.json").write_text("")
    (tmp_path / "metrics.csv").write_text("stage,epoch,loss\nscorer,0,3\nscorer,half\n")
    with open_run(tmp_path) as run:
        run.log.add("scorer", 1, loss=2.0)
    assert [row["epoch"] for row in rows(tmp_path)] == ["0", "1"]


# -- keys and checkpoints ----------------------------------------------------------------------------------------------


def test_the_same_settings_have_the_same_key():
    ours = stage_key("scorer", {"milestones": (1, 2), "path": Path("x"), "lr": 0.1}, {})
    check_key(Path("x.pt"), json.loads(json.dumps(ours)), ours)
    check_key(Path("x.pt"), ours, stage_key("scorer", {"lr": 0.1, "path": "x", "milestones": [1, 2]}, {}))


def test_differing_settings_are_named():
    found = stage_key("scorer", {"epochs": 3, "lr": 0.1, "old": 1}, {"data": "a" * 64})
    wanted = stage_key("scorer", {"epochs": 4, "lr": 0.1, "new": 2}, {"data": "b" * 64})
    with pytest.raises(StageMismatchError) as caught:
        check_key(Path("out/scorer.pt"), found, wanted)
    message = str(caught.value)
    assert caught.value.stage == "scorer" and message.startswith("out/scorer.pt was made with other settings")
    for part in ("epochs was 3, now 4", "old was 1, now None", "new was None, now 2", "data was aaaa", "now bbbb"):
        assert part in message
    assert "lr" not in message and "a" * 30 not in message


def test_long_settings_are_told_whole_and_hashes_are_not():
    wanted = stage_key("scorer", {"backbone": "torchvision:mobilenet_v3_large"}, {"data": "f" * 64})
    found = stage_key("scorer", {"backbone": "torchvision:mobilenet_v3_small"}, {"data": "e" * 64})
    with pytest.raises(StageMismatchError, match=r"small, now torchvision:mobilenet_v3_large; data was e{12}…, now f"):
        check_key(Path("x.pt"), found, wanted)


@pytest.mark.parametrize("found", [None, [], "text", {}, {"stage": "search"}, {**KEY, "stage": "search"}])
def test_a_file_of_another_stage_is_refused(found):
    with pytest.raises(StageMismatchError, match=r"x\.pt was not made by the stage 'scorer'"):
        check_key(Path("x.pt"), found, KEY)


def test_checkpoints_come_back_to_their_own_command_only(tmp_path):
    with open_run(tmp_path) as run:
        with run.resumed(CHECKPOINT, KEY) as state:
            assert state is None
        run.save_checkpoint(CHECKPOINT, KEY, {"w": torch.arange(3), "epoch": 2})
    with open_run(tmp_path) as run:
        with run.resumed(CHECKPOINT, KEY) as state:
            assert state["epoch"] == 2 and torch.equal(state["w"], torch.arange(3))
        other = stage_key("scorer", {"epochs": 30, "lr": 0.1}, {"data": "f" * 64})
        with pytest.raises(StageMismatchError, match="epochs was 3, now 30"), run.resumed(CHECKPOINT, other):
            pass


def test_a_checkpoint_cut_short_is_named(tmp_path):
    with open_run(tmp_path) as run:
        run.save_checkpoint(CHECKPOINT, KEY, {"w": torch.zeros(1000)})
        path = tmp_path / "checkpoints" / "scorer.pt"
        path.write_bytes(path.read_bytes()[:2000])
        with pytest.raises(ValueError, match=f"{path} is cut short .*--fresh"), run.resumed(CHECKPOINT, KEY):
            pass


def test_checkpoints_are_removed_one_by_one(tmp_path):
    with open_run(tmp_path) as run:
        for stage in ("scorer", "search"):
            run.save_checkpoint(checkpoint_name(stage), KEY, {})
        run.remove_checkpoint(CHECKPOINT)
        assert [p.name for p in tmp_path.glob("checkpoints/*")] == ["search.pt"]
        run.remove_checkpoint(checkpoint_name("search"))
        run.remove_checkpoint(checkpoint_name("search"))
        assert not (tmp_path / "checkpoints").exists()


def test_clear_removes_what_is_ours_and_nothing_else(tmp_path):
    foreign = [tmp_path / name for name in ("notes.txt", "data.npz", "seed-0/notes.txt", "checkpoints/notes.txt")]
    with open_run(tmp_path) as run:
        with run.stage("scorer") as cost:
            cost.images_forward += 4
        run.save_checkpoint(CHECKPOINT, KEY, {})
        run.log.add("scorer", 0, loss=1.0)
        (tmp_path / "seed-0").mkdir()
        for path in (tmp_path / "proxy.json", tmp_path / "seed-0" / "alphas.npz", *foreign):
            path.write_text("")
    with open_run(tmp_path, results=("proxy.json", "seed-*/alphas.npz", "genotype.json")) as run:
        run.clear()
        left = {path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"}
        assert left == set(foreign)
        run.log.add("scorer", 1, loss=2.0)
        run.ledger.write()
    assert [row["epoch"] for row in rows(tmp_path)] == ["1"] and bill(tmp_path)["total"]["images_forward"] == 0


def test_a_checkpoint_is_due_after_a_minute_and_after_a_signal(tmp_path, clock):
    with open_run(tmp_path) as run:
        clock[0] += 59
        assert not run.checkpoint_due()
        clock[0] += 2
        assert run.checkpoint_due()
        run.save_checkpoint(CHECKPOINT, KEY, {})
        assert not run.checkpoint_due()
        os.kill(os.getpid(), signal.SIGTERM)
        assert run.checkpoint_due()


# -- signals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_end_of_the_step(tmp_path, signum):
    before = signal.getsignal(signum)
    with open_run(tmp_path) as run:
        run.raise_if_stopping()
        os.kill(os.getpid(), signum)
        assert run.checkpoint_due()
        with pytest.raises(StoppedError, match=signum.name) as caught:
            run.raise_if_stopping()
    assert caught.value.signum == signum
    assert signal.getsignal(signum) is before


def test_a_second_interrupt_does_not_wait(tmp_path):
    with open_run(tmp_path):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # as init systems do: still waits
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    with open_run(tmp_path) as run:
        assert not run.checkpoint_due()


def test_a_thread_leaves_the_signals_alone(tmp_path):
    before, seen = signal.getsignal(signal.SIGINT), []

    def work():
        with open_run(tmp_path):
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


# -- the device --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cuda:99", "toaster", "cpu:x"])
def test_a_device_that_is_not_there_is_refused(name):
    with pytest.raises(ValueError, match=f"--device {name} is not available here"):
        pick_device(DeviceConfig(device=name))


def test_the_device_is_found_and_threads_are_set():
    wanted = "cuda" if torch.cuda.is_available() else "cpu"
    assert pick_device(DeviceConfig(threads=2)).type == wanted
    assert torch.get_num_threads() == 2


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries cannot be told to keep memory")
def test_large_tensors_reuse_memory():
    """In its own process: after the first pass hardly any new page is needed."""
    code = """
import resource, torch
from nas_kmix.engine.compute import DeviceConfig, pick_device
pick_device(DeviceConfig(device="cpu", threads=1))
def new_pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for size in (1, 20, 80):
        torch.zeros(size * 2**18) + 1
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(*[new_pages() for _ in range(12)])
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(run_module.__file__).parents[2],
        check=True,
    )
    first, *later = map(int, done.stdout.split())
    # The kernel may move pages meanwhile, but without reuse every pass would need new ones.
    assert first > 1000 and sorted(later)[len(later) // 4] < 50, done.stdout


def test_autocast_and_layout_are_what_was_asked_for():
    cpu, x = torch.device("cpu"), torch.ones(2, 3, 4, 5)
    for amp, dtype in (("off", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        with Compute(cpu, amp).autocast():
            assert (x[0, 0] @ x[0, 0].T).dtype == dtype
    convolution, last = torch.nn.Conv2d(3, 4, 3), Compute(channels_last=True)
    assert Compute().layout(x) is x and Compute().layout(convolution) is convolution
    assert last.layout(x).is_contiguous(memory_format=torch.channels_last) and x.is_contiguous()
    assert last.layout(convolution).weight.is_contiguous(memory_format=torch.channels_last)


def test_environment_is_json():
    record = json.loads(json.dumps(compute_module.environment(torch.device("cpu"))))
    assert torch.__version__.startswith(record["packages"]["torch"])
    assert record["device"] == "cpu" and record["gpu"] is None and record["threads"] == 1


def test_environment_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert compute_module.environment(torch.device("cpu"))["commit"] is None


def test_a_folder_of_a_run_can_be_told_whenever_that_run_was_killed(tmp_path):
    """Between any two writes of its start, and between any two removals of --fresh."""
    names = {"stages": STAGES, "results": ("proxy.json",)}
    with run_module.open_run(tmp_path, {}, DeviceConfig(device="cpu"), **names) as run:
        with run.stage("scorer"):
            run.save_checkpoint(CHECKPOINT, KEY, {})
            (tmp_path / "proxy.json").write_text("")
        writes = sorted(run._files(), key=lambda path: path.stat().st_mtime_ns)
        removals = run._files()
    assert writes[0].name == "env.json" and removals[-1].name in run_module.MARKS
    for path in removals:
        with open_run(tmp_path, results=("proxy.json",)):
            path.unlink()
    with open_run(tmp_path, results=("proxy.json",)):
        (tmp_path / "proxy.json").write_text("mine")
    with pytest.raises(ValueError, match=r"holds proxy\.json, but it seems"), open_run(tmp_path, results=("*.json",)):
        pass


def test_the_bills_of_a_version_with_fewer_stages_are_kept(tmp_path):
    old = Ledger(tmp_path / "cost.json", ("scorer", "search"))
    with old.billing("search") as cost:
        cost.images_forward += 7
    new = Ledger(tmp_path / "cost.json", ("scorer", "search", "finals"))
    new.read_back()
    assert new.costs["search"].images_forward == 7 and new.costs["finals"].wall_s == 0
