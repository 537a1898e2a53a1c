"""Linear probes: logistic regression on the features of a frozen model, to measure how useful they are for a task."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

from efftrain.errors import ConfigError
from efftrain.measure.quality.task_scores import accuracy
from efftrain.models.decoder import Decoder

L2 = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
_BUCKET = 16  # rows are padded to a multiple of this number of tokens, so that few shapes are compiled


@dataclass(frozen=True)
class Probe:
    """Multinomial logistic regression on standardised features.

    Attributes:
      weights_fl, bias_l: parameters of the labels' logits, (features, labels) and (labels,).
      mean_f, scale_f: mean and standard deviation of the features, (features,).
      l2: strength of the L2 penalty that was chosen.
    """

    weights_fl: np.ndarray
    bias_l: np.ndarray
    mean_f: np.ndarray
    scale_f: np.ndarray
    l2: float

    def __call__(self, features_nf: np.ndarray) -> np.ndarray:
        """Logits (n, labels) for features (n, features)."""
        return (features_nf - self.mean_f) / self.scale_f @ self.weights_fl + self.bias_l


def fit_probe(
    features_nf: np.ndarray,
    labels_n: np.ndarray,
    held_out_nf: np.ndarray,
    held_out_labels_n: np.ndarray,
    *,
    n_labels: int,
    strengths: Sequence[float] = L2,
    steps: int = 100,
) -> Probe:
    """Fits a probe with each strength of the L2 penalty and returns the most accurate one on held-out features.

    Args:
      features_nf, labels_n: features and labels to fit.
      held_out_nf, held_out_labels_n: features and labels by which the strength is chosen.
      n_labels: number of labels of the task.
      strengths: strengths of the L2 penalty to try.
      steps: maximum number of L-BFGS steps.
    """
    mean, scale = features_nf.mean(0), features_nf.std(0) + 1e-6
    best: tuple[float, Probe] | None = None
    for l2 in sorted(strengths, reverse=True):  # of equally accurate ones the strongest is taken
        weights, bias = logistic_regression(
            (features_nf - mean) / scale, labels_n, n_labels=n_labels, l2=l2, steps=steps
        )
        probe = Probe(weights, bias, mean, scale, l2)
        right = accuracy(probe(held_out_nf), held_out_labels_n)
        if best is None or right > best[0]:
            best = right, probe
    if best is None:
        raise ConfigError("a probe has no strengths to choose from; give at least one")
    return best[1]


def logistic_regression(
    features_nf: np.ndarray,
    labels_n: np.ndarray,
    *,
    n_labels: int,
    l2: float,
    steps: int = 300,
    tolerance: float = 1e-5,
) -> tuple[np.ndarray, np.ndarray]:
    """Minimises ``mean cross entropy + l2 / 2 |weights|^2`` by L-BFGS; the bias is not penalised.

    Args:
      features_nf, labels_n: features and labels.
      n_labels: number of labels.
      l2: strength of the penalty.
      steps: maximum number of steps.
      tolerance: norm of the gradient at which the minimisation stops.

    Returns:
      Weights (features, labels) and bias (labels,), float32.
    """
    start = jnp.zeros((features_nf.shape[1], n_labels)), jnp.zeros(n_labels)
    fitted = _minimise(start, jnp.asarray(features_nf, jnp.float32), jnp.asarray(labels_n), l2, tolerance, steps)
    return np.asarray(fitted[0]), np.asarray(fitted[1])


@partial(jax.jit, static_argnums=5)
def _minimise(start, features_nf, labels_n, l2, tolerance, steps):
    def loss(parameters):
        weights, bias = parameters
        losses = optax.softmax_cross_entropy_with_integer_labels(features_nf @ weights + bias, labels_n)
        return losses.mean() + l2 / 2 * (weights**2).sum()

    solver = optax.lbfgs()
    value_and_gradient = optax.value_and_grad_from_state(loss)

    def step(carry):
        parameters, state, number, _ = carry
        value, gradient = value_and_gradient(parameters, state=state)
        updates, state = solver.update(gradient, state, parameters, value=value, grad=gradient, value_fn=loss)
        return optax.apply_updates(parameters, updates), state, number + 1, optax.tree.norm(gradient)

    carry = (start, solver.init(start), 0, jnp.inf)
    return jax.lax.while_loop(lambda c: (c[2] < steps) & (c[3] > tolerance), step, carry)[0]


def frozen_features(model: Decoder, texts: Sequence[np.ndarray], *, batch_size: int = 64) -> np.ndarray:
    """Features of texts from a frozen model: hidden states after the last layer, averaged and at the last token.

    Args:
      model: the model.
      texts: tokens of each text, (length,) int32, at least one.
      batch_size: number of texts that are read together.

    Returns:
      (n, 2 d_model) float32: the mean over a text's tokens, then the state of its last token.
    """
    graph, state = nnx.split(model)
    order = np.argsort([len(text) for text in texts], kind="stable")
    out = np.zeros((len(texts), 2 * model.config.d_model), np.float32)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        length = -(-max(len(texts[i]) for i in chosen) // _BUCKET) * _BUCKET
        tokens, lengths = np.zeros((batch_size, length), np.int32), np.ones(batch_size, np.int32)
        for row, i in enumerate(chosen):
            tokens[row, : len(texts[i])], lengths[row] = texts[i], len(texts[i])
        out[chosen] = np.asarray(_features(graph, state, tokens, lengths))[: len(chosen)]
    return out


@partial(jax.jit, static_argnums=0)
def _features(graph: nnx.GraphDef, state: nnx.State, tokens_bt: Array, lengths_b: Array) -> Array:
    valid_bt = jnp.arange(tokens_bt.shape[1]) < lengths_b[:, None]
    hidden_btd, _ = nnx.merge(graph, state).hidden(tokens_bt, segments_bt=valid_bt.astype(jnp.int32))
    hidden_btd = hidden_btd.astype(jnp.float32)
    mean_bd = (hidden_btd * valid_bt[..., None]).sum(1) / lengths_b[:, None]
    last_bd = jnp.take_along_axis(hidden_btd, (lengths_b - 1)[:, None, None], axis=1)[:, 0]
    return jnp.concatenate([mean_bd, last_bd], axis=-1)
