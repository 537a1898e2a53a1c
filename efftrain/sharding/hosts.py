"""Several processes as one run: they connect, agree before the first step, and notice when one is lost.

Messages go through the key-value store of ``jax.distributed``'s coordinator, which needs no device and in which every
wait has a timeout. JAX is imported where it is used, so that reading a configuration stays cheap.
"""

import contextlib
import itertools
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import RenderHook
from rich.text import Text

from efftrain.config import difference
from efftrain.errors import ConfigError, EfftrainError, RunError
from efftrain.progress import console

if TYPE_CHECKING:
    import jax

WAIT_S = 300  # timeout of what all processes do within seconds of each other: open a corpus, create a directory
PREFIX = "EFFTRAIN_"
_calls = itertools.count()  # every process makes the same calls in the same order, so that numbers identify them


@dataclass(frozen=True, kw_only=True)
class Hosts:
    """How the processes of a run connect. If no field is set, Slurm, Open MPI, GKE and TPU VMs are recognised.

    Attributes:
      coordinator: ``host:port`` of process 0, reachable from every other process; the port must be free there.
      processes: number of processes.
      process: index of this process, from 0.
      connect_s: seconds to wait for the other processes.
      lost_after_s: seconds of silence after which a process counts as lost and the others end.
    """

    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None
    connect_s: int = 300
    lost_after_s: int = 60

    def __post_init__(self) -> None:
        places = {"COORDINATOR": self.coordinator, "PROCESSES": self.processes, "PROCESS": self.process}
        missing = [PREFIX + name for name, value in places.items() if value is None]
        if 0 < len(missing) < len(places):
            raise ConfigError(f"{missing[0]} is not set though others of {', '.join(PREFIX + n for n in places)} are; "
                              "set all three on every process, or none")  # fmt: skip
        for name in ("connect_s", "lost_after_s"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{PREFIX}{name.upper()} is {getattr(self, name)}; it must be at least 1 second")
        if self.coordinator is None or self.processes is None or self.process is None:
            return
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdecimal():
            raise ConfigError(f"{PREFIX}COORDINATOR is {self.coordinator!r}; give host:port, e.g. 10.0.0.2:8476")
        if not 0 <= self.process < self.processes:
            raise ConfigError(f"{PREFIX}PROCESS is {self.process}; it must be from 0 to {self.processes - 1}")

    @classmethod
    def from_environment(cls) -> "Hosts":
        """Reads the fields from the environment, in capitals after ``EFFTRAIN_``.

        The variables are ``EFFTRAIN_COORDINATOR``, ``EFFTRAIN_PROCESSES``, ``EFFTRAIN_PROCESS``, ``EFFTRAIN_CONNECT_S``
        and ``EFFTRAIN_LOST_AFTER_S``.
        """
        given: dict[str, Any] = {
            name: os.environ[PREFIX + name.upper()]
            for name in cls.__dataclass_fields__
            if os.environ.get(PREFIX + name.upper())
        }
        for name in given.keys() - {"coordinator"}:
            if not given[name].isdecimal():
                raise ConfigError(f"{PREFIX}{name.upper()} is {given[name]!r}; give a whole number")
            given[name] = int(given[name])
        return cls(**given)


def check_single_process(work: str) -> None:
    """Raises ConfigError if several processes were started, for work that one process does.

    Args:
      work: start of the message, such as "a model is compressed".
    """
    if (Hosts.from_environment().processes or 1) > 1:
        raise ConfigError(f"{work} by one process; unset EFFTRAIN_PROCESSES and start one")


_lost_after_s = Hosts.lost_after_s


def connect(config: Hosts | None = None) -> None:
    """Connects to the other processes of this run; does nothing for a single process.

    It must be called before JAX sees a device. From then on the console of every process but the first shows only
    errors, with the number of the process.

    Args:
      config: how to connect. None: read from the environment.

    Raises:
      ConfigError: the environment contradicts itself, or the coordinator or other processes do not answer in time.
    """
    global _lost_after_s
    config = Hosts.from_environment() if config is None else config
    if _client() is not None or config.processes == 1 or not (config.coordinator or _in_cluster()):
        return
    import jax

    start = time.monotonic()
    if config.process and config.coordinator:
        _await_coordinator(config.coordinator, config.connect_s)
    _lost_after_s = config.lost_after_s
    # The service takes SIGTERM away from Python, ignores Ctrl-C, and Orbax may consume its only notice.
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # the CPU backend has none of its own
    left_s = max(1.0, config.connect_s - (time.monotonic() - start))
    too_late = threading.Timer(left_s, _give_up, [config])
    too_late.daemon = True
    too_late.start()
    try:
        jax.distributed.initialize(
            config.coordinator,
            config.processes,
            config.process,
            initialization_timeout=round(left_s) + 30,  # later than our own, because JAX aborts the process from C++
            # Later than our own, which says more; this one also notices when the coordinator's machine is gone.
            heartbeat_timeout_seconds=max(10, 2 * config.lost_after_s),
            shutdown_timeout_seconds=config.lost_after_s,
            cluster_detection_method="deactivate" if config.coordinator else None,
        )
        jax.devices()  # on all processes together, because the first call on one waits for the others
    except (RuntimeError, ValueError, OSError) as error:
        raise _not_met(config, _first_line(error)) from error
    finally:
        too_late.cancel()
    if process_index():
        console.push_render_hook(_ErrorsOnly(process_index()))


def _not_met(config: Hosts, why: str) -> ConfigError:
    where = config.coordinator or "of this cluster"
    return ConfigError(
        f"{f'all {config.processes}' if config.processes else 'all'} processes did not meet at the coordinator {where} "
        f"within {config.connect_s} s ({why}); check that each of them started, with the same address and count, and "
        "that its port is free there and open for the others"
    )


def _give_up(config: Hosts) -> None:
    """Ends the process from another thread, because the main thread is in C++ and cannot be interrupted."""
    console.print(f"error: {_not_met(config, 'timeout')}", style="red", markup=False)
    os._exit(2)


def process_index() -> int:
    """Returns the index of this process, from 0, without touching a device."""
    from jax._src import distributed

    return distributed.global_state.process_id if distributed.global_state.client else 0


def process_count() -> int:
    from jax._src import distributed

    return distributed.global_state.num_processes if distributed.global_state.client else 1


def part_of_rows(sharding: "jax.sharding.Sharding", shape: tuple[int, ...]) -> tuple[int, int]:
    """Returns which part of the rows (dimension 0) of a global array this process holds: (number, number of parts).

    Raises:
      ConfigError: the rows of this process are not contiguous.
    """
    places = sharding.addressable_devices_indices_map(shape).values()
    # An addressable device always has its indices.
    rows = sorted({row for place in places for row in range(*place[0].indices(shape[0]))})  # ty: ignore[not-subscriptable]
    first, held = rows[0], len(rows)
    if rows[-1] - first >= held or shape[0] % held or first % held:
        raise ConfigError(
            f"the mesh gives process {process_index()} {held} of {shape[0]} rows, with gaps; choose mesh axes that "
            "divide the devices of one process, or are multiples of them"
        )
    return first // held, shape[0] // held


def exchange(text: str, *, wait_s: float = WAIT_S) -> list[str]:
    """Returns the texts of all processes, in their order. All of them must call it.

    Args:
      text: text of this process.
      wait_s: seconds to wait for the other processes.

    Raises:
      RunError: a process did not call it within ``wait_s`` seconds.
    """
    client = _client()
    if client is None:
        return [text]
    place, wait_ms = f"efftrain/said/{next(_calls)}", round(1000 * wait_s)
    client.key_value_set(f"{place}/{process_index()}", text)
    try:
        client.wait_at_barrier(place, wait_ms)
    except RuntimeError as error:
        here = {name.rsplit("/", 1)[1] for name, _ in client.key_value_dir_get(place)}
        silent = ", ".join(str(i) for i in range(process_count()) if str(i) not in here) or "some"
        raise RunError(
            f"process {silent} of {process_count()} did not answer within {wait_s:.0f} s; look at its log and start "
            "all processes again"
        ) from error
    said = {int(name.rsplit("/", 1)[1]): value for name, value in client.key_value_dir_get(place)}
    return [said[i] for i in range(process_count())]


def from_first(make: Callable[[], Any]) -> Any:
    """Returns on all processes what ``make`` returns on process 0 (JSON), such as from a file that only it may see."""
    return json.loads(exchange(json.dumps(make()) if process_index() == 0 else "")[0])


@contextlib.contextmanager
def together(*, wait_s: float = WAIT_S) -> Generator[None]:
    """Makes an ``EfftrainError`` in this block on one process an error on all processes, with the same message."""
    problem = None
    try:
        yield
    except EfftrainError as error:
        problem = error
    said = exchange("" if problem is None else str(problem), wait_s=wait_s)
    if problem is not None:
        raise problem
    for number, sentence in enumerate(said):
        if sentence:
            raise RunError(f"process {number}: {sentence}")


def agree(facts: Mapping[str, Any]) -> None:
    """Stops all processes if one has other facts (JSON: configuration, code, versions) than process 0.

    Raises:
      RunError: facts differ; the message names the process and the first difference.
    """
    first = from_first(lambda: facts)
    with together():
        if lines := difference(first, json.loads(json.dumps(facts))):
            more = f" and {len(lines) - 1} more" if len(lines) > 1 else ""
            raise RunError(
                f"process {process_index()} differs from process 0 in {lines[0]}{more}; start the same code, packages "
                "and configuration on every host"
            )


def _client() -> Any:
    from jax._src import distributed  # no public name in 0.10 and 0.11; Orbax and Flax take it from here too

    return distributed.global_state.client


def reach_coordinator() -> socket.socket:
    """Opens a connection to the port of process 0; raises ``OSError`` if it is gone or was never there."""
    from jax._src import distributed

    address = distributed.global_state.coordinator_address
    if address is None:
        raise OSError("this process has no coordinator; call connect first")
    return _open(address, None)


def _open(address: str, timeout_s: float | None) -> socket.socket:
    host, _, port = address.rpartition(":")
    return socket.create_connection((host.strip("[]"), int(port)), timeout=timeout_s)


def _in_cluster() -> bool:
    """Whether ``jax.distributed.initialize()`` would find several processes; a single one must not wait for others."""
    import jax
    from jax._src import cloud_tpu_init

    def several(count: str, index: str) -> bool:
        return index in os.environ and int(os.environ.get(count, "1")) > 1

    if several("SLURM_NTASKS", "SLURM_PROCID") or several("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"):
        return True
    if jax.config.jax_platforms == "cpu":  # ty: ignore[missing-attribute]  # an option, added at run time
        return False
    return cloud_tpu_init.running_in_cloud_tpu_vm or "JOB_COMPLETION_INDEX" in os.environ


def _await_coordinator(address: str, wait_s: float) -> None:
    """Waits until the port answers. JAX would wait too, but ends the process from C++ when it gives up."""
    end = time.monotonic() + wait_s
    while True:
        try:
            _open(address, max(0.1, end - time.monotonic())).close()
            return
        except OSError as error:
            if time.monotonic() > end - 0.2:
                raise ConfigError(
                    f"the coordinator {address} cannot be reached within {wait_s:.0f} s ({error.strerror or error}); "
                    "check that process 0 runs there, that the name resolves here, and that the firewall lets the "
                    "port pass"
                ) from error
        time.sleep(0.2)


class _ErrorsOnly(RenderHook):
    """Rich render hook of a process that is not the first: only errors are shown, with the number of the process."""

    def __init__(self, process: int):
        self._prefix = f"process {process}: "

    def process_renderables(self, renderables: list[Any]) -> list[Any]:
        texts = [text for text in renderables if isinstance(text, Text) and text.plain.startswith("error: ")]
        return [Text(self._prefix, end="") + text for text in texts]


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
