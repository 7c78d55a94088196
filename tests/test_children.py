"""Child processes: results in order, whatever their number; they end with their parent, and their errors arrive."""

import functools
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from processes import ROOT

from nas_kmix.engine.children import ChildError, Children, run_in_children
from nas_kmix.engine.keys import StageMismatchError

PATIENCE = 60  # seconds


def squared(factor, number):
    return factor * number**2


def wait_for_the_last(folder, number):
    if number == 3:
        (folder / "last").touch()
    while number == 0 and not (folder / "last").exists():
        time.sleep(0.01)
    return number, os.getpid()


def threads_and_signals(_):
    return torch.get_num_threads(), signal.pthread_sigmask(signal.SIG_BLOCK, ())


def refuse_two(number):
    if number == 2:
        raise ValueError("two is too many")
    return number


def find_other_settings(_):
    raise StageMismatchError("the search in seed-0 had other settings", "search")


def end_at_once(_):
    os._exit(3)


def sleep_for_ever(path):
    with open(path, "w") as file:
        file.write(str(os.getpid()))
    time.sleep(10 * PATIENCE)


def parent_of_sleepers(folder):
    run_in_children(sleep_for_ever, [f"{folder}/{i}" for i in range(2)], jobs=2)


def test_results_come_in_the_order_of_the_tasks():
    assert run_in_children(functools.partial(squared, 3), range(5), jobs=3) == [3 * n * n for n in range(5)]


def test_a_child_takes_the_next_task_while_another_is_busy(tmp_path):
    results = run_in_children(functools.partial(wait_for_the_last, tmp_path), range(4), jobs=2)
    assert [number for number, _ in results] == [0, 1, 2, 3]
    pids = [pid for _, pid in results]
    assert len(set(pids)) == 2 and os.getpid() not in pids and len(set(pids[1:])) == 1


def test_children_have_one_thread_and_leave_signals_to_their_parent():
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    (found,) = run_in_children(threads_and_signals, [None], jobs=1)
    assert found == (1, {signal.SIGINT, signal.SIGTERM} | before)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


def test_tasks_may_follow_from_results():
    with Children(functools.partial(squared, 1), 2) as children:
        children.submit("first", 3)
        name, nine = children.next()
        children.submit("second", nine)
        assert (name, children.next()) == ("first", ("second", 81)) and children.unfinished == 0


def test_an_error_of_the_function_is_raised_here_and_no_child_is_left():
    with pytest.raises(ValueError, match="two is too many"):
        run_in_children(refuse_two, range(4), jobs=2)
    assert not multiprocessing.active_children()


def test_an_error_that_names_its_stage_arrives_whole():
    with pytest.raises(StageMismatchError, match=r"^the search in seed-0 had other settings$") as caught:
        run_in_children(find_other_settings, range(1), jobs=1)
    assert caught.value.stage == "search"


def test_a_lost_child_is_one_sentence():
    with pytest.raises(ChildError, match="use fewer --jobs"):
        run_in_children(end_at_once, range(3), jobs=2)


def test_a_check_can_end_the_wait(tmp_path):
    def stop():
        if (tmp_path / "0").exists():
            raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_in_children(sleep_for_ever, [str(tmp_path / "0")], jobs=1, check=stop)
    assert time.monotonic() - began < PATIENCE and not multiprocessing.active_children()


def test_children_end_with_a_parent_that_is_killed(tmp_path):
    parent = multiprocessing.get_context("spawn").Process(target=parent_of_sleepers, args=(tmp_path,))
    parent.start()
    deadline = time.monotonic() + PATIENCE
    while not all((tmp_path / name).exists() and (tmp_path / name).read_text() for name in "01"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    pids = [int((tmp_path / name).read_text()) for name in "01"]
    parent.kill()
    parent.join()
    killed = time.monotonic()
    while any(_runs(pid) for pid in pids):
        assert time.monotonic() - killed < 5
        time.sleep(0.05)


def _runs(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_script_without_a_main_guard_is_not_run_again(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import math\nfrom nas_kmix.engine.children import run_in_children\n"
        "print('here', run_in_children(math.sqrt, [4, 9], jobs=2))\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "here [2.0, 3.0]\n", "")
