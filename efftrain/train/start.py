"""Starts a run from another run or a given model instead of random parameters, or restores its newest checkpoint."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from efftrain.config import difference, to_json
from efftrain.errors import RunError
from efftrain.models.config import ModelConfig
from efftrain.models.decoder import Decoder, abstract_decoder
from efftrain.models.quantization import RATIO
from efftrain.models.zeros import zeros_share
from efftrain.progress import console
from efftrain.sharding.layout import copy_to
from efftrain.sharding.rules import ShardingRules, without_mesh
from efftrain.train.batches import Batches
from efftrain.train.checkpoints.checkpoints import Checkpoints
from efftrain.train.checkpoints.flat_state import flatten, unflatten
from efftrain.train.config import Training, parse_resume_from
from efftrain.train.program import Program
from efftrain.train.resume_from import continue_data, resumed_state, show_learning_rates
from efftrain.train.run.directory import load_model_config
from efftrain.train.run.tokenizers import check_tokenizer
from efftrain.train.state import TrainState, split_model

STEPS = "steps"  # the variable of a decoder with layer dropout
# Fields of a model's configuration that say how it is trained and carried out, not what it computes.
HOW = {"dtype", "scan", "remat", "layer_dropout", "quantization", "max_length", "n_blocks", "backend", "dispatch"}
HOW |= {"capacity_factor", "exchange_factor", "bias_rate", "auxiliary_loss", "z_loss", "saliency"}
HOW |= {"causal_loss", "room"}


def check_start(config: Training, model: ModelConfig, corpus: Path | None) -> None:
    """Checks the run that ``training.resume_from`` or ``training.finetune`` names, before a new run writes anything.

    Args:
      config: configuration of the new run, which has no steps yet.
      model: model configuration of the new run.
      corpus: folder of the corpus on which the new run trains. None: it encodes its text with that run's tokenizer.

    Raises:
      RunError: there is no such run, or ``training.finetune`` names a run with another model.
      ConfigError: the tokenizer of that run is not that of the corpus.
    """
    if config.resume_from is not None:
        run = parse_resume_from(config.resume_from, config.steps)[0]
        if not (run / "config.json").exists():
            raise RunError(f"training.resume_from: {run} holds no run; train it first, or give another one")
        if corpus is not None:
            check_tokenizer(run, corpus)
    if (run := config.finetune) is not None:
        if not (run / "config.json").exists():
            raise RunError(f"training.finetune: {run} holds no run; train it first, or give another one")
        if corpus is not None:
            check_tokenizer(run, corpus)
        _check_same_variables(run, model)


def start_from(model: Decoder, state: TrainState) -> TrainState:
    """Returns a new state with the variables of a model.

    Args:
      model: the model to start from.
      state: a new state, whose shardings are kept.

    Raises:
      RunError: the model has other variables than the state, beside those that may start as built (``_is_new``).
    """
    _, params, model_state = split_model(model)
    if "helpers" in state.params:  # variables that an objective trains beside the model: they start as built
        params = nnx.merge_state(params, nnx.State({"helpers": state.params["helpers"]}))

    def place(new: nnx.State, old: nnx.State) -> nnx.State:
        theirs, ours = flatten(new), flatten(old)
        if not _fits({n: jnp.shape(a) for n, a in theirs.items()}, {n: jnp.shape(a) for n, a in ours.items()}):
            raise RunError(
                "the initial model has other variables than the model to train; build both from the same configuration"
            )
        # A copy, because the step donates its state and the caller keeps the model.
        return unflatten({n: copy_to(theirs[n], a.sharding) if n in theirs else a for n, a in ours.items()}, old)

    params = place(params, state.params)
    ema = state.ema and jax.tree.map(jnp.copy, params)
    return replace(state, params=params, model_state=place(model_state, state.model_state), ema=ema)


def with_warning_of_zeros(initial: Callable[[], Decoder]) -> Callable[[], Decoder]:
    """Wraps ``initial`` with a warning if pruning set weights of its model to zero, which training would refill."""

    def made() -> Decoder:
        model = initial()
        if share := zeros_share(model):
            console.print(
                f"warning: {share:.0%} of the weights of the initial model's blocks are zero, and this training fills "
                "them; to keep them zero, give fit(wrap=hold_zeros().around(training)), with "
                "hold_zeros of efftrain.compress.pruning.sparsify",
                style="yellow",
                markup=False,
            )
        return model

    return made


def restore_or_start(
    program: Program,
    checkpoints: Checkpoints,
    batches: Batches,
    mesh: Mesh,
    rules: ShardingRules,
    initial: Callable[[], Decoder] | None,
    config: Training,
) -> TrainState:
    """Returns the state of the newest checkpoint, or the first state of a new run; sets the position of the batches.

    Args:
      program: functions of the run.
      checkpoints: checkpoints of the run.
      batches: set to the position of the restored state.
      mesh: the mesh of the state.
      rules: which mesh axis splits which logical axis.
      initial: function that returns the model from which a new run starts. None: start from the built parameters.
      config: configuration of the run.
    """
    abstract = program.abstract_state(mesh, rules)
    found = checkpoints.restore(abstract)
    if found is not None:
        step, state, data_state = found
        console.print(f"continuing from step {step}")
        batches.set_state(data_state)
        return state
    if config.resume_from is None:
        state = jax.jit(program.init, out_shardings=jax.tree.map(lambda array: array.sharding, abstract))()
        if initial is not None:
            with without_mesh():  # the model may be on one device, as ``load`` returns it
                model = initial()
            state = start_from(model, state)
            show_learning_rates(config, 0)
        return state
    state, data_state = resumed_state(config.resume_from, config.steps, program, abstract)
    continue_data(batches, data_state, parse_resume_from(config.resume_from, config.steps)[0])
    show_learning_rates(config, int(state.step - state.skipped))
    return state


def _check_same_variables(run: Path, model: ModelConfig) -> None:
    theirs = load_model_config(run)
    changed = difference(to_json(theirs), to_json(model), "model")
    if not _fits(_shapes(theirs), _shapes(model)):
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise RunError(
            f"training.finetune: the model of {run} has other parameters ({changed[0]}{more}); give this run the same "
            "model"
        )
    if other := [line for line in changed if not HOW & set(line.partition(":")[0].split("."))]:
        console.print(
            f"warning: this run computes something else with the parameters of {run}: {'; '.join(other)}",
            style="yellow",
            markup=False,
        )


def _fits(theirs: dict[str, tuple[int, ...]], ours: dict[str, tuple[int, ...]]) -> bool:
    """Whether variables of these shapes can start as those, apart from variables that start as built."""
    kept = {name: shape for name, shape in theirs.items() if name in ours or name != STEPS}
    return kept == {name: shape for name, shape in ours.items() if name in theirs or not _is_new(name)}


def _is_new(name: str) -> bool:
    """Whether a variable that the other model does not have starts as built, without a change of what is computed."""
    return name == STEPS or name.endswith(RATIO)


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    return {name: jnp.shape(leaf) for name, leaf in flatten(nnx.state(abstract_decoder(config))).items()}
