"""How processes find each other, as far as one can show it. Several: tests/train/test_several_hosts.py."""

import os
import re

import jax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from efftrain.errors import ConfigError, RunError
from efftrain.sharding import hosts
from efftrain.sharding.hosts import Hosts
from efftrain.sharding.mesh import MeshConfig, make_mesh

GOOD = {"EFFTRAIN_COORDINATOR": "10.0.0.2:8476", "EFFTRAIN_PROCESSES": "4", "EFFTRAIN_PROCESS": "3"}
BAD = {
    "EFFTRAIN_PROCESS is not set though others": {"EFFTRAIN_PROCESS": ""},
    "EFFTRAIN_COORDINATOR is '10.0.0.2'; give host:port": {"EFFTRAIN_COORDINATOR": "10.0.0.2"},
    "EFFTRAIN_PROCESS is 4; it must be from 0 to 3": {"EFFTRAIN_PROCESS": "4"},
    "EFFTRAIN_PROCESSES is 'four'; give a whole number": {"EFFTRAIN_PROCESSES": "four"},
    "EFFTRAIN_CONNECT_S is 0; it must be at least 1 second": {"EFFTRAIN_CONNECT_S": "0"},
}


def test_the_environment_says_where_the_others_are(monkeypatch):
    for name, value in GOOD.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("EFFTRAIN_LOST_AFTER_S", "7")
    want = Hosts(coordinator="10.0.0.2:8476", processes=4, process=3, lost_after_s=7)
    assert Hosts.from_environment() == want


@pytest.mark.parametrize("sentence", BAD)
def test_a_contradiction_in_the_environment_is_one_sentence(monkeypatch, sentence):
    for name, value in (GOOD | BAD[sentence]).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        hosts.connect()


def test_a_process_that_is_alone_connects_to_nobody(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("EFFTRAIN_", "SLURM_", "OMPI_")):
            monkeypatch.delenv(name)
    before = jax.config.jax_cpu_collectives_implementation
    hosts.connect()
    hosts.connect(Hosts(coordinator="10.0.0.2:8476", processes=1, process=0))
    assert not jax.distributed.is_initialized()
    assert jax.config.jax_cpu_collectives_implementation == before
    assert (hosts.process_index(), hosts.process_count()) == (0, 1)


@pytest.mark.parametrize(
    ("variables", "several"),
    [
        ({}, False),
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, False),
        ({"SLURM_NTASKS": "8"}, False),  # the shell of an allocation, not a step
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, True),
    ],
)
def test_a_cluster_is_recognised_by_its_variables(monkeypatch, variables, several):
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_")):
            monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert hosts._in_cluster() is several


def test_what_one_process_says_it_hears():
    assert hosts.exchange("alone") == ["alone"]
    assert hosts.from_first(lambda: {"a": [1, None]}) == {"a": [1, None]}
    hosts.agree({"configuration": {"a": (1, 2)}})  # a tuple is a list in JSON: no difference
    with pytest.raises(RunError, match=r"^no disk$"), hosts.together():
        raise RunError("no disk")


class Share:
    """A sharding of which this process holds some of the devices."""

    def __init__(self, sharding: NamedSharding, mine: range):
        self._sharding, self._mine = sharding, mine

    def addressable_devices_indices_map(self, shape):
        return {d: i for d, i in self._sharding.devices_indices_map(shape).items() if d.id in self._mine}


@pytest.mark.parametrize(
    ("mesh", "mine", "part"),
    [
        (MeshConfig(), range(8), (0, 1)),
        (MeshConfig(), range(4, 8), (1, 2)),
        (MeshConfig(), range(2, 4), (1, 4)),
        (MeshConfig(fsdp=2, tensor=4), range(4), (0, 2)),
        (MeshConfig(fsdp=2, tensor=4), range(2, 4), (0, 2)),  # two processes feed the same rows
        (MeshConfig(fsdp=2, tensor=4), range(4, 6), (1, 2)),
        (MeshConfig(fsdp=1, tensor=8), range(4, 8), (0, 1)),
        (MeshConfig(fsdp=1, replica=2, context=4), range(4, 8), (1, 2)),
    ],
)
def test_a_process_feeds_the_rows_that_its_devices_hold(mesh, mine, part):
    sharding = NamedSharding(make_mesh(mesh), PartitionSpec(("replica", "fsdp", "expert"), "context"))
    assert hosts.part_of_rows(Share(sharding, mine), (16, 8)) == part


def test_rows_with_gaps_are_refused():
    sharding = NamedSharding(make_mesh(MeshConfig()), PartitionSpec("fsdp"))
    with pytest.raises(ConfigError, match="with gaps"):
        hosts.part_of_rows(Share(sharding, (0, 2)), (16, 8))
