"""A stage of twenty lines is given, found, made, refused, billed, killed and resumed like the real ones."""

import itertools
import json
import shutil
import signal
from dataclasses import asdict, dataclass
from types import SimpleNamespace

import pytest
import torch

from nas_kmix.engine import files
from nas_kmix.engine.keys import StageMismatchError, check_key, stage_key
from nas_kmix.engine.loop import Ended, run_loop
from nas_kmix.engine.meter import NonFiniteLossError
from nas_kmix.engine.run import Run, StoppedError
from nas_kmix.pipeline.stage import obtain

PERIODS = (4, 4, 3)  # steps


# -- the stage: descend a parabola, `start` being the result of a stage before it --------------------------------------


@dataclass(frozen=True)
class Settings:
    lr: float = 0.1
    momentum: float = 0.5


class Descent:
    """The task: `x` falls towards 0; each period records it."""

    def __init__(self, config, start, run):
        self.config, self.run, self.found = config, run, []
        self.x, self.v = torch.tensor(start, dtype=torch.float64), torch.zeros((), dtype=torch.float64)

    def start(self, period):
        self.lr = self.config.lr / (period + 1)

    def batches(self, period, first_step):
        return iter(range(first_step, PERIODS[period]))

    def step(self, batch, period, step, meter):
        meter.add(step, 1, loss=self.x.square())
        self.v = self.config.momentum * self.v + 2 * self.x + 0.01 * batch
        self.x = self.x - self.lr * self.v
        return 1

    def end(self, period, means):
        self.found.append(float(self.x))
        return Ended(means)

    def state_dict(self):
        return {"x": self.x, "v": self.v, "found": self.found}

    def load_state_dict(self, state):
        self.x, self.v, self.found = state["x"], state["v"], list(state["found"])


def key(config, start):
    return stage_key("toy", asdict(config), {"start": start})


def load(path, config, start, *, run, key):
    state = files.read_json(path)
    check_key(path, state["key"], key)
    return state["found"]


def make(path, config, start, *, run, key):
    task = Descent(config, start, run)
    run_loop(task, PERIODS, name="toy", key=key, run=run)
    files.write_json(path, {"key": key, "found": task.found})
    return task.found


toy = SimpleNamespace(NAME="toy", FILE="toy.json", key=key, load=load, make=make)


# -- what it gets for free ---------------------------------------------------------------------------------------------


def obtained(folder, config=None, start=8.0, given=None):
    with Run(folder, stages=("toy",)) as run:
        found = obtain(toy, config or Settings(), start, run=run, given=given)
        run.finish()
        return found


def left_in(folder):
    paths = [path for path in folder.rglob("*") if path.is_file() and path.suffix in (".json", ".csv", ".pt")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths if path.name != "cost.json"}


