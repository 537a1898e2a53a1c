"""Eight forks of one tiny recipe, a component each: trained, decoded, loaded and counted as they are."""

import difflib
import functools
import json
import re
import shutil
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro
from flax import nnx

import efftrain
from efftrain.config import from_json, to_json
from efftrain.measure.cost.flops import decode_flops, mean_visible_keys, training_flops
from efftrain.models.decoder import Decoder, abstract_decoder
from efftrain.models.decoding.generate import generate, prefill
from efftrain.models.decoding.self_speculation import SelfSpeculation
from efftrain.models.depth.routed_depth import causally_routed
from efftrain.models.moe import MoE
from efftrain.recipe import import_script
from efftrain.train.metrics.metrics_log import read_metrics

HERE, MOST_LINES = Path(__file__).parent, 25
FORKS = (
    "learned_positions",
    "norm_and_scaling",
    "alibi",
    "latent_attention",
    "parallel_block",
    "hash_router",
    "lion_and_triangle",
    "csv_sink",
)
D, FF, HEADS, HEAD, KV, VOCABULARY, LENGTH, LAYERS = 16, 32, 4, 8, 2, 32, 16, 2
KEYS = mean_visible_keys(LENGTH, None)


def layer_flops(*, share=1.0, keys=KEYS, attention=2 * D * HEAD * (2 * HEADS + 2 * KV), mlp=6 * D * FF) -> float:
    """Of a token, forward: products with matrices, scores and weighted values."""
    return share * (attention + mlp + 4 * HEADS * HEAD * keys)


