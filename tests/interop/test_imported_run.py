"""An imported run is a run: every command that takes one starts from it, and asks for what an import cannot know."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from texts import build_corpus

import efftrain
from efftrain import data
from efftrain.cli.main import main
from efftrain.config import to_json
from efftrain.errors import ConfigError, RunError
from efftrain.interop.export_model import export_model
from efftrain.interop.import_model import import_model
from efftrain.measure.scorecard import score
from efftrain.models.config import LayerDropout, llama
from efftrain.models.decoder import Decoder
from efftrain.models.decoding.generate import generate
from efftrain.models.depth.convert import every_second, with_mixture_of_depths
from efftrain.models.depth.routed_depth import MixtureOfDepths, Recursion
from efftrain.recipe import import_script, recipe_cli
from efftrain.train.config import Training
from efftrain.train.metrics.metrics_log import read_metrics
from efftrain.train.run.directory import load_model_config
from efftrain.train.run.model_run import write_model_run
from efftrain.train.start import check_start
from efftrain.train.state import split_model

ROOT = Path(__file__).parents[2]
LENGTH, ROWS = 16, 8
# No field that flags of a recipe would have had by chance: a model is taken over whole, or its loss is another.
MODEL = llama(vocab_size=300, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=64, max_length=512, norm_eps=0.1)
MODEL = MODEL.with_blocks(attention=replace(MODEL.pattern[0].attention, rope_theta=50.0))
TRAINING = f"--training.steps 2 --training.batch-size {ROWS} --training.n-microbatches 1".split()
KNOWN = ["--training.length", str(LENGTH), "--training.optimizer.peak-lr", "1e-4"]


@pytest.fixture(scope="module", autouse=True)
def _no_latencies():
    """Nothing here looks at the times, and compiling the decoding of every model would take most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(score, "LATENCY_BATCHES", ())
        yield


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return build_corpus(tmp_path_factory.mktemp("texts") / "small")


@pytest.fixture(scope="module")
def imported(corpus, tmp_path_factory) -> Path:
    """A run as ``efftrain import`` leaves it; its folder in the format of Hugging Face is beside it."""
    place = tmp_path_factory.mktemp("imported")
    _, params, rest = split_model(Decoder(MODEL, rngs=nnx.Rngs(0)))
    state, made_from = {"params": params, "model_state": rest}, ("made.json", {})
    write_model_run(
        place / "source",
        state,
        step=0,
        made_from=made_from,
        config={"model": to_json(MODEL)},
        copies=[corpus / "tokenizer.json"],
    )
    export_model(place / "source", place / "folder")
    import_model(place / "folder", place / "run")
    return place / "run"


@pytest.fixture
def run(imported, tmp_path) -> Path:
    """A copy, beside which and into which a command may write."""
    return Path(shutil.copytree(imported, tmp_path / "imported"))


@pytest.fixture(scope="module")
def first_loss(imported, corpus) -> float:
    """Loss of the imported model on the first batch that a training reads, from its logits."""
    loader = data.LoaderConfig(corpora=(data.Part(path=corpus),), length=LENGTH, batch_size=ROWS)
    batch = next(data.batches(loader))
    logits = efftrain.load(imported)(
        batch["tokens"], segments_bt=batch["segments"], positions_bt=batch["positions"]
    ).astype("float64")
    chosen = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), batch["targets"][..., None], -1)[..., 0]
    return -float(chosen[batch["mask"].astype(bool)].mean())


def recipe(patch: pytest.MonkeyPatch, name: str, *arguments: str | Path) -> None:
    """What ``python recipes/NAME.py ARGUMENTS`` does."""
    script = import_script(ROOT / "recipes" / f"{name}.py")
    patch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
    script.main(recipe_cli(script.configs))


STARTS = {
    "dense": ("dense", "cpu", "--training.finetune"),
    "mixture of experts": ("moe", "cpu", "--upcycle"),
    "early exits": (
        *("adaptive_depth", "layerskip", "--exits.after", "1", "--model.layer-dropout.after", "1"),
        "--training.finetune",
    ),
    "mixture of depths": (
        *("adaptive_depth", "mixture-of-depths", "--model.pattern.1.depth.capacity", "1"),
        "--convert",
    ),
}

EXPORTED = ("dense", "early exits")  # early exits are exported as the plain model that they belong to


