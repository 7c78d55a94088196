"""Writes that fail leave the old file and nothing else; files that are damaged or hostile are refused by name."""

import errno
import io
import json
import os
import pickle
import resource
import time
import zipfile
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from nas_kmix.engine import files

WRITERS = {
    "text": lambda path: files.write_text(path, "n" * 5000),
    "json": lambda path: files.write_json(path, {"n": ["ñ" * 1000] * 5}),
    "npz": lambda path: files.write_npz(path, {"n": np.zeros(1000)}),
    "tensors": lambda path: files.save_tensors(path, {"n": torch.zeros(1000)}),
}


@pytest.fixture(params=WRITERS.values(), ids=WRITERS.keys())
def write(request):
    return request.param


def fail(*arguments):
    raise OSError(errno.ENOSPC, "No space left on device")


@contextmanager
def full_disk():
    """No file of this process may grow beyond 100 bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_writes_make_folders_and_replace(tmp_path, write):
    path = tmp_path / "a" / "b" / "file"
    write(path)
    first = path.read_bytes()
    path.write_bytes(b"old")
    write(path)
    assert path.read_bytes() == first
    assert [p.name for p in path.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("step", ["replace", "fsync"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, write, step):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match=rf"{path} could not be written: No space left on device.*space"):
        write(path)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("old", [b"old", None])
def test_a_full_disk_leaves_nothing_half_written(tmp_path, write, old):
    path = tmp_path / "file"
    if old:
        path.write_bytes(old)
    with full_disk(), pytest.raises(OSError, match=f"{path} could not be written"):
        write(path)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == ([old] if old else [])


def test_the_final_name_never_holds_half_a_file(tmp_path, monkeypatch, write):
    """At any moment the final name holds the old file or the whole new one."""
    path, seen = tmp_path / "file", []
    path.write_bytes(b"old")
    replace, fsync = os.replace, os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: seen.append(path.read_bytes()) or fsync(descriptor))
    monkeypatch.setattr(os, "replace", lambda a, b: seen.append(path.read_bytes()) or replace(a, b))
    write(path)
    assert seen == [b"old", b"old"] and path.read_bytes() != b"old"


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=f"{tmp_path / 'file' / 'x.json'} could not be written"):
        files.write_json(tmp_path / "file" / "x.json", {})


ARRAYS = {
    "images": np.arange(24, dtype=np.uint8).reshape(2, 3, 4),
    "transposed": np.arange(6.0).reshape(2, 3).T,
    "one": np.float32(3.5),
    "none": np.zeros((0, 4), dtype=np.int64),
    "names": np.array(["ant", "Käfer"]),
}


def test_npz_holds_what_was_given(tmp_path):
    files.write_npz(tmp_path / "x.npz", ARRAYS)
    with np.load(tmp_path / "x.npz") as numpys:
        ours = files.read_npz(tmp_path / "x.npz")
        assert list(ours) == list(ARRAYS) == numpys.files
        for name, array in ARRAYS.items():
            assert ours[name].dtype == np.asarray(array).dtype
            np.testing.assert_array_equal(ours[name], array)
            np.testing.assert_array_equal(numpys[name], array)


def test_npz_bytes_do_not_depend_on_the_time(tmp_path, monkeypatch):
    files.write_npz(tmp_path / "x.npz", ARRAYS)
    monkeypatch.setattr(time, "time", lambda: 2e9)
    files.write_npz(tmp_path / "y.npz", ARRAYS)
    assert (tmp_path / "x.npz").read_bytes() == (tmp_path / "y.npz").read_bytes()
    assert {info.date_time[0] for info in zipfile.ZipFile(tmp_path / "x.npz").infolist()} == {1980}


def test_npz_refuses_objects_before_it_writes(tmp_path):
    with pytest.raises(ValueError, match="Object arrays"):
        files.write_npz(tmp_path / "x.npz", {"x": np.array([{}])})
    assert list(tmp_path.iterdir()) == []


class Bomb:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def archive(save=np.savez, **arrays):
    buffer = io.BytesIO()
    save(buffer, **arrays)
    return buffer.getvalue()


def plain_array():
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    return buffer.getvalue()


def damaged_deflate():
    payload = bytearray(archive(np.savez_compressed, x=np.arange(1000)))
    payload[60:90] = b"\xff" * 30
    return bytes(payload)


BAD_ARCHIVES = {
    "empty": b"",
    "text": b"hello",
    "cut short": archive(x=np.zeros(1000))[:4000],
    "one array": plain_array(),
    "damaged": damaged_deflate(),
    "objects": archive(x=np.array([{}, []], dtype=object)),
}


@pytest.mark.parametrize("payload", BAD_ARCHIVES.values(), ids=BAD_ARCHIVES.keys())
def test_bad_archives_are_named(tmp_path, payload):
    path = tmp_path / "x.npz"
    path.write_bytes(payload)
    with pytest.raises(ValueError, match=rf"{path} is not a complete .npz file .*make it again"):
        files.read_npz(path)


@pytest.mark.parametrize("read", [files.read_npz, files.read_json, files.load_tensors])
def test_missing_files_and_folders_are_named(tmp_path, read):
    with pytest.raises(ValueError, match=f"{tmp_path / 'x'}: there is no such file"):
        read(tmp_path / "x")
    with pytest.raises(ValueError, match=str(tmp_path)):
        read(tmp_path)


def test_archives_are_read_without_running_them(tmp_path):
    (tmp_path / "x.npz").write_bytes(archive(x=np.array([Bomb(tmp_path / "bang")], dtype=object)))
    with pytest.raises(ValueError, match=r"x\.npz"):
        files.read_npz(tmp_path / "x.npz")
    assert not (tmp_path / "bang").exists()


def test_json_keeps_all_letters(tmp_path):
    files.write_json(tmp_path / "x.json", {"Käfer": ["蟻", 1, 2.5, None]})
    assert files.read_json(tmp_path / "x.json") == {"Käfer": ["蟻", 1, 2.5, None]}
    assert json.loads((tmp_path / "x.json").read_bytes()) == {"Käfer": ["蟻", 1, 2.5, None]}


@pytest.mark.parametrize("payload", [b"", b"{", b'{"a": 1', b"\xff\xfe", b"[" * 100_000])
def test_bad_json_is_named(tmp_path, payload):
    (tmp_path / "x.json").write_bytes(payload)
    with pytest.raises(ValueError, match=f"{tmp_path / 'x.json'} is not readable JSON"):
        files.read_json(tmp_path / "x.json")


STATE = {
    "model": {"w": torch.arange(6.0).view(2, 3), "h": torch.ones(2, dtype=torch.bfloat16)},
    "epoch": 3,
    "key": ["a"],
}


def saved(state, **options):
    buffer = io.BytesIO()
    torch.save(state, buffer, **options)
    return buffer.getvalue()


def test_tensors_come_back(tmp_path):
    files.save_tensors(tmp_path / "x.pt", STATE)
    state = files.load_tensors(tmp_path / "x.pt")
    assert {k: v for k, v in state.items() if k != "model"} == {"epoch": 3, "key": ["a"]}
    for name, tensor in STATE["model"].items():
        assert state["model"][name].dtype == tensor.dtype and torch.equal(state["model"][name], tensor)


@pytest.mark.parametrize("old_format", [False, True])
def test_checkpoints_cut_short_anywhere_are_refused(tmp_path, old_format):
    payload, path = saved(STATE, _use_new_zipfile_serialization=not old_format), tmp_path / "x.pt"
    for length in [*range(0, len(payload), 61), len(payload) - 1]:
        path.write_bytes(payload[:length])
        with pytest.raises(ValueError, match=f"{path} is cut short or not a checkpoint of ours.*give a file"):
            files.load_tensors(path)


FOREIGN = {
    "text": b"hello",
    "zeros": bytes(300),
    "png": b"\x89PNG\r\n\x1a\n" + bytes(100),
    "npz": archive(x=np.zeros(3)),
    "list": saved([1, 2]),
    "tensor": saved(torch.zeros(3)),
    "pickle": pickle.dumps({"a": 1}),
    "pop": b"\x80\x02a.",  # a pickle that takes from an empty stack
    "struct": b"\x80\x02G\x00.",  # a number cut short
}


@pytest.mark.parametrize("payload", FOREIGN.values(), ids=FOREIGN.keys())
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_foreign_files_are_no_checkpoints(tmp_path, payload):
    (tmp_path / "x.pt").write_bytes(payload)
    with pytest.raises(ValueError, match=rf"{tmp_path / 'x.pt'} is .*not a checkpoint of ours.*give a file"):
        files.load_tensors(tmp_path / "x.pt")


def test_checkpoints_are_read_without_running_them(tmp_path):
    (tmp_path / "x.pt").write_bytes(saved({"x": Bomb(tmp_path / "bang")}))
    with pytest.raises(ValueError, match=r"x\.pt"):
        files.load_tensors(tmp_path / "x.pt")
    assert not (tmp_path / "bang").exists()


def test_hash_of_tensors_sees_names_shapes_types_and_values():
    state = {
        "a": torch.arange(6.0),
        "b": torch.tensor(True),
        "c": torch.ones(2, dtype=torch.bfloat16),
        "d": torch.ones(0),
    }
    changed = [
        {**state, "a": torch.arange(6.0).view(2, 3)},
        {**state, "a": torch.arange(6.0).double()},
        {**state, "a": torch.arange(6.0).flip(0)},
        {**state, "b": torch.tensor(False)},
        {**state, "d": torch.ones(0, 2)},
        {**{k: v for k, v in state.items() if k != "a"}, "e": state["a"]},
        {k: v for k, v in state.items() if k != "c"},
    ]
    hashes = [files.hash_tensors(s) for s in (state, *changed)]
    assert len(set(hashes)) == len(hashes)


def test_hash_of_tensors_ignores_order_and_layout():
    images = torch.arange(120.0).view(1, 2, 3, 20)
    state = {"a": images, "b": torch.tensor(1)}
    same = {"b": torch.tensor(1), "a": images.to(memory_format=torch.channels_last).requires_grad_()}
    assert files.hash_tensors(state) == files.hash_tensors(same)


def test_hash_of_arrays_sees_shapes_types_values_and_divisions():
    a = np.arange(6)
    different = [
        (a,),
        (a.reshape(2, 3),),
        (a.reshape(3, 2),),
        (a.astype(np.int32),),
        (a[::-1],),
        (a[:3], a[3:]),
        (a, a),
    ]
    hashes = [files.hash_arrays(*arrays) for arrays in different]
    assert len(set(hashes)) == len(hashes)
    assert files.hash_arrays(a.reshape(2, 3).T) == files.hash_arrays(np.ascontiguousarray(a.reshape(2, 3).T))


def test_a_file_system_without_fsync_can_be_written_to(tmp_path, write, monkeypatch):
    def refuse(_):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refuse)
    write(tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_file_that_the_system_cannot_read_is_not_called_damaged(tmp_path, monkeypatch):
    files.save_tensors(tmp_path / "state.pt", {"a": torch.zeros(2)})
    files.write_npz(tmp_path / "set.npz", {"a": np.zeros(2)})

    def refuse(*arguments):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(files.zipfile, "ZipFile", refuse)
    for path, read in ((tmp_path / "state.pt", files.load_tensors), (tmp_path / "set.npz", files.read_npz)):
        with pytest.raises(ValueError, match=rf"{path.name} cannot be read: Permission denied\.$"):
            read(path)


def test_a_machine_without_memory_is_no_damage_of_a_file(tmp_path, monkeypatch):
    error = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
    files.save_tensors(tmp_path / "state.pt", {"a": torch.zeros(2)})

    def load(*arguments, **options):
        raise error

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        files.load_tensors(tmp_path / "state.pt")
    with pytest.raises(RuntimeError, match="can't allocate memory"), files.damage_named(tmp_path / "x", "remove it"):
        raise error


def test_nobody_is_told_to_remove_a_file_of_his_own(tmp_path):
    """A foreign checkpoint or data set is not a leftover of a run."""
    foreign = tmp_path / "resnet50.pth"
    torch.save(torch.zeros(3), foreign, _use_new_zipfile_serialization=False)
    listed = tmp_path / "list.pt"
    torch.save([1, 2], listed)
    (tmp_path / "set.npz").write_bytes(b"PK cut short")
    for path in (foreign, listed):
        with pytest.raises(ValueError, match="give a file that a search") as caught:
            files.load_tensors(path)
        assert "remove it" not in str(caught.value)
        with pytest.raises(ValueError, match="remove it, or use --fresh"):
            files.load_tensors(path, remedy=files.REMOVE_OURS)
    with pytest.raises(ValueError, match="copy it again or make it again") as caught:
        files.read_npz(tmp_path / "set.npz")
    assert "remove it" not in str(caught.value)
