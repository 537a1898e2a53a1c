"""What is timed is what users run; the times themselves belong to the machine and are not asserted."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import psutil
import pytest
from flax import nnx

from efftrain.errors import ConfigError
from efftrain.measure.cost import latency, memory
from efftrain.measure.cost.latency import Latency, decode, in_turns, measure_latency, side_by_side
from efftrain.models.config import llama
from efftrain.models.decoder import Decoder
from efftrain.models.decoding.generate import generate, prefill


@pytest.fixture(scope="module")
def model():
    config = llama(vocab_size=48, d_model=16, n_layers=2, n_heads=2, d_ff=24, max_length=24)
    return Decoder(config, rngs=nnx.Rngs(0))


def test_figures_of_a_latency():
    found = Latency(batch=4, tokens=10, rounds_s=(0.5, 0.2, 0.3), compile_s=1.0)
    assert found.median_s == 0.3
    assert found.spread_s == pytest.approx(0.3)
    assert found.s_per_token == pytest.approx(0.03)
    assert found.tokens_per_s == pytest.approx(4 * 10 / 0.3)


def test_both_halves(model):
    prefill, decode = measure_latency(model, batch=3, prompt_length=8, n_new=16, rounds=4)
    assert (prefill.batch, prefill.tokens, len(prefill.rounds_s)) == (3, 8, 4)
    assert (decode.batch, decode.tokens, len(decode.rounds_s)) == (3, 16, 4)
    for half in (prefill, decode):
        assert 0 < min(half.rounds_s) <= half.median_s <= min(half.rounds_s) + half.spread_s
        assert half.compile_s > 0


def test_compiling_and_warming_up_are_no_rounds(model, monkeypatch):
    """With a clock that ticks once a reading, each round lasts one tick."""
    ticks = iter(range(1000))
    monkeypatch.setattr(latency.time, "perf_counter", lambda: float(next(ticks)))
    for half in measure_latency(model, batch=3, prompt_length=8, n_new=16, rounds=3):
        assert half.rounds_s == (1.0, 1.0, 1.0)
        assert half.compile_s == 1.0


def test_the_timed_loop_draws_what_generate_draws(model):
    graph, state = nnx.split(model)
    prompts = jnp.asarray(np.random.default_rng(0).integers(0, 48, (2, 5)), jnp.int32)
    lengths = jnp.array([5, 3], jnp.int32)
    expected = generate(model, prompts, lengths, n_new=9)
    _, cache = jax.jit(lambda: prefill(model, prompts, lengths, slots=5 + 8))()
    assert len(np.unique(expected)) > 2  # the loop does not merely repeat a token
    for n in (3, 8):
        assert (decode(graph, state, expected[:, 0], cache, n) == expected[:, n]).all()


def test_too_long_or_nothing_is_refused(model):
    with pytest.raises(ConfigError, match=r"prompt and new tokens are 26 together and model\.max_length is 24"):
        measure_latency(model, batch=1, prompt_length=20, n_new=6)
    for name in ("batch", "prompt_length", "n_new", "rounds"):
        sizes = {"batch": 1, "prompt_length": 2, "n_new": 2, "rounds": 1} | {name: 0}
        with pytest.raises(ConfigError, match=rf"latency\.{name} is 0"):
            measure_latency(model, **sizes)


def test_host_peak_grows_with_what_is_held():
    before = memory.host_peak_bytes()
    free_below = max(before - psutil.Process().memory_info().rss, 0)
    held = np.ones((free_below + 2**26) // 8)  # every page is touched
    assert memory.host_peak_bytes() - before > 2**25
    assert held.nbytes < memory.host_peak_bytes() < 2**40


def test_device_peak_is_that_of_the_fullest(monkeypatch):
    class Device:
        def __init__(self, stats):
            self.memory_stats = lambda: stats

    devices = [Device({"peak_bytes_in_use": 5}), Device(None), Device({"peak_bytes_in_use": 9})]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert memory.device_peak_bytes() == 9
    monkeypatch.setattr(jax, "local_devices", lambda: devices[1:2])
    assert memory.device_peak_bytes() is None


def test_models_take_turns_and_medians_are_kept():
    calls, values = [], {"a": iter([5.0, 1.0, 3.0]), "b": iter([2.0, 2.0, 8.0])}

    def measure(name):
        calls.append(name)
        return {"seconds": next(values[name])}

    found = in_turns({name: partial(measure, name) for name in values}, 3)
    assert calls == ["a", "b"] * 3
    assert found == {"a": {"seconds": 3.0}, "b": {"seconds": 2.0}}


def test_side_by_side_measures_each_model_and_batch(model):
    found = side_by_side({"one": model, "same": model}, prompt_length=4, n_new=2, turns=1, rounds=1)
    figures = {f"{name}_b{batch}" for name in ("prefill_s", "decode_s_per_token") for batch in (1, 8)}
    assert {name: set(times) for name, times in found.items()} == {"one": figures, "same": figures}
    assert all(seconds > 0 for times in found.values() for seconds in times.values())
