"""A lock is held by one process, and ends with it."""

import errno
import fcntl
import gc
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from lock_holder import Holder

from efftrain import lock as lock_module
from efftrain.errors import InUseError
from efftrain.lock import Lock, beside

HOST = os.uname().nodename


@pytest.fixture
def hold(tmp_path):
    """Starts a holder of ``tmp_path/lock`` in another process."""
    started = []

    def start(*child: str) -> Holder:
        started.append(Holder(tmp_path / "lock", tmp_path / "run", *child))
        return started[-1]

    yield start
    for holder in started:
        holder.kill()
        for child in holder.children:
            os.kill(child, signal.SIGKILL)


def take(folder: Path) -> Lock:
    return Lock(folder / "lock", folder / "run")


@pytest.mark.smoke
def test_a_second_process_is_refused_with_the_number_and_host_of_the_first(tmp_path, hold):
    first = hold()
    sentence = f"{tmp_path}/run is in use by process {first.pid} on {HOST}; wait for it or choose another --out"
    with pytest.raises(InUseError) as caught:
        take(tmp_path)
    assert str(caught.value) == sentence


def test_sigkill_releases_it(tmp_path, hold):
    hold().kill()
    assert (tmp_path / "lock").read_text().endswith(f"{HOST}\n")  # nobody could tidy up
    with take(tmp_path):
        assert (tmp_path / "lock").read_text() == f"{os.getpid()} {HOST}\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("child", ["fork", "spawn", "subprocess"])
def test_a_child_that_outlives_its_parent_does_not_hold_it(tmp_path, hold, child):
    parent = hold(child)
    with pytest.raises(InUseError, match=f"process {parent.pid} "):
        take(tmp_path)
    parent.kill()
    os.kill(parent.children[0], 0)  # is alive
    take(tmp_path).release()


FORKS = """
import os, sys, pathlib
from efftrain.lock import Lock
lock = Lock(pathlib.Path(sys.argv[1], "lock"), pathlib.Path("x"))
if not os.fork():
    lock.release()
    sys.exit()
os.wait()
print(pathlib.Path(sys.argv[1], "lock").read_text().split()[0] == str(os.getpid()), flush=True)
sys.stdin.read()
"""


def test_a_forked_child_that_ends_does_not_release_the_lock_of_its_parent(tmp_path):
    command = [sys.executable, "-c", FORKS, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout.readline() == "True\n"  # the child removed nothing
        with pytest.raises(InUseError, match=f"process {parent.pid} on {HOST}"):
            take(tmp_path)
        parent.stdin.close()
    take(tmp_path).release()


def take_in_another_process(folder: Path) -> None:
    code = "import sys, pathlib as p; from efftrain.lock import Lock; Lock(p.Path(sys.argv[1], 'lock'), p.Path('x'))"
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_one_process_may_take_it_again_and_the_last_release_counts(tmp_path):
    first, second = take(tmp_path), take(tmp_path)
    first.release()
    first.release()  # once is enough
    with pytest.raises(AssertionError, match="is in use"):
        take_in_another_process(tmp_path)
    del second
    gc.collect()  # an object that is gone holds nothing
    take_in_another_process(tmp_path)


def test_a_lock_file_that_was_deleted_is_no_longer_ours_to_delete(tmp_path, hold):
    lock = take(tmp_path)
    (tmp_path / "lock").unlink()
    other = hold()
    lock.release()
    assert (tmp_path / "lock").read_text() == f"{other.pid} {HOST}\n"


def test_a_file_that_its_holder_removes_while_we_open_it_is_not_what_we_lock(tmp_path, monkeypatch):
    """Between our opening and our locking: the other's file is gone, and a lock on it would keep nobody out."""
    flock, removed = fcntl.flock, []

    def late(descriptor, operation):
        if not removed:
            removed.append((tmp_path / "lock").unlink())
        flock(descriptor, operation)

    monkeypatch.setattr(lock_module.fcntl, "flock", late)
    with take(tmp_path), pytest.raises(AssertionError, match="is in use"):
        take_in_another_process(tmp_path)


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_without_locks_of_the_file_system_a_living_process_counts(tmp_path, monkeypatch, hold, code):
    def unsupported(descriptor, operation):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(lock_module.fcntl, "flock", unsupported)
    other = hold()
    with pytest.raises(InUseError, match=rf"process {other.pid} on {HOST}; wait for it or choose another --out"):
        take(tmp_path)
    other.kill()
    take(tmp_path).release()
    (tmp_path / "lock").write_text("17 elsewhere\n")
    with pytest.raises(
        InUseError, match=r"process 17 on elsewhere; wait for it, or delete \S+lock if that process has"
    ):
        take(tmp_path)
    (tmp_path / "lock").unlink()
    with take(tmp_path):
        assert (tmp_path / "lock").read_text() == f"{os.getpid()} {HOST}\n"


def test_other_errors_of_the_file_system_are_not_taken_for_a_lock(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="File exists"):
        Lock(tmp_path / "file" / "lock", tmp_path / "run")


def test_the_lock_beside_a_path_is_hidden_and_in_its_folder(tmp_path):
    assert beside(tmp_path / "cache.v1") == tmp_path / ".cache.v1.lock"