@pytest.mark.parametrize("start", list(STARTS))
def test_a_recipe_starts_from_the_imported_model(start, run, corpus, first_loss, tmp_path, monkeypatch):
    """The first loss is that of the imported model, and the same command continues when that model is gone."""
    name, *flags = STARTS[start]
    command = (name, *flags, run, "--corpus", corpus, "--out", tmp_path / "new", *TRAINING)
    with pytest.raises(SystemExit):
        recipe(monkeypatch, *command)
    assert not (tmp_path / "new").exists()
    recipe(monkeypatch, *command, *KNOWN)
    rows = read_metrics(tmp_path / "new")
    assert rows[0]["loss"] == pytest.approx(first_loss, rel=1e-5)
    assert rows[1]["loss"] != pytest.approx(first_loss, rel=1e-5)
    assert (tmp_path / "new" / "tokenizer.json").read_bytes() == (corpus / "tokenizer.json").read_bytes()
    if start in EXPORTED:
        export_model(tmp_path / "new", tmp_path / "exported")
        import_model(tmp_path / "exported", tmp_path / "again")
        tokens = np.arange(12)[None]
        again, trained = (efftrain.load(tmp_path / place)(tokens) for place in ("again", "new"))
        np.testing.assert_allclose(again, trained, rtol=1e-5, atol=1e-6)
    shutil.rmtree(run)
    recipe(monkeypatch, *command, *KNOWN)
    assert read_metrics(tmp_path / "new") == rows


def test_quantisation_aware_training_of_an_imported_model(run, corpus, first_loss, tmp_path, monkeypatch):
    """Two runs from one command: fine-tuning in float, and 4 bits from one of its checkpoints on."""
    every = ("--training.checkpoint-every", "1", "--training.keep-every", "1", "--share", "0.5")
    common = ("--corpus", corpus, "--training.finetune", run, *TRAINING, *KNOWN)
    recipe(monkeypatch, "qat", "cpu", *common, "--out", tmp_path / "qat" / "int4", *every)
    assert read_metrics(tmp_path / "qat" / "float-seed0")[0]["loss"] == pytest.approx(first_loss, rel=1e-5)
    (row,) = read_metrics(tmp_path / "qat" / "int4")
    assert row["step"] == 2
    assert load_model_config(tmp_path / "qat" / "int4").quantization.rules[0].learned_step


def test_an_imported_model_teaches(run, corpus, tmp_path, monkeypatch, capsys):
    """A cache of its predictions, and a student of half of its layers."""
    command = ["teacher", str(run), "--corpus", str(corpus), "--rows", "64", "--top-k", "4"]
    with pytest.raises(SystemExit):
        main(command)
    assert "give --length" in " ".join(capsys.readouterr().err.split())
    main([*command, "--length", str(LENGTH), "--out", str(tmp_path / "cache")])
    common = ("--corpus", corpus, "--teacher", run, *TRAINING, "--training.length", LENGTH)
    student = ("--model-of", run, "--model.n-repeats", "1", "--initial", "layers", "--cache", tmp_path / "cache")
    recipe(monkeypatch, "distill", "cpu", *common, *student, "--rows", "64", "--out", tmp_path / "student")
    assert load_model_config(tmp_path / "student") == MODEL.replace(n_repeats=1)


COMPRESSIONS = {
    "quantize": ["--weights", "int8"],
    "prune": ["--sparsity", "0.5", "--method", "wanda", "--rows", "8"],
    "structured": ["--ratio", "0.2", "--axis", "width", "--rows", "8"],
}


@pytest.mark.parametrize("command", list(COMPRESSIONS))
def test_an_imported_model_is_compressed(command, run, corpus, tmp_path, capsys):
    words = ["compress", command, str(run), "--corpus", str(corpus), *COMPRESSIONS[command]]
    with pytest.raises(SystemExit):
        main(words)
    assert "give --length" in " ".join(capsys.readouterr().err.split())
    main([*words, "--length", str(LENGTH)])
    (out,) = tmp_path.glob(f"imported-*-length{LENGTH}")
    assert json.loads((out / "scorecard.json").read_text())["figures"]["bpb"]["value"] > 0
    assert generate(efftrain.load(out), [[5, 9, 2]], n_new=2).shape == (1, 2)
    with pytest.raises(SystemExit):
        main([*words, "--length", "8", "--out", str(out)])
    assert "length" in capsys.readouterr().err
    main(["teacher", str(out), "--corpus", str(corpus), "--rows", "2", "--top-k", "4"])  # knows the length now


def test_recovery_training_asks_for_what_it_cannot_know(run, corpus, tmp_path, capsys):
    words = ["compress", "structured", str(run), "--corpus", str(corpus), *COMPRESSIONS["structured"]]
    words += ["--length", str(LENGTH), "--recovery-tokens", str(2 * ROWS * LENGTH), "--out", str(tmp_path / "new")]
    for given in ([], ["--learning-rate", "2e-4"]):
        with pytest.raises(SystemExit):
            main([*words, *given])
        assert "--batch-size 16" in " ".join(capsys.readouterr().err.split())
    main([*words, "--learning-rate", "2e-4", "--batch-size", str(ROWS)])
    training = json.loads((tmp_path / "new" / "config.json").read_text())["training"]
    assert (training["optimizer"]["peak_lr"], training["batch_size"], training["length"]) == (2e-4, ROWS, LENGTH)
    assert [row["step"] for row in read_metrics(tmp_path / "new")] == [1, 2]


