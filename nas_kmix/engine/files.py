"""Read and write files so that no half-written file ever has its final name, and nothing that is read runs code.

Every write goes to a temporary file beside the target, is flushed to disk and then renamed. JSON, NPZ and tensors only.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import math
import os
import re
import zipfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

TEMPORARY_SUFFIX = ".nas_kmix.part"
REMOVE_OURS = "remove it, or use --fresh"
GIVE_ANOTHER = "give a file that a search or a training has written"  # a user's own file is not ours to remove
# An archive may unpack to this many bytes in any case, and to this multiple of its own size: deflate reaches 1,000 on
# zeros, but never 100 on photographs and scores.
SURELY_FITS, MOST_EXPANSION = 1 << 28, 100


def write_bytes(path: Path, payload: bytes) -> None:
    """Write atomically. Raises OSError naming `path`; the temporary file is then removed and the old file untouched."""
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(payload)
            file.flush()
            _to_disk(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written: {reason_of(error)}.") from error


def reason_of(error: OSError) -> str:
    """What the system says, and what helps where that is known."""
    remedies = {
        (errno.ENOSPC, errno.EDQUOT): "; free some space",
        (errno.EACCES, errno.EPERM, errno.EROFS): "; choose a place where you may write",
    }
    known = (remedy for numbers, remedy in remedies.items() if error.errno in numbers)
    return f"{error.strerror or error}{next(known, '')}"


def check_place(flag: str, path: Path | None) -> None:
    """Raise ValueError unless a file can be written to the path of a flag, so far as folders tell."""
    if path is None:
        return
    if path.is_dir():
        raise ValueError(f"{flag} {path} is a folder; name a file.")
    nearest = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        what = "may not be written to" if nearest.is_dir() else "is no folder"
        raise ValueError(f"{flag} {path} cannot be written: {nearest} {what}.")


def _to_disk(descriptor: int) -> None:
    """fsync, without an error on file systems that have none."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Like numpy.savez, with the same bytes for the same arrays (a fixed date in the archive)."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0)), member.getvalue())
    write_bytes(path, buffer.getvalue())


def save_tensors(path: Path, state: Mapping[str, Any]) -> None:
    """torch.save through memory, so that a full disk raises OSError instead of leaving a broken archive."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_bytes(path, buffer.getvalue())


def read_json(path: Path) -> Any:
    """Raises ValueError naming the file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such file.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not readable JSON ({error}).") from error


def read_npz(path: Path, names: Collection[str] | None = None) -> dict[str, np.ndarray]:
    """The arrays of an archive, or those of `names` that it has; the others are not opened. No pickles.

    The size that it claims to unpack to is checked first. Raises ValueError naming the file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            _refuse_bomb(archive, path.stat().st_size)
            arrays = {}
            for member in archive.namelist():
                name = member.removesuffix(".npy")
                if name != member and (names is None or name in names):
                    with archive.open(member) as file:
                        if _claimed_bytes(file) > archive.getinfo(member).file_size:
                            raise ValueError(f"{member} holds less than its header says")
                    with archive.open(member) as file:
                        arrays[name] = np.lib.format.read_array(file, allow_pickle=False)
                        if file.read(1):  # reading to the end also compares the checksum
                            raise ValueError(f"{member} is longer than its header says")
            return arrays
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such file.") from None
    except MemoryError as error:
        raise OSError(f"{path} does not fit into memory ({error}).") from error
    except Exception as error:  # a damaged archive may raise nearly anything
        _raise_if_unreadable(path, error)
        reason = str(error) or type(error).__name__
        if "Object arrays" in reason:
            reason = "it holds Python objects; save plain arrays with numpy.savez"
        raise ValueError(f"{path} is not a complete .npz file ({reason}); copy it again or make it again.") from error


def _claimed_bytes(file: IO[bytes]) -> int:
    """How many bytes of values an array has by its header, which is all that is read."""
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(file)
    return math.prod(shape) * dtype.itemsize


def npz_names(path: Path) -> tuple[str, ...]:
    """The names of an archive's arrays; empty if it cannot be read."""
    try:
        with zipfile.ZipFile(path) as archive:
            return tuple(name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy"))
    except Exception:  # `read_npz` says what is wrong
        return ()


def load_tensors(path: Path, device: torch.device | str = "cpu", *, remedy: str = GIVE_ANOTHER) -> dict[str, Any]:
    """Load what `save_tensors` wrote: plain containers and tensors only.

    Raises ValueError naming the file and the `remedy`, which is `REMOVE_OURS` for a file of the run folder alone.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # torch does not compare the checksums that it writes
            _refuse_bomb(archive, path.stat().st_size)
            if (damaged := archive.testzip()) is not None:
                raise zipfile.BadZipFile(f"{damaged} has another checksum")
        state = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such file.") from None
    except Exception as error:  # a damaged pickle may raise nearly anything
        if lacks_memory(error):
            raise
        _raise_if_unreadable(path, error)
        raise ValueError(
            f"{path} is cut short or not a checkpoint of ours ({type(error).__name__}); {remedy}."
        ) from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} is not a checkpoint of ours; {remedy}.")
    return state


@contextlib.contextmanager
def damage_named(path: Path, remedy: str) -> Iterator[None]:
    """Turn errors of the block, which uses the content of `path`, into a ValueError that names the file."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ArithmeticError, ValueError, RuntimeError) as error:
        if lacks_memory(error):  # no fault of the file
            raise
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{path} is damaged ({reason}); {remedy}.") from error


def lacks_memory(error: BaseException) -> bool:
    """Whether the error says that a GPU or the machine has no memory left."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and bool(re.search("not enough memory|can't allocate memory", str(error)))


def _raise_if_unreadable(path: Path, error: Exception) -> None:
    """Raise ValueError if the system could not read the file, e.g. for want of permission; its content may be right."""
    damaged = (None, errno.EINVAL)  # a damaged index sends zipfile to places that no file has
    if isinstance(error, OSError) and error.errno not in damaged:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from error


def _refuse_bomb(archive: zipfile.ZipFile, size: int) -> None:
    """Raise ValueError if a small file claims to unpack to a huge one; zipfile never unpacks more than claimed."""
    unpacked = sum(member.file_size for member in archive.infolist())
    if unpacked > max(SURELY_FITS, MOST_EXPANSION * size):
        raise ValueError(f"its {size:,} bytes would unpack to {unpacked:,}")


def hash_tensors(state: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, shapes and values, independent of the file."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def hash_arrays(*arrays: np.ndarray) -> str:
    """SHA-256 over shapes and values."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.shape} {array.dtype.str}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
