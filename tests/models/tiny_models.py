"""Models small enough for a test, filled with NumPy's random numbers."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from efftrain.models.config import Attention, BlockConfig, Dense, ModelConfig
from efftrain.models.decoder import Decoder, abstract_decoder

PLAIN = BlockConfig(attention=Attention(n_heads=4, n_kv_heads=2, d_head=4, n_blocks=1), mlp=Dense(d_ff=24))
LOCAL = BlockConfig(
    attention=Attention(n_heads=2, n_kv_heads=2, d_head=8, qk_norm=True, window=3, rope_theta=500.0, n_blocks=2),
    mlp=Dense(d_ff=12),
)


def config(**changes) -> ModelConfig:
    """Two kinds of blocks that alternate, twice: the second is local, normalises queries and keys, and is narrower."""
    base = ModelConfig(vocab_size=29, d_model=16, pattern=(PLAIN, LOCAL), n_repeats=2, max_length=24)
    return base.replace(**changes)


def build(model_config: ModelConfig, seed: int = 0) -> Decoder:
    """NumPy's numbers: compiling the real initialisation takes seconds, and would leave every norm scale at one."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        if leaf.dtype != jnp.float32:
            return jnp.zeros(leaf.shape, leaf.dtype)
        if any(word in jax.tree_util.keystr(path) for word in ("scale", "ratio")):
            return jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), jnp.float32)
        size = 4 if "bias" in jax.tree_util.keystr(path) else leaf.shape[-2]
        return jnp.asarray(rng.normal(size=leaf.shape) * size**-0.5, jnp.float32)

    graph, shapes = nnx.split(abstract_decoder(model_config))
    return nnx.merge(graph, jax.tree_util.tree_map_with_path(draw, shapes))


def tokens(batch: int = 2, length: int = 11, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 29, (batch, length)).astype(np.int32)


def rows(tokens: np.ndarray) -> dict[str, np.ndarray]:
    """A training batch of (batch, length + 1) tokens, one segment a row."""
    ones = np.ones_like(tokens[:, 1:])
    positions = np.tile(np.arange(ones.shape[1], dtype=np.int32), (len(tokens), 1))
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segments": ones,
        "positions": positions,
        "mask": ones.astype(bool),
    }


SEGMENTS = np.array([[1, 1, 1, 1, 2, 2, 2, 2, 2, 0, 0], [1, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3]], np.int32)
POSITIONS = np.array([[0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 1], [0, 0, 1, 2, 3, 4, 5, 0, 1, 2, 3]], np.int32)