def test_the_depth_of_an_imported_model_is_calibrated(run, corpus, capsys):
    words = ["calibrate-depth", str(run), "--corpus", str(corpus), "--rows", "60", "--prompts", "1", "--n-new", "2"]
    words += ["--risk", "0.9", "--error", "0.5", "--drafts", "2", "--exits", "1"]
    with pytest.raises(SystemExit):
        main(words)
    assert "give --length" in " ".join(capsys.readouterr().err.split())
    main([*words, "--length", str(LENGTH)])
    assert json.loads((run / "depth.json").read_text())["options"]["length"] == LENGTH


def test_the_training_step_of_an_imported_model_is_compiled_ahead_of_time(run, capsys):
    main(["aot", str(ROOT / "recipes" / "dense.py"), "cpu", "--topology", "cpu:2", "--model-of", str(run), "--json"])
    report = json.loads(capsys.readouterr().out)
    n_bytes = 4 * sum(leaf.size for leaf in jax.tree.leaves(nnx.state(Decoder(MODEL, rngs=nnx.Rngs(0)))))
    assert n_bytes / 2 <= report["memory"]["parameters"] < n_bytes / 2 * 1.2  # small vectors are on both devices


def test_a_run_without_an_optimizer_cannot_be_resumed(run, corpus, tmp_path, monkeypatch):
    with pytest.raises(RunError, match=r"without the state of an optimizer .* start from this model with training"):
        recipe(
            monkeypatch,
            *("dense", "cpu", "--model-of", run, "--training.resume-from", f"{run}@0", "--corpus", corpus),
            *("--out", tmp_path / "new", *TRAINING, *KNOWN),
        )


@pytest.mark.parametrize("flag", ["--model-of", "--training.finetune", "--upcycle"])
def test_a_run_that_does_not_exist_is_named_with_its_flag(flag, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        recipe(monkeypatch, "moe", "cpu", flag, tmp_path / "nowhere")
    assert f"{flag}: {tmp_path / 'nowhere'} holds no run" in " ".join(capsys.readouterr().err.split())


def test_a_flag_changes_the_model_that_was_taken_over(imported, monkeypatch):
    """How the model is computed is that of the configuration; what it computes, that of the run; flags change both."""
    script = import_script(ROOT / "recipes" / "dense.py")
    monkeypatch.setattr(sys, "argv", ["dense.py", "gpu", f"--model_of={imported}", "--training.length", "64"])
    taken = recipe_cli(script.configs)
    assert taken.model == MODEL.replace(dtype="bfloat16")
    assert taken.training == replace(script.configs["gpu"].training, length=64)
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--model.dtype", "float32", "--model.max-length", "2048"])
    assert recipe_cli(script.configs).model == MODEL.replace(max_length=2048)


def test_another_function_of_the_same_parameters_is_a_warning(imported, corpus, capsys):
    training = Training(steps=1, batch_size=1, length=8, finetune=imported)
    check_start(training, MODEL.replace(dtype="bfloat16", layer_dropout=LayerDropout(rate=0.1)), corpus)
    assert "warning" not in capsys.readouterr().err
    other = MODEL.with_blocks(attention=replace(MODEL.pattern[0].attention, rope_theta=1e4)).replace(norm_eps=1e-5)
    check_start(training, other, corpus)
    said = " ".join(capsys.readouterr().err.split())
    assert "computes something else" in said
    assert "model.pattern[0].attention.rope_theta: 50.0 -> 10000.0" in said
    assert "model.norm_eps: 0.1 -> 1e-05" in said


def test_every_second_layer_of_any_pattern():
    local = replace(MODEL.pattern[0], attention=replace(MODEL.pattern[0].attention, window=8))
    depth = MixtureOfDepths(capacity=0.5)
    for pattern, n_repeats in (((local,), 4), ((local, MODEL.pattern[0]), 2), ((local, local, MODEL.pattern[0]), 2)):
        plain = MODEL.replace(pattern=pattern, n_repeats=n_repeats)
        found = every_second(plain, depth).layers
        assert [block.depth == depth for block in found] == [i % 2 == 1 for i in range(plain.n_layers)]
        assert tuple(replace(block, depth=plain.layers[0].depth) for block in found) == plain.layers
    with pytest.raises(ConfigError, match="the model has 3 layers"):
        every_second(MODEL.replace(n_repeats=3), depth)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (every_second(MODEL, Recursion(n_layers=1)), "layer 1: Recursion cannot take over the layers"),
        (every_second(MODEL, MixtureOfDepths()).replace(norm_eps=1e-5), r"model\.norm_eps: 0\.1 -> 1e-05"),
        (every_second(MODEL.replace(n_repeats=4), MixtureOfDepths()), r"model\.pattern"),
    ],
)
def test_what_cannot_be_converted_is_refused(config, message, imported):
    with pytest.raises(ConfigError, match=message):
        with_mixture_of_depths(efftrain.load(imported), config, rngs=nnx.Rngs(0))
