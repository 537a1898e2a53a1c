"""A file lock that keeps other processes from a path, and is released however the process that holds it ends.

The lock is the kernel's (``flock``): SIGKILL or a crash releases it, and a leftover file locks nothing. The file holds
process and host only for the message. On NFS, Linux takes the lock on the server, for all hosts. File systems that
grant it to each host separately (Lustre with ``localflock``, mounted buckets) do not keep two hosts apart.

If the file system has no such locks, the file itself is the lock: it counts as long as its process is alive. Whether a
process on another host is alive cannot be found out, so the user is asked to delete the file when it has ended.
"""

import contextlib
import errno
import fcntl
import os
import threading
import weakref
from pathlib import Path

from efftrain.errors import InUseError

FILE_NAME = ".lock"  # in a directory that is locked by a file within it
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL)

_held: dict[Path, tuple[int, int]] = {}  # file -> its descriptor, and the number of locks of this process that share it
_guard = threading.Lock()


class Lock:
    """Keeps other processes from a path until ``release``, or until the ``with`` block, the object or the process ends.

    This process may lock the same path several times. A forked or spawned child does not hold the lock.

    Args:
      file: the file that is locked; its folder is created if missing, and the file is removed at the release.
      path: the path that the lock protects, for the message.
      option: the command line option with which another path can be chosen, for the message.

    Raises:
      InUseError: another process holds the lock.
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
    """Returns the lock file of a path that does not exist yet, or that is replaced as a whole."""
    return path.with_name(f".{path.name}{FILE_NAME}")


def _acquire(file: Path, path: Path, option: str) -> int:
    file.parent.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            _take(descriptor, file, path, option)
            if _is_at(file, descriptor):  # its last holder may have removed it between the two calls
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
    """Whether the process that wrote the file at this time still runs; a later process may have the same number."""
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
        if found != descriptor:  # in a forked child, which has closed the descriptor
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
    """Drops the locks in a forked child: they are the parent's, and a copied descriptor would keep them locked."""
    global _guard
    _guard = threading.Lock()
    for descriptor, _ in _held.values():
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget)
