"""One-shot pruning of a trained model, layer by layer: by magnitude, by Wanda or by SparseGPT."""

import re
from dataclasses import replace
from typing import Literal, get_args

import jax.numpy as jnp
from flax import nnx
from jax import Array

from efftrain.compress.layerwise.calibration import (
    CalibrationRows,
    hessians,
    idle_experts,
    input_samples,
    matrix_errors,
    unreached,
)
from efftrain.compress.layerwise.layerwise_model import LayerwiseModel, assemble
from efftrain.compress.layerwise.second_order import damped, sparse_gpt
from efftrain.compress.quantization.convert import ConversionReport, Converted, quantized_bytes
from efftrain.errors import ConfigError
from efftrain.models.config import ModelConfig
from efftrain.models.decoder import Decoder, abstract_decoder
from efftrain.models.moe.layer import RoutedExperts
from efftrain.models.quantization import Packed, Quantization, give_rules, matrices, rule_of, store
from efftrain.ops.masks import Blocks, Structure, Unstructured, count_zeros, keep_highest, kept_units
from efftrain.ops.number_formats import format_name
from efftrain.ops.quantize import quantize, step_of, stored_scale
from efftrain.train.checkpoints.sparse_storage import sparse_bytes

PruneMethod = Literal["magnitude", "wanda", "sparsegpt"]


def prune(
    layerwise: LayerwiseModel,
    structure: Structure,
    *,
    method: PruneMethod = "sparsegpt",
    calibration: CalibrationRows | None = None,
    quantization: Quantization | None = None,
    layers: str = "blocks/.*",
) -> tuple[Decoder, ConversionReport]:
    """Prunes a trained model layer by layer; each layer reads the outputs of the layers that were pruned before it.

    Matrices that are not a dense product of a plain block, such as those of experts, are pruned by magnitude.
    Embedding, head, norms and routers are not pruned.

    Args:
      layerwise: a float model, taken apart; its list of layers is empty afterwards.
      structure: the pattern of zeros and the sparsity.
      method: "magnitude" removes the smallest weights of each matrix. "wanda" removes, for each output, the weights
        with the smallest magnitude times norm of their input (Sun et al. 2024, equation 1). "sparsegpt": see
        ``second_order.sparse_gpt``.
      calibration: the text that "wanda" and "sparsegpt" need.
      quantization: quantises the remaining weights in the same pass; only with "sparsegpt". None: they stay float.
      layers: a regular expression for the names of matrices, such as ``blocks/.*/mlp/.*``.

    Returns:
      The pruned model, whose configuration differs at most in the quantisation, and a report for each matrix.

    Raises:
      ConfigError: the model is stored quantised, the structure does not divide a matrix, or calibration text is
        missing.
    """
    if method not in get_args(PruneMethod):
        raise ConfigError(f"the method is {method!r}; use one of {', '.join(get_args(PruneMethod))}")
    if layerwise.config.quantization.stored:
        raise ConfigError("the model is quantised already; prune the one it was made from")
    if method != "magnitude" and calibration is None:
        raise ConfigError(f"the method {method!r} needs calibration text; give a corpus")
    if quantization is not None and method != "sparsegpt":
        raise ConfigError("only sparsegpt prunes and quantises in one pass; use it, or do one after the other")
    if method == "sparsegpt" and isinstance(structure, Blocks):
        raise ConfigError("sparsegpt does not prune blocks; use magnitude or wanda")
    config = layerwise.config
    _check(config, structure, layers)
    if quantization is not None:
        config = config.replace(quantization=replace(quantization, stored=True))
        _check_rules(config)

    rows, states, all_idle = [], [], {}
    n_positions = len(config.pattern)
    text = None if method == "magnitude" else calibration
    for number, layer, inputs in layerwise.iterate_layers("prune", text):
        place = f"blocks/{number % n_positions}/"
        if quantization is not None:
            give_rules(layer, quantization, place)
        found = {} if inputs is None else hessians(layer, *inputs)
        samples = {} if inputs is None else input_samples(layer, *inputs)
        idle = () if inputs is None else idle_experts(layer, *inputs)
        if idle:
            all_idle[f"blocks/{number}/mlp"] = idle
        for name, module, attribute in list(matrices(layer)):
            hessian = found.pop(name, None)
            how = method if hessian is not None else "magnitude"
            chosen = bool(re.fullmatch(layers, place + name))
            rule = rule_of(getattr(module, attribute)) if quantization is not None else None
            format = rule.weights if rule is not None else None
            seen = hessian, samples.pop(name, None)
            row = _prune(f"blocks/{number}/{name}", module, attribute, structure, format, how, method, seen, chosen)
            experts = isinstance(module, RoutedExperts) and row.method != "none"
            rows.append(replace(row, why=row.why + unreached(idle)) if experts else row)
            del hessian, seen
        states.append(nnx.state(layer))
    return assemble(config, layerwise.outer, states), ConversionReport(
        tuple(rows), None if text is None else text.size, all_idle
    )


