"""Several processes as one run: they find each other, agree before the first step, and notice when one is lost.

What is said here goes through the key-value store of ``jax.distributed``'s coordinator: it needs no device, and every
wait has an end. JAX is imported where it is used, so that reading a configuration stays cheap.
"""

import contextlib
import itertools
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import RenderHook
from rich.text import Text

from efftrain.config import difference
from efftrain.errors import ConfigError, EfftrainError, RunError
from efftrain.progress import console

if TYPE_CHECKING:
    import jax

WAIT_S = 300  # for what all processes do within seconds of each other: open a corpus, make a directory
PREFIX = "EFFTRAIN_"
_calls = itertools.count()  # every process makes the same calls in the same order, so that numbers name them


@dataclass(frozen=True, kw_only=True)
class Hosts:
    """How the processes of a run find each other. Without any field, Slurm, Open MPI, GKE and TPU VMs are recognised.

    Attributes:
      coordinator: ``host:port`` of process 0, reachable from every other; the port is free there.
      processes: how many.
      process: which of them this is, from 0.
      connect_s: seconds to wait for the others.
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
        if self.coordinator is None:
            return
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdecimal():
            raise ConfigError(f"{PREFIX}COORDINATOR is {self.coordinator!r}; give host:port, e.g. 10.0.0.2:8476")
        if not 0 <= self.process < self.processes:
            raise ConfigError(f"{PREFIX}PROCESS is {self.process}; it must be from 0 to {self.processes - 1}")

    @classmethod
    def from_environment(cls) -> "Hosts":
        """``EFFTRAIN_COORDINATOR``, ``EFFTRAIN_PROCESSES``, ``EFFTRAIN_PROCESS``, ``EFFTRAIN_CONNECT_S``,
        ``EFFTRAIN_LOST_AFTER_S``: the fields, in capitals."""
        given = {
            name: os.environ[PREFIX + name.upper()]
            for name in cls.__dataclass_fields__
            if os.environ.get(PREFIX + name.upper())
        }
        for name in given.keys() - {"coordinator"}:
            if not given[name].isdecimal():
                raise ConfigError(f"{PREFIX}{name.upper()} is {given[name]!r}; give a whole number")
            given[name] = int(given[name])
        return cls(**given)


_lost_after_s = Hosts.lost_after_s


def connect(config: Hosts | None = None) -> None:
    """Joins the other processes of this run; a process that is alone does nothing. Call it before JAX sees a device.

    From here on the console of every process but the first shows errors only, behind the process's number.

    Args:
      config: by default what the environment says.

    Raises:
      ConfigError: the environment contradicts itself, or the coordinator or the others do not answer in time.
    """
    global _lost_after_s
    config = Hosts.from_environment() if config is None else config
    if _client() is not None or config.processes == 1 or not (config.coordinator or _in_cluster()):
        return
    import jax

    start = time.monotonic()
    if config.process:
        _await_coordinator(config.coordinator, config.connect_s)
    _lost_after_s = config.lost_after_s
    # The service takes SIGTERM away from Python, knows no Ctrl-C, and Orbax may swallow its one notice.
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
            initialization_timeout=round(left_s) + 30,  # behind our own: JAX aborts the process from C++
            # Behind our own, which says more; this one also notices when the coordinator's machine is gone.
            heartbeat_timeout_seconds=max(10, 2 * config.lost_after_s),
            shutdown_timeout_seconds=config.lost_after_s,
            cluster_detection_method="deactivate" if config.coordinator else None,
        )
        jax.devices()  # all of them together: the first look of one alone waits for the others
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
    """From another thread: the first one is in C++, which cannot be interrupted."""
    console.print(f"error: {_not_met(config, 'timeout')}", style="red", markup=False)
    os._exit(2)


def process_index() -> int:
    """Which process this is, from 0; known without touching a device."""
    from jax._src import distributed

    return distributed.global_state.process_id if distributed.global_state.client else 0


def process_count() -> int:
    from jax._src import distributed

    return distributed.global_state.num_processes if distributed.global_state.client else 1


def part_of_rows(sharding: "jax.sharding.Sharding", shape: tuple[int, ...]) -> tuple[int, int]:
    """Which part of the rows (dimension 0) of a global array the devices of this process hold: (number, of how many).

    Raises:
      ConfigError: the rows have gaps.
    """
    places = sharding.addressable_devices_indices_map(shape).values()
    rows = sorted({row for place in places for row in range(*place[0].indices(shape[0]))})
    first, held = rows[0], len(rows)
    if rows[-1] - first >= held or shape[0] % held or first % held:
        raise ConfigError(
            f"the mesh gives process {process_index()} {held} of {shape[0]} rows, with gaps; choose mesh axes that "
            "divide the devices of one process, or are multiples of them"
        )
    return first // held, shape[0] // held


def exchange(text: str, *, wait_s: float = WAIT_S) -> list[str]:
    """What every process says, in their order. All of them must call it.

    Raises:
      RunError: some did not within ``wait_s`` seconds.
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
    """What ``make`` gives on process 0 (JSON), on all of them: for a file that only process 0 can be sure to see."""
    return json.loads(exchange(json.dumps(make()) if process_index() == 0 else "")[0])


@contextlib.contextmanager
def together(*, wait_s: float = WAIT_S) -> Iterator[None]:
    """What fails in this block with an ``EfftrainError`` on one process, fails on all of them, with its sentence."""
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
    """Stops all processes where one has other facts (JSON: configuration, code, versions) than process 0.

    Raises:
      RunError: names the process and the first fact in which it differs.
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
    """A connection to the port of process 0; an ``OSError`` where it is gone."""
    from jax._src import distributed

    return _open(distributed.global_state.coordinator_address, None)


def _open(address: str, timeout_s: float | None) -> socket.socket:
    host, _, port = address.rpartition(":")
    return socket.create_connection((host.strip("[]"), int(port)), timeout=timeout_s)


def _in_cluster() -> bool:
    """Whether ``jax.distributed.initialize()`` would find several processes; one alone must not wait for others."""
    import jax
    from jax._src import cloud_tpu_init

    def several(count: str, index: str) -> bool:
        return index in os.environ and int(os.environ.get(count, "1")) > 1

    if several("SLURM_NTASKS", "SLURM_PROCID") or several("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"):
        return True
    if jax.config.jax_platforms == "cpu":
        return False
    return cloud_tpu_init.running_in_cloud_tpu_vm or "JOB_COMPLETION_INDEX" in os.environ


def _await_coordinator(address: str, wait_s: float) -> None:
    """Until the port answers. JAX would wait too, but ends the process from C++ when it gives up."""
    end = time.monotonic() + wait_s
    while True:
        try:
            _open(address, max(0.1, end - time.monotonic())).close()
            return
        except OSError as error:
            if time.monotonic() > end - 0.2:
                raise ConfigError(
                    f"the coordinator {address} cannot be reached since {wait_s:.0f} s ({error.strerror or error}); "
                    "check that process 0 runs there, that the name resolves here, and that the firewall lets the "
                    "port pass"
                ) from error
        time.sleep(0.2)


class _ErrorsOnly(RenderHook):
    """The console of a process that is not the first."""

    def __init__(self, process: int):
        self._prefix = f"process {process}: "

    def process_renderables(self, renderables: list[Any]) -> list[Any]:
        texts = [text for text in renderables if isinstance(text, Text) and text.plain.startswith("error: ")]
        return [Text(self._prefix, end="") + text for text in texts]


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