def bill(folder):
    return json.loads((folder / "cost.json").read_text())["stages"]["toy"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """An undisturbed run, and its result."""
    folder = tmp_path_factory.mktemp("alone")
    return folder, obtained(folder)


@pytest.fixture
def signals(monkeypatch):
    """Has a signal come in, or the process die, at the given steps of a run, counted from 1 over all invocations."""
    steps, take, at = itertools.count(1), Descent.step, {}

    def step(self, *arguments):
        images, number = take(self, *arguments), next(steps)
        if number in at:
            at[number]()
        return images

    monkeypatch.setattr(Descent, "step", step)
    return at


def test_it_is_made_once_and_skipped_afterwards(alone, tmp_path, capsys):
    folder, found = alone
    assert set(left_in(folder)) == {"toy.json", "metrics.csv"} and len(found) == len(PERIODS)
    assert bill(folder)["images_forward"] == bill(folder)["images_backward"] == sum(PERIODS)
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert obtained(copy) == found and left_in(copy) == left_in(folder)
    assert f"toy: {copy / 'toy.json'} is up to date, skipped" in capsys.readouterr().out
    assert bill(copy) == {**bill(folder), "skipped": True}


@pytest.mark.parametrize(
    ("changed", "differing"),
    [({"config": Settings(lr=0.2)}, "lr was 0.1, now 0.2"), ({"start": 9.0}, "start was 8.0, now 9.0")],
)
def test_other_settings_are_refused_by_name_and_nothing_changes(changed, differing, alone, tmp_path):
    copy = shutil.copytree(alone[0], tmp_path / "copy")
    with pytest.raises(StageMismatchError, match=rf"toy\.json was made with other settings: {differing}\.$"):
        obtained(copy, **changed)
    assert left_in(copy) == left_in(alone[0]) and bill(copy) == bill(alone[0])


def test_a_given_result_is_taken_whatever_its_key_and_billed_with_its_cost(alone, tmp_path, capsys):
    folder, found = alone
    assert obtained(tmp_path / "a", Settings(lr=0.2), given=folder / "toy.json") == found
    assert left_in(tmp_path / "a") == {} and bill(tmp_path / "a") == {**bill(folder), "skipped": True}
    shutil.copy(folder / "toy.json", tmp_path / "toy.json")
    assert obtained(tmp_path / "b", given=tmp_path / "toy.json") == found
    assert "no readable cost.json, so the cost of toy.json is not billed" in capsys.readouterr().out


@pytest.mark.parametrize("step", range(1, sum(PERIODS) + 1))
def test_stopped_at_any_step_it_goes_on_to_the_same_bytes(step, alone, signals, tmp_path):
    signals[step] = lambda: signal.raise_signal(signal.SIGTERM)
    with pytest.raises(StoppedError):
        obtained(tmp_path)
    assert set(left_in(tmp_path)) - {"metrics.csv"} == {"checkpoints/toy.pt"}
    with pytest.raises(StageMismatchError, match=r"toy\.pt was made with other settings: momentum was 0\.5, now 0\.9"):
        obtained(tmp_path, Settings(momentum=0.9))
    assert obtained(tmp_path) == alone[1] and left_in(tmp_path) == left_in(alone[0])
    assert bill(tmp_path)["images_forward"] == sum(PERIODS)


@pytest.mark.parametrize("steps", [(1,), (3, 4), (6, 9), (11,), (4, 5, 7, 11)])
def test_killed_it_repeats_at_most_a_period(steps, alone, signals, tmp_path):
    def die():
        raise SystemError

    signals.update(dict.fromkeys(steps, die))
    for _ in steps:
        with pytest.raises(SystemError):
            obtained(tmp_path)
    assert obtained(tmp_path) == alone[1] and left_in(tmp_path) == left_in(alone[0])
    assert sum(PERIODS) <= bill(tmp_path)["images_forward"] <= sum(PERIODS) + max(PERIODS) * len(steps)


def test_a_checkpoint_that_a_kill_left_beside_the_result_goes(alone, tmp_path):
    copy = shutil.copytree(alone[0], tmp_path / "copy")
    (copy / "checkpoints").mkdir()
    (copy / "checkpoints" / "toy.pt").write_bytes(b"of a stage that is done")
    obtained(copy)
    assert not (copy / "checkpoints").exists()


def test_a_state_that_is_not_finite_is_never_saved(tmp_path):
    with pytest.raises(NonFiniteLossError, match=r"toy: the loss was not finite at step 2 of epoch 1\..*--fresh"):
        obtained(tmp_path, Settings(lr=1e200))
    assert not (tmp_path / "checkpoints").exists()


def test_a_file_may_be_a_state_to_go_on_from(alone, tmp_path, monkeypatch):
    """Like last.pt: `load` returns None for it, and the stage is made."""
    monkeypatch.setattr(toy, "load", lambda *arguments, **options: None)
    copy = shutil.copytree(alone[0], tmp_path / "copy")
    assert obtained(copy) == alone[1] and not bill(copy)["skipped"]
