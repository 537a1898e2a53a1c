"""Names of slices, and the arithmetic of their links, by hand. That libtpu agrees is in tests/aot."""

import sys
from dataclasses import dataclass

import numpy as np
import pytest
from jax.sharding import Mesh

from efftrain.errors import ConfigError
from efftrain.sharding.chips import CHIPS, find_chip
from efftrain.sharding.roofline import axis_bandwidth, roofline, sent_bytes
from efftrain.sharding.topologies import Topology, find_topology


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("v9:2x2", "is not known; known are v4"),
        ("v5e", "has no shape such as v5e:8x8"),
        ("v5e:8by8", "has no shape"),
        ("v5p:4x4", "the torus of v5p has 3"),
        ("v6e:2x2x2", "the torus of v6e has 2"),
        ("gpu:8", "only where that GPU"),
        ("h100:8", "only where that GPU"),
        ("cpu:many", "write it like cpu:8"),
        ("cpu:4096", "xla_force_host_platform_device_count=4096"),
    ],
)
def test_a_topology_that_cannot_be_is_one_sentence(name, sentence):
    with pytest.raises(ConfigError, match=sentence):
        find_topology(name)


def test_missing_libtpu_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(ConfigError, match=r"pip install 'efftrain\[aot\]'"):
        find_topology("v5litepod:2x2")


def test_cpu_devices_stand_in_for_a_slice():
    found = find_topology("cpu:4")
    assert (len(found.devices), found.chip, found.shape) == (4, None, ())


def test_a_ring_sends_what_the_formulas_of_collectives_say():
    assert sent_bytes("all-gather", 800, 8) == 700
    assert sent_bytes("reduce-scatter", 800, 8) == 700
    assert sent_bytes("all-reduce", 800, 8) == 1400
    assert sent_bytes("all-to-all", 800, 8) == 700
    assert sent_bytes("collective-permute", 800, 8) == 800
    assert sent_bytes("all-reduce", 800, 1) == 0


def test_the_slowest_part_decides_the_step():
    chip = CHIPS["TPU v5 lite"]
    found = roofline(chip, flops=197e12, hbm_bytes=0.819e12 * 3, ici_s=2)
    assert (found.compute_s, found.hbm_s, found.ici_s) == (1, 3, 2)
    assert (found.step_s, found.dominant) == (3, "HBM")


@dataclass(frozen=True)
class PlacedChip:
    coords: tuple[int, ...]
    process_index: int = 0


def torus(shape: tuple[int, ...], wraps: tuple[bool, ...]) -> Topology:
    devices = [PlacedChip((*c, 0)) for c in np.ndindex(*shape)]
    return Topology(name="torus", devices=devices, chip=CHIPS["TPU v5 lite"], shape=shape, wraps=wraps)


def test_links_count_by_the_dimensions_that_an_axis_runs_along():
    link = CHIPS["TPU v5 lite"].link_bytes_per_s
    slice_ = torus((4, 16), (False, True))
    mesh = Mesh(np.array(slice_.devices, dtype=object).reshape(4, 2, 8), ("a", "b", "c"))
    assert axis_bandwidth(slice_, mesh, ("a",)) == link  # a line of 4: its end has one link
    assert axis_bandwidth(slice_, mesh, ("b", "c")) == 2 * link  # the whole ring of 16
    assert axis_bandwidth(slice_, mesh, ("c",)) == link  # half of the ring is a line
    assert axis_bandwidth(slice_, mesh, ("a", "b", "c")) == 3 * link


def test_a_device_is_found_by_its_kind():
    assert find_chip("NVIDIA H200") == CHIPS["NVIDIA H200"]
    assert find_chip("cpu") is None