def mask_by_magnitude(w: Array, structure: Structure) -> Array:
    """The mask, bool (..., d, f), that keeps the weights of largest magnitude in every matrix of w (..., d, f)."""
    w_ldf = jnp.abs(w).reshape(-1, *w.shape[-2:])
    scores_lgu = structure.group(w_ldf)
    keep_lgu = keep_highest(scores_lgu, kept_units(structure, scores_lgu.shape[-1]))
    n_matrices, d, f = w_ldf.shape
    return structure.ungroup(keep_lgu, (n_matrices, d, f)).reshape(w.shape)


def mask_by_inputs(w_df: Array, hessian_dd: Array, structure: Structure) -> Array:
    """The mask, bool (d, f), that keeps for every output the weights of largest magnitude times input norm (Wanda)."""
    scores_df = jnp.abs(w_df) * jnp.sqrt(jnp.diag(hessian_dd))[:, None]
    if isinstance(structure, Unstructured):
        return keep_highest(scores_df.T, kept_units(structure, len(w_df))).T
    return mask_by_magnitude(scores_df, structure)


def _check(config: ModelConfig, structure: Structure, layers: str) -> None:
    found = {name: (m, a) for name, m, a in matrices(abstract_decoder(config)) if name.startswith("blocks/")}
    chosen = {name: getattr(*where) for name, where in found.items() if re.fullmatch(layers, name)}
    if not chosen:
        raise ConfigError(f"--layers is {layers!r}, which matches no matrix; they are {', '.join(sorted(found)[:8])}")
    for name, variable in chosen.items():
        structure.check(name, *variable.shape[-2:])


def _check_rules(config: ModelConfig) -> None:
    for rule in config.quantization.rules:
        if rule.learned_step:
            raise ConfigError(
                "the step sizes of the run were learned for dense weights; prune the float run that it began from"
            )
    for name, module, attribute in matrices(abstract_decoder(config)):
        if not name.startswith("blocks/") and isinstance(getattr(module, attribute), Packed):
            raise ConfigError(
                f"with --sparsity only blocks are quantised, but --layers matches {name}; use --layers 'blocks/.*'"
            )


def _prune(
    name, module, attribute, structure, format, how: str, asked: str, seen: tuple[Array | None, Array | None], chosen
) -> Converted:
    hessian, sample = seen
    variable = getattr(module, attribute)
    before, damping = variable[...], None
    if not chosen:
        after, how, why = before, "none", "--layers does not match it"
    elif how == "sparsegpt":
        assert hessian is not None  # its inputs were seen
        after, damping = sparse_gpt(before, hessian, structure, format)
        why = damped(damping)
    else:
        if how == "wanda":
            assert hessian is not None  # its inputs were seen
            mask = mask_by_inputs(before, hessian, structure)
        else:
            mask = mask_by_magnitude(before, structure)
        after, why = (
            jnp.where(mask, before, 0),
            "" if how == asked else f"{asked} applies only to dense products of plain blocks",
        )
    n_bytes = variable.size * variable.dtype.itemsize
    if format is None:
        variable[...] = after
        bytes_after = min(sparse_bytes(after), n_bytes)
    else:
        value = quantize(after, format, scale=stored_scale(step_of(before, format), format))
        after = value.dequantize()
        store(module, attribute, value)
        bytes_after = quantized_bytes(value)
    errors = matrix_errors(after, before, hessian, sample)
    return Converted(
        name,
        str(before.dtype) if format is None else format_name(format),
        how,
        why,
        n_bytes,
        bytes_after,
        errors.weights,
        errors.outputs,
        errors.tokens,
        count_zeros(after) / after.size,
        damping,
    )
