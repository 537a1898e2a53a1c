"""One process at a time: a lock on a file that goes with the process that holds it, however that process ends.

The lock is the kernel's (``flock``): SIGKILL or a crash releases it, and a file that is left over locks nothing. What
stands in the file, process and host, is for the message. On NFS, Linux takes the lock on the server, for all hosts.
File systems that grant it to each host alone (Lustre with ``localflock``, mounted buckets) do not keep two hosts apart.

Where the file system has no such locks, the file itself is the lock: it counts as long as its process is alive. Of a
process on another host nobody can tell, so that the user is asked to delete the file when it has ended.
"""

import contextlib
import errno
import fcntl
import os
import threading
import weakref
from pathlib import Path

from efftrain.errors import InUseError

FILE_NAME = ".lock"  # in a directory that is locked from within
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL)

_held: dict[Path, tuple[int, int]] = {}  # file -> its descriptor, and how many locks of this process share it
_guard = threading.Lock()


class Lock:
    """Keeps other processes from a path until ``release``, the end of the ``with`` block, of the object or the process.

    This process may lock the same path several times. A forked or spawned child does not hold the lock.

    Args:
      file: the file that is locked; its folder is made, and it is removed at the release.
      path: what it stands for, for the message.
      option: which names another path, for the message.

    Raises:
      InUseError: another process holds it.
      OSError: the file cannot be written.
    """

    def __init__(self, file: Path, path: Path, *, option: str = "--out"):
        key = file.absolute()
        with _guard:
            descriptor, count = _held.get(key) or (_acquire(key, path, option), 0)
            _held[key] = descriptor, count + 1
        self._finalizer = weakref.finalize(self, _release, key, descriptor)

    def release(self) -> None:
        self._finalizer()

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()


def beside(path: Path) -> Path:
    """The lock file of a path that does not exist yet, or that is replaced as a whole."""
    return path.with_name(f".{path.name}{FILE_NAME}")


def _acquire(file: Path, path: Path, option: str) -> int:
    file.parent.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            _take(descriptor, file, path, option)
            if _is_at(file, descriptor):  # and was not removed by its last holder between the two calls
                os.truncate(descriptor, 0)
                os.pwrite(descriptor, f"{os.getpid()} {os.uname().nodename}\n".encode(), 0)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _take(descriptor: int, file: Path, path: Path, option: str) -> None:
    process, _, host = os.pread(descriptor, 300, 0).decode(errors="replace").strip().partition(" ")
    holder = f"process {process} on {host}" if host else "another process"
    then = ""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    except BlockingIOError:
        pass
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        here = host == os.uname().nodename
        if not process.isdecimal() or (here and not _is_alive(int(process), since=os.fstat(descriptor).st_mtime)):
            return
        then = "" if here else f", or delete {file} if that process has ended,"
    raise InUseError(f"{path} is in use by {holder}; wait for it{then} or choose another {option}")


def _is_alive(process: int, *, since: float) -> bool:
    """Whether the process that wrote at this time still runs; a later one only got its number."""
    import psutil

    try:
        return process != os.getpid() and psutil.Process(process).create_time() <= since
    except psutil.NoSuchProcess:
        return False


def _is_at(file: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(file), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _release(file: Path, descriptor: int) -> None:
    with _guard:
        found, count = _held.get(file, (None, 0))
        if found != descriptor:  # a forked child, which has closed it
            return
        if count > 1:
            _held[file] = descriptor, count - 1
            return
        del _held[file]
        with contextlib.suppress(OSError):
            if _is_at(file, descriptor):
                file.unlink()
        os.close(descriptor)


def _forget() -> None:
    """In a forked child: the lock is the parent's, and would outlive it with every copy of its descriptor."""
    global _guard
    _guard = threading.Lock()
    for descriptor, _ in _held.values():
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget)
