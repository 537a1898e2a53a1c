"""Scaled rotary frequencies, against numbers that transformers 5.24 (modeling_rope_utils) computed."""

import re

import numpy as np
import pytest
import tiny_models as tiny

from efftrain.errors import ConfigError
from efftrain.models.config import Attention
from efftrain.models.positions import Rotary
from efftrain.models.rope_scaling import DynamicScaling, LinearScaling, Llama3Scaling, LongRope, Yarn
from efftrain.ops.rope import rope_frequencies

PLAIN = [1.0, 0.31622776, 0.1, 0.031622779, 0.0099999998, 0.0031622779, 0.001, 0.00031622779]
LONG = LongRope(
    short_factor=(1.0, 1.0, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5),
    long_factor=(1.0, 1.5, 2.0, 3.0, 5.0, 9.0, 20.0, 40.0),
    original_length=2048,
)


@pytest.mark.parametrize(
    ("scaling", "theta", "max_length", "frequencies", "factor"),
    [
        (
            Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_length=8192),
            500_000.0,
            131_072,
            [1.0, 0.19392276, 0.037606031, 0.0072926651, 0.00052484602, 3.4281024e-05, 6.6478697e-06, 1.2891732e-06],
            1.0,
        ),
        (
            LinearScaling(factor=4.0),
            1e4,
            8192,
            [0.25, 0.079056941, 0.025, 0.0079056947, 0.0024999999, 0.00079056947, 0.00025000001, 7.9056947e-05],
            1.0,
        ),
        (
            Yarn(factor=4.0, original_length=2048),
            1e4,
            8192,
            [1.0, 0.31622776, 0.1, 0.025693506, 0.0062499996, 0.0013834966, 0.00025000001, 7.9056947e-05],
            1.138629436111989,
        ),
        (
            Yarn(
                factor=4.0, original_length=2048, beta_fast=16.0, beta_slow=2.0, mscale=1.0, mscale_all_dim=0.5,
                truncate=False,
            ),
            1e4,
            8192,
            [1.0, 0.31622776, 0.1, 0.026607499, 0.0042616189, 0.00079056947, 0.00025000001, 7.9056947e-05],
            1.0648216253695715,
        ),
        (
            Yarn(factor=4.0, original_length=2048, attention_factor=1.5),
            1e4,
            8192,
            [1.0, 0.31622776, 0.1, 0.025693506, 0.0062499996, 0.0013834966, 0.00025000001, 7.9056947e-05],
            1.5,
        ),
        (
            LONG,
            1e4,
            8192,
            [1.0, 0.2108185, 0.050000001, 0.010540925, 0.0020000001, 0.0003513642, 4.9999999e-05, 7.9056945e-06],
            1.087114613009218,
        ),
        (
            LONG,
            1e4,
            2048,
            [1.0, 0.31622776, 0.1, 0.02874798, 0.0083333328, 0.0024325214, 0.00071428571, 0.00021081851],
            1.0,
        ),
        (DynamicScaling(factor=2.0, original_length=2048), 1e4, 2048, PLAIN, 1.0),
    ],
    ids=["llama3", "linear", "yarn", "yarn of deepseek", "yarn with a factor", "long", "short", "dynamic"],
)  # fmt: skip
def test_frequencies_are_those_of_transformers(scaling, theta, max_length, frequencies, factor):
    found_r, found = scaling.scaled(rope_frequencies(16, theta), theta, max_length)
    np.testing.assert_allclose(found_r, frequencies, rtol=2e-6)
    assert found == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize(
    ("position", "message"),
    [
        (lambda: Rotary(fraction=0.0), "position.fraction is 0.0; give a share above 0 and at most 1"),
        (lambda: Rotary(fraction=0.4), "position.fraction is 0.4, which rotates 3 of the 8 channels of a head"),
        (lambda: Rotary(fraction=0.1), "position.fraction is 0.1, which rotates 0 of the 8 channels of a head"),
        (lambda: Rotary(scaling=LONG), "LongRope.short_factor has 8 factors and a head has 4 frequencies"),
        (lambda: LinearScaling(factor=0.0), "LinearScaling.factor is 0.0; give a positive number"),
        (
            lambda: Llama3Scaling(factor=8.0, low_freq_factor=4.0, high_freq_factor=4.0, original_length=8),
            "Llama3Scaling.high_freq_factor is 4.0; make it larger than low_freq_factor 4.0",
        ),
    ],
)
def test_what_is_impossible_is_refused(position, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        Attention(n_heads=1, n_kv_heads=1, d_head=8, position=position())


def test_dynamic_scaling_is_refused_for_longer_texts():
    position = Rotary(scaling=DynamicScaling(factor=2.0, original_length=23))
    attention = Attention(n_heads=1, n_kv_heads=1, d_head=8, position=position)
    block = tiny.BlockConfig(attention=attention, mlp=tiny.Dense(d_ff=8))
    with pytest.raises(ConfigError, match=r"model.max_length is 24, and beyond 23 tokens the frequencies of Dynamic"):
        tiny.build(tiny.config(pattern=(block,)))
