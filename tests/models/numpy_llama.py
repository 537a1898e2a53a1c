"""The decoder's truth: a Llama forward pass in NumPy float64, one token and one head at a time."""

import math
from functools import partial

import jax
import numpy as np
from flax import nnx

from efftrain.models.norms import RMS, LayerNorm
from efftrain.models.positions import Rotary
from efftrain.models.residual import Parallel, PostNorm, Sandwich
from efftrain.models.soft_cap import SoftCap


def forward(model, tokens, segments=None, positions=None):
    """Logits (batch, length, vocab) of a ``Decoder``: layer i is repeat ``i // P`` of the pattern's block ``i % P``."""
    config = model.config
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), nnx.to_pure_dict(nnx.state(model)))
    tokens = np.asarray(tokens)
    positions = (
        np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape) if positions is None else np.asarray(positions)
    )
    segments = np.zeros_like(tokens) if segments is None else np.asarray(segments)
    x = params["embedding"]["table"][tokens] * config.embedding_multiplier
    if config.learned_positions:
        x = x + params["positions"]["table"][positions]
    n_pattern = len(config.pattern)
    norm = partial(_norm, eps=config.norm_eps, kind=config.norm)
    head_norm = norm if isinstance(config.norm, RMS) else partial(_norm, eps=config.norm_eps, kind=RMS())
    for i in range(n_pattern * config.n_repeats):
        block, where = config.pattern[i % n_pattern], (i % n_pattern, i // n_pattern)
        layer = jax.tree.map(lambda a, where=where: a[where[1]], params["blocks"][where[0]])

        def attend(x, block=block, layer=layer):
            return _attention(block.attention, layer["attention"], x, positions, segments, head_norm)

        x = _joined(block, layer, norm, x, attend, config.residual_multiplier)
    x = norm(x, params["norm"]) * config.logits_multiplier
    logits = x @ params["embedding"]["table"].T if config.tied_embedding else _linear(x, params["head"])
    return logits if config.logit_softcap is None else config.logit_softcap * np.tanh(logits / config.logit_softcap)


def _joined(block, layer, norm, x, attend, by):
    def normed(name, x):
        return norm(x, layer[name])

    def mlp(x):
        return _mlp(block.mlp, layer["mlp"], x)

    if isinstance(block.residual, PostNorm):
        x = x + by * normed("attention_post_norm", attend(x))
        return x + by * normed("mlp_post_norm", mlp(x))
    if isinstance(block.residual, Sandwich):
        x = x + by * normed("attention_post_norm", attend(normed("attention_norm", x)))
        return x + by * normed("mlp_post_norm", mlp(normed("mlp_norm", x)))
    attended = attend(normed("attention_norm", x))
    if isinstance(block.residual, Parallel):
        return x + by * attended + by * mlp(normed("attention_norm" if block.residual.shared_norm else "mlp_norm", x))
    x = x + by * attended
    return x + by * mlp(normed("mlp_norm", x))


def _mlp(config, params, x):
    activate = ACTIVATIONS[config.activation]
    if not config.gated:
        return _linear(activate(_linear(x, params["up"])), params["down"])
    return _linear(activate(_linear(x, params["gate"])) * _linear(x, params["up"]), params["down"])


ACTIVATIONS = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "relu": lambda x: np.maximum(x, 0),
}


def _norm(x, params, eps, kind):
    if isinstance(kind, LayerNorm):
        x, scale = x - x.mean(-1, keepdims=True), params["scale"]
    else:
        scale = params["scale"] + kind.zero_centered
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale + params.get("bias", 0)


def _attention(config, params, x, positions, segments, norm):
    batch, length, _ = x.shape
    d = config.d_head

    def heads(name, n):
        y = _linear(x, params[name])
        if config.qk_norm == "full" and name != "value":
            y = norm(y, params[f"{name}_norm"])
        return y.reshape(batch, length, n, d)

    q, k, v = heads("query", config.n_heads), heads("key", config.n_kv_heads), heads("value", config.n_kv_heads)
    if config.qk_norm is True:
        q, k = norm(q, params["query_norm"]), norm(k, params["key_norm"])
    if isinstance(config.position, Rotary):
        q, k = (_rotate(a, positions, config.rope_theta, int(config.position.fraction * d)) for a in (q, k))
    out = np.zeros_like(q)
    for b in range(batch):
        for t in range(length):
            first = 0 if config.window is None else max(0, t - config.window + 1)
            seen = [s for s in range(first, t + 1) if segments[b, s] == segments[b, t]]
            for h in range(config.n_heads):
                g = h * config.n_kv_heads // config.n_heads
                scores = k[b, seen, g] @ q[b, t, h] * (config.scale or d**-0.5)
                if isinstance(config.score_mod, SoftCap):
                    scores = config.score_mod.cap * np.tanh(scores / config.score_mod.cap)
                most = scores.max()
                weights = np.exp(scores - most)
                nothing = np.exp(params["sinks"][h] - most) if config.sinks else 0.0
                out[b, t, h] = weights / (weights.sum() + nothing) @ v[b, seen, g]
    return _linear(out.reshape(batch, length, -1), params["out"])


def _rotate(x, positions, theta, n):
    turn = np.exp(1j * positions[..., None, None] * theta ** (-2 * np.arange(n // 2) / n))
    z = (x[..., : n // 2] + 1j * x[..., n // 2 : n]) * turn
    return np.concatenate([z.real, z.imag, x[..., n:]], axis=-1)


def _linear(x, params):
    return x @ params["kernel"] + params.get("bias", 0)
