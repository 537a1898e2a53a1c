"""The folder of a run's checkpoints: opened with Orbax, and checked to be writable, not in use, and still there."""

from collections.abc import Sequence
from pathlib import Path

import orbax.checkpoint as ocp
from etils import epath

from efftrain.errors import RunError
from efftrain.lock import Lock, beside
from efftrain.progress import console
from efftrain.sharding import hosts
from efftrain.train.checkpoints.checkpoint_errors import first_line
from efftrain.train.checkpoints.streamed_arrays import streamed_handler


def open_manager(
    directory: Path | epath.Path, *, keep: int | None, keep_every: int | None, read_only: bool, streamed: bool
) -> ocp.CheckpointManager:
    """Opens the folder with Orbax; the arguments are those of ``Checkpoints``."""
    several = hosts.process_count() > 1
    return ocp.CheckpointManager(
        directory,
        options=ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            keep_period=keep_every,
            enable_async_checkpointing=True,
            read_only=read_only,
            create=False,
            cleanup_tmp_directories=not read_only,  # left by a process that was killed while it saved
            # With named processes, Orbax synchronises through the coordinator, which has timeouts, not the devices.
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                active_processes=set(range(hosts.process_count())) if several else None
            ),
        ),
        item_handlers={
            "state": streamed_handler() if streamed else ocp.PyTreeCheckpointHandler(),
            "data": ocp.JsonCheckpointHandler(),
            "config": ocp.JsonCheckpointHandler(),
        },
    )


def check_writable(directory: epath.Path) -> None:
    """Creates the folder and checks that every process can write to it; leaves no file in it.

    Checked at the start, because otherwise the first save would fail hours later.

    Raises:
      RunError: a process cannot write there, or does not see the folder of the first process.
    """
    probe, seen = directory / f".probe-{hosts.process_index()}", directory / ".probe-0"

    def explain(error: BaseException) -> RunError:
        reason = getattr(error, "strerror", None) or first_line(error)
        return RunError(
            f"cannot write a checkpoint to {directory} ({reason}); free disk space, correct the permissions or choose "
            "another --out or --training.checkpoints"
        )

    with hosts.together():
        try:
            if hosts.process_index() == 0:
                directory.mkdir(parents=True, exist_ok=True)
                probe.write_text("written at the start, to see whether it can be")
        except Exception as error:  # a bucket's client has its own classes
            raise explain(error) from error
    try:
        with hosts.together():
            if not seen.exists():
                raise RunError(
                    f"{directory} on process {hosts.process_index()} is not the folder of process 0; put checkpoints "
                    "where all hosts see them: a shared disk, or a bucket with --training.checkpoints gs://..."
                )
            try:
                if hosts.process_index():
                    probe.write_text("")
                    probe.unlink()
            except Exception as error:
                raise explain(error) from error
    finally:
        if hosts.process_index() == 0:
            seen.unlink(missing_ok=True)


def lock_folder(directory: Path | epath.Path) -> Lock | None:
    """Locks the folder against other commands, including runs that use it through --training.checkpoints.

    Returns:
      The lock. None: on every process but the first of several, and for a bucket, which has no locks.

    Raises:
      InUseError: another command writes to the folder.
      RunError: the lock cannot be written.
    """
    lock = None
    with hosts.together():
        if hosts.process_index() == 0 and "://" not in str(directory):
            try:
                lock = Lock(beside(Path(directory)), Path(directory), option="--training.checkpoints")
            except OSError as error:
                raise RunError(
                    f"cannot lock {directory} ({error.strerror}); correct the permissions of its parent, or choose "
                    "another --training.checkpoints"
                ) from error
    return lock


def vanished(directory: Path | epath.Path, steps: Sequence[int]) -> bool:
    """Returns whether somebody else moved or deleted the folder, or checkpoints of this run in it; warns if so.

    All processes must call it, between two saves.

    Args:
      directory: the folder of the checkpoints.
      steps: steps of the checkpoints that this run left in the folder.
    """
    folder = epath.Path(directory)

    def look() -> list[int] | None:
        gone = [step for step in steps if not (folder / str(step)).exists()]
        return gone if gone or "://" in str(directory) or folder.exists() else None

    gone = hosts.from_first(look)
    if gone == []:
        return False
    which = f" with checkpoints {', '.join(map(str, gone))}" if gone else ""
    console.print(
        f"warning: {directory}{which} was moved or deleted while the run goes on; the next checkpoint is complete and "
        "is written to a new folder of that name; to keep the others, move them there",
        style="yellow",
        markup=False,
    )
    return True