ROUTER = 2 * (D + D * D // 4 + D // 4)  # of mixture of depths: a score, and a predictor of two matrices
HALF = layer_flops(share=0.5, keys=mean_visible_keys(LENGTH // 2, None)) + ROUTER
FLOPS = dict.fromkeys(FORKS, LAYERS * layer_flops()) | {
    "latent_attention": LAYERS * layer_flops(attention=2 * D * HEAD * (2 * HEADS + 1)),
    "parallel_block": layer_flops() + HALF,
    "hash_router": LAYERS * layer_flops(),  # one expert of the dense width, and no router's matrix
}


@dataclass(frozen=True)
class Trained:
    script: types.ModuleType
    run: Path
    model: Decoder


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Callable[[str], Trained]:
    @functools.cache
    def train(name: str) -> Trained:
        script, run = import_script(HERE / f"{name}.py"), tmp_path_factory.mktemp("runs") / name
        return Trained(script, run, script.main(run).model)

    return train


@pytest.fixture(scope="module", params=FORKS)
def fork(request, trained) -> Trained:
    return trained(request.param)


def logits(model: nnx.Module, tokens: np.ndarray) -> np.ndarray:
    graph, state = nnx.split(model)
    return np.asarray(jax.jit(lambda state: nnx.merge(graph, state)(tokens))(state))


def changed_lines(before: str, after: str) -> int:
    """A replaced line counts once, blank lines do not count."""
    a, b = ([line for line in text.splitlines() if line.strip()] for text in (before, after))
    blocks = difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes()
    return sum(max(i2 - i1, j2 - j1) for kind, i1, i2, j1, j2 in blocks if kind != "equal")


@pytest.mark.parametrize("name", FORKS)
def test_a_fork_is_a_few_public_lines(name):
    text = (HERE / f"{name}.py").read_text()
    assert 0 < changed_lines((HERE / "base.py").read_text(), text) <= MOST_LINES
    assert not re.search(r"\b_[a-z]|\._(?!_)", text)


def test_a_model_without_forks_is_written_as_before_there_were_seams():
    """Or what was made from older models, by the digest of their configuration, would not be theirs any more."""
    base = import_script(HERE / "base.py")
    block = to_json(replace(base.block, mlp=MoE(d_expert=8)))
    assert block.keys() == {"type", "attention", "mlp", "depth"}
    assert not {"position", "score_mod"} & block["attention"].keys()
    assert "router" not in block["mlp"]
    assert from_json(to_json(base.config.model)) == base.config.model


def test_it_trains(fork):
    losses = [row["loss"] for row in read_metrics(fork.run)]
    assert len(losses) == fork.script.config.training.steps
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0] - 0.01  # the rows are always the same


def test_decoding_with_the_cache_is_decoding_without(fork):
    """Two rows of different lengths, then token by token."""
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, (2, 12)).astype(np.int32)
    lengths, n_new = np.array([5, 3]), 5
    model = causally_routed(fork.model)
    whole = logits(model, tokens)
    graph, state = nnx.split(model)
    read = jax.jit(lambda state: prefill(nnx.merge(graph, state), tokens[:, :5], jnp.asarray(lengths), slots=12))
    step = jax.jit(lambda state, new_b1, cache: nnx.merge(graph, state).extend(new_b1, cache))
    found, cache = read(state)
    for i in range(n_new):
        np.testing.assert_allclose(found, whole[[0, 1], lengths + i - 1], atol=2e-5)
        hidden, cache = step(state, tokens[[0, 1], lengths + i][:, None], cache)
        found = model.logits(hidden[:, 0])


@pytest.mark.parametrize("name", ["alibi", "latent_attention", "hash_router"])
def test_its_drafts_draw_what_all_layers_would(name, trained):
    model, prompts, lengths = trained(name).model, np.arange(6, dtype=np.int32).reshape(2, 3), np.array([3, 2])
    plain = generate(model, prompts, lengths, n_new=6)
    drafted = generate(model, prompts, lengths, n_new=6, depth=SelfSpeculation(exit_layer=1, n_draft=2))
    np.testing.assert_array_equal(plain, drafted)


def test_its_checkpoint_gives_the_same_model(fork):
    tokens = np.arange(20, dtype=np.int32).reshape(2, 10)
    np.testing.assert_array_equal(logits(efftrain.load(fork.run), tokens), logits(fork.model, tokens))


def test_its_flops_are_counted(fork):
    config = fork.script.config.model
    expected = 3 * (FLOPS[fork.run.name] + 2 * D * VOCABULARY)
    assert training_flops(abstract_decoder(config), LENGTH) == pytest.approx(expected)
    assert decode_flops(abstract_decoder(config), LENGTH) > FLOPS[fork.run.name]


def test_own_optimizer_and_schedule_need_no_warning():
    """As a recipe reads its command line, and as the step uses them."""
    script = import_script(HERE / "lion_and_triangle.py")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        arguments = ["--training.optimizer.beta", "0.8", "--training.optimizer.peak-lr", "1e-3"]
        config = tyro.cli(script.Config, default=script.config, args=arguments, config=(tyro.conf.AvoidSubcommands,))
    assert config.training.optimizer == script.Lion(beta=0.8, peak_lr=1e-3)
    assert config.training.schedule == script.Triangle()


def test_the_schedule_of_a_fork_is_the_rate_of_its_run(trained):
    rates = [row["lr"] for row in read_metrics(trained("lion_and_triangle").run)]
    np.testing.assert_allclose(rates, [0.005, 0.01, 0.005, 0.0], atol=1e-9)


def test_a_sink_gets_each_row_once_also_after_a_restart(trained):
    """The process lost its last checkpoint after it had written the rows that follow."""
    fork = trained("csv_sink")

    def rows() -> list[tuple]:
        split = [line.split(",") for line in (fork.run / "losses.csv").read_text().splitlines()]
        return [(int(step), kind, float(loss)) for step, kind, loss in split]

    logged = [json.loads(line) for line in (fork.run / "metrics.jsonl").read_text().splitlines()]
    before = [(row["step"], row["split"], row["loss"]) for row in logged]
    assert rows() == before
    assert [row[0] for row in before] == [1, 2, 3, 4]
    shutil.rmtree(fork.run / "checkpoints" / "4")
    fork.script.main(fork.run)
    assert rows() == before
