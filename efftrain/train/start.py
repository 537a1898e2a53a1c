"""What a run starts from instead of random parameters: checked before anything is written, then put into its state."""

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
from efftrain.models.decoder import abstract_decoder
from efftrain.models.zeros import zeros_share
from efftrain.progress import console
from efftrain.sharding.rules import ShardingRules, without_mesh
from efftrain.train.batches import Batches
from efftrain.train.branch import branch_from, continue_data, show_learning_rates
from efftrain.train.checkpoints.checkpoints import Checkpoints
from efftrain.train.config import Training, parse_branch
from efftrain.train.program import Program
from efftrain.train.run.directory import load_model_config
from efftrain.train.run.tokenizers import check_tokenizer
from efftrain.train.state import TrainState, split_model


def check_start(config: Training, model: ModelConfig, corpus: Path) -> None:
    """Checks the run that ``training.branch`` or ``training.finetune`` names; to be called for a run without steps.

    Args:
      config: of the new run.
      model: of the new run.
      corpus: that it is trained on.

    Raises:
      RunError: there is no such run, or ``training.finetune`` names one of another model.
      ConfigError: its tokenizer is not that of the corpus.
    """
    if config.branch is not None:
        run = parse_branch(config.branch, config.steps)[0]
        if not (run / "config.json").exists():
            raise RunError(f"training.branch: {run} holds no run; train it first, or give another one")
        check_tokenizer(run, corpus)
    if (run := config.finetune) is not None:
        if not (run / "config.json").exists():
            raise RunError(f"training.finetune: {run} holds no run; train it first, or give another one")
        check_tokenizer(run, corpus)
        _check_same_variables(run, model)


def start_from(model: nnx.Module, state: TrainState) -> TrainState:
    """A new state with the variables of a model."""
    _, params, model_state = split_model(model)
    if "helpers" in state.params:  # what an objective has trained beside the model starts as built
        params = nnx.merge_state(params, nnx.State({"helpers": state.params["helpers"]}))

    def place(new: nnx.State, old: nnx.State) -> nnx.State:
        shapes = [jax.tree.map(jnp.shape, tree) for tree in (new, old)]
        if shapes[0] != shapes[1]:
            raise RunError("the initial model has other variables than the one to be trained; build both alike")
        # Not the caller's own arrays: the step donates its state.
        return jax.tree.map(lambda a, b: jax.device_put(a, b.sharding, may_alias=False), new, old)

    params = place(params, state.params)
    ema = state.ema and jax.tree.map(jnp.copy, params)
    return replace(state, params=params, model_state=place(model_state, state.model_state), ema=ema)


def with_warning_of_zeros(initial: Callable[[], nnx.Module]) -> Callable[[], nnx.Module]:
    """The same, which says that training without masks fills what pruning has set to zero in the model."""

    def made() -> nnx.Module:
        model = initial()
        if share := zeros_share(model):
            console.print(
                f"warning: {share:.0%} of the weights of the initial model's blocks are zero, and this training fills "
                "them; to keep them zero, give fit(wrap=hold_zeros().around(training)), which "
                "efftrain.compress.pruning.sparsify has",
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
    initial: Callable[[], nnx.Module] | None,
    config: Training,
) -> TrainState:
    """The state of the newest checkpoint, or what a run without one starts from; sets the batches to its position.

    Args:
      initial: makes the model that a new run starts from; None: as built.
    """
    abstract = program.abstract_state(mesh, rules)
    found = checkpoints.restore(abstract)
    if found is None and config.branch is None:
        state = jax.jit(program.init, out_shardings=jax.tree.map(lambda array: array.sharding, abstract))()
        if initial is not None:
            with without_mesh():  # it may lie on one device, as ``load`` gives it
                model = initial()
            state = start_from(model, state)
            show_learning_rates(config, 0)
        return state
    if found is None:
        state, data_state = branch_from(config.branch, config.steps, program, abstract)
        continue_data(batches, data_state, parse_branch(config.branch, config.steps)[0])
        show_learning_rates(config, int(state.step - state.skipped))
        return state
    step, state, data_state = found
    console.print(f"continuing from step {step}")
    batches.set_state(data_state)
    return state


def _check_same_variables(run: Path, model: ModelConfig) -> None:
    theirs = load_model_config(run)
    if _shapes(theirs) != _shapes(model):
        changed = difference(to_json(theirs), to_json(model), "model")
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise RunError(
            f"training.finetune: the model of {run} has other parameters ({changed[0]}{more}); give this run the same "
            "model"
        )


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    state = nnx.state(abstract_decoder(config))
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): jnp.shape(leaf) for path, leaf in leaves}
