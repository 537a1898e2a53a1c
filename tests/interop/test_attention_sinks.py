"""Attention sinks against gpt-oss in transformers, and what of gpt-oss cannot be imported."""

import json
from dataclasses import replace
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from efftrain.errors import ConfigError
from efftrain.interop.import_model import import_model
from efftrain.interop.plan import Refusal, classify
from efftrain.models.config import llama
from efftrain.ops.attention import cached_attention, causal_attention

BATCH, LENGTH, HEADS, KV_HEADS, D_HEAD, WINDOW = 2, 11, 6, 2, 10, 4


@pytest.mark.parametrize("window", [None, WINDOW])
def test_sinks_are_those_of_gpt_oss(window):
    torch = pytest.importorskip("torch", reason="needs the extra interop-test")
    gpt_oss = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss", reason="needs the extra interop-test")
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(BATCH, LENGTH, n, D_HEAD)).astype(np.float32) for n in (HEADS, KV_HEADS, KV_HEADS))
    sinks = rng.normal(size=HEADS).astype(np.float32) + 1
    distance = np.arange(LENGTH)[:, None] - np.arange(LENGTH)
    seen = (distance >= 0) & (distance < (window or LENGTH))
    theirs = SimpleNamespace(num_key_value_groups=HEADS // KV_HEADS, sinks=torch.from_numpy(sinks), training=False)
    mask = torch.from_numpy(np.where(seen, 0, -np.inf).astype(np.float32))
    wanted, _ = gpt_oss.eager_attention_forward(
        theirs, *(torch.from_numpy(a).transpose(1, 2) for a in (q, k, v)), mask, D_HEAD**-0.5
    )
    ours = causal_attention(q, k, v, window=window, sinks_h=jnp.asarray(sinks))
    np.testing.assert_allclose(ours, wanted.numpy(), atol=1e-5)
    assert np.abs(causal_attention(q, k, v, window=window) - wanted.numpy()).max() > 0.1
    keys, values = (jnp.pad(jnp.asarray(a).swapaxes(1, 2), ((0, 0), (0, 0), (0, 5), (0, 0))) for a in (k, v))
    last = jnp.full((BATCH, 1), LENGTH - 1)
    cached = cached_attention(q[:, -1:], keys, values, last, window=window, sinks_h=jnp.asarray(sinks))
    np.testing.assert_allclose(cached, wanted[:, -1:].numpy(), atol=1e-5)


def test_a_model_with_sinks_is_exported_as_nothing_else():
    config = llama(vocab_size=31, d_model=8, n_layers=1, n_heads=2, n_kv_heads=1, d_ff=12, max_length=16)
    block = config.pattern[0]
    found = classify(config.replace(pattern=(replace(block, attention=replace(block.attention, sinks=True)),)))
    assert isinstance(found, Refusal)
    assert "attention.sinks" in found.reason


def test_gpt_oss_is_refused_with_its_fields(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "gpt_oss", "swiglu_limit": 7.0}))
    (tmp_path / "model" / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    with pytest.raises(ConfigError, match=r"model_type is 'gpt_oss'; swiglu_limit \(a clamped gate\), the biases"):
        import_model(tmp_path / "model", tmp_path / "run")
