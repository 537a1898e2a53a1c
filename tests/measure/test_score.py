"""Every figure is there: with a value and its method, or with the reason why not."""

from dataclasses import replace

import jax
import pytest
from flax import nnx

from efftrain.measure.cost.flops import training_flops
from efftrain.measure.scorecard import score as score_module
from efftrain.measure.scorecard.score import path_bytes, score
from efftrain.measure.scorecard.scorecard import Scorecard
from efftrain.models.config import llama
from efftrain.models.decoder import Decoder
from efftrain.models.moe import MoE

TRAINING = {
    "compile_s": 3.0,
    "compile_cached": 0.0,
    "tokens_per_s": 500.0,
    "step_s_p50": 0.1,
    "step_s_p95": 0.2,
    "input_wait_share": 0.01,
    "checkpoint_share": 0.02,
    "evaluation_share": 0.03,
}


@pytest.fixture(scope="module")
def model():
    config = llama(vocab_size=48, d_model=16, n_layers=1, n_heads=2, d_ff=24, max_length=24)
    return Decoder(config, rngs=nnx.Rngs(0))


@pytest.mark.smoke
def test_a_full_scorecard(model, tmp_path):
    (tmp_path / "checkpoint" / "deep").mkdir(parents=True)
    (tmp_path / "checkpoint" / "a").write_bytes(b"x" * 100)
    (tmp_path / "checkpoint" / "deep" / "b").write_bytes(b"x" * 23)
    card = score(
        model,
        name="dense",
        length=24,
        quality={"bpb": 1.5, "loss": 3.0},
        training_tokens=10_000,
        training_figures=TRAINING,
        checkpoint=tmp_path / "checkpoint",
        rounds=2,
    )
    values = {name: figure.value for name, figure in card.figures.items()}
    assert values["bpb"] == 1.5
    assert values["checkpoint_bytes"] == 123
    assert values["train_flops"] == 10_000 * training_flops(model, 24)
    assert values["train_tokens_per_s"] == 500.0
    assert (values["checkpoint_share"], values["evaluation_share"]) == (0.02, 0.03)
    missing = {name for name, figure in card.figures.items() if figure.method == "unavailable"}
    energy = {"train_energy", "decode_energy_per_token", "train_cost", "decode_cost_per_token"}
    assert missing == energy | {"mfu"}
    assert "peak FLOP/s of this cpu is not known" in card.figures["mfu"].note
    counted = {name for name, figure in card.figures.items() if figure.method == "counted"}
    assert counted == {
        "parameters_total",
        "parameters_active",
        "parameters_embedding",
        "parameter_bytes",
        "cache_bytes_per_token",
        "train_flops_per_token",
        "decode_flops_per_token",
        "train_flops",
        "train_tokens",
    }
    for name in ("prefill_s_b1", "prefill_s_b8", "decode_s_per_token_b1", "decode_s_per_token_b8", "peak_memory_bytes"):
        assert values[name] > 0
    assert card.environment["devices"]
    card.write(tmp_path / "scorecard.json")
    assert Scorecard.read(tmp_path / "scorecard.json") == card


def test_quality_that_depends_on_the_batch_says_so(model, monkeypatch):
    """Of experts with a fixed capacity; a dropless dispatch has no such note."""
    monkeypatch.setattr(score_module, "LATENCY_BATCHES", ())
    for mlp, noted in ((MoE(d_expert=8, dispatch="capacity"), True), (MoE(d_expert=8), False)):
        block = replace(model.config.pattern[0], mlp=mlp)
        routed = Decoder(model.config.replace(pattern=(block,)), rngs=nnx.Rngs(0))
        figures = score(routed, name="routed", length=24, quality={"bpb": 1.5, "loss": 3.0}).figures
        for name in ("bpb", "loss"):
            assert ("depends on the rows that are evaluated together" in figures[name].note) == noted


def test_what_was_not_given_says_so(model, monkeypatch):
    monkeypatch.setattr(score_module, "LATENCY_BATCHES", ())
    card = score(model, name="bare", length=24)
    notes = {name: figure.note for name, figure in card.figures.items() if figure.value is None}
    assert notes["bpb"] == notes["loss"] == "no validation rows were given"
    assert notes["checkpoint_bytes"] == "no checkpoint was given"
    assert notes["train_tokens"] == notes["train_flops"] == "the number of training tokens was not given"
    assert notes["step_s_p50"] == notes["mfu"] == notes["compile_s"] == "no figures of a training run were given"
    assert all(notes.values())


@pytest.mark.parametrize(("cached", "note"), [(0.0, "training step"), (1.0, "training step, loaded from the compi")])
def test_a_program_from_the_cache_was_not_compiled(model, monkeypatch, cached, note):
    monkeypatch.setattr(score_module, "LATENCY_BATCHES", ())
    card = score(model, name="dense", length=24, training_figures=TRAINING | {"compile_cached": cached})
    assert card.figures["compile_s"].note.startswith(note)
    assert ("cache" in card.figures["compile_s"].note) == bool(cached)


def test_what_is_not_finite_is_not_measured(model, monkeypatch):
    monkeypatch.setattr(score_module, "LATENCY_BATCHES", ())
    card = score(model, name="diverged", length=24, quality={"bpb": float("nan"), "loss": float("inf")})
    assert (card.figures["bpb"].value, card.figures["bpb"].note) == (None, "the computed value is nan")
    assert card.figures["loss"].note == "the computed value is inf"


def test_peak_memory_is_the_devices_where_it_reports(monkeypatch):
    monkeypatch.setattr(score_module, "device_peak_bytes", lambda: 77)
    assert (score_module._peak_memory().value, score_module._peak_memory().method) == (77, "measured")
    monkeypatch.setattr(score_module, "device_peak_bytes", lambda: None)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert score_module._peak_memory().method == "unavailable"  # the host's memory would be a lie


def test_bytes_of_a_single_file(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"x" * 9)
    assert path_bytes(tmp_path / "model.safetensors") == 9
