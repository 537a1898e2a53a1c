"""The dense recipe as a user starts it: from the command line, on a small corpus, killed and started again."""

import json
import shlex
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import jax
import pytest
from flax import nnx
from running import run, run_alone, start
from texts import build_corpus

import efftrain
from efftrain import data
from efftrain.errors import ConfigError
from efftrain.experiment.experiment import Experiment, train_and_score
from efftrain.measure.cost.parameters import count_parameters
from efftrain.measure.quality.evaluate import Evaluator
from efftrain.models.config import llama
from efftrain.models.decoder import abstract_decoder
from efftrain.recipe import import_script
from efftrain.sharding.rules import DEFAULT_RULES
from efftrain.train.config import Training
from efftrain.train.metrics.metrics_log import read_metrics
from efftrain.train.objectives.objective import next_token_loss

ROOT = Path(__file__).parents[2]
STEPS = 24
SMALL = f"""
    --model.vocab-size 300 --model.d-model 16 --model.n-repeats 1 --model.max-length 32
    --model.pattern.0.attention.n-heads 2 --model.pattern.0.attention.n-kv-heads 2
    --model.pattern.0.attention.d-head 8 --model.pattern.0.mlp.d-ff 24
    --training.steps {STEPS} --training.batch-size 4 --training.length 16 --training.n-microbatches 2
    --training.eval-every 8 --training.checkpoint-every 4
""".split()


@pytest.fixture(scope="module")
def command(corpus):
    def make(out: Path, *changes: str) -> list[str]:
        script = str(ROOT / "recipes" / "dense.py")
        return [sys.executable, script, "cpu", "--corpus", str(corpus), "--out", str(out), *SMALL, *changes]

    return make


@pytest.fixture(scope="module")
def unbroken(command, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "unbroken"
    code, output = run_alone(command(out))
    assert code == 0, output
    return out


def computed(out: Path, split: str) -> list[dict]:
    """The rows of a run without the times."""
    return [{k: v for k, v in row.items() if not k.endswith("_s") and k != "mfu"} for row in read_metrics(out, split)]


@pytest.mark.smoke
def test_a_run_leaves_metrics_a_scorecard_and_a_model(unbroken, corpus):
    assert [row["step"] for row in computed(unbroken, "train")] == list(range(1, STEPS + 1))
    assert [row["step"] for row in computed(unbroken, "validation")] == [8, 16, 24]
    figures = json.loads((unbroken / "scorecard.json").read_text())["figures"]
    opened = data.open(corpus)
    held_out = data.LoaderConfig(
        corpora=(data.Part(path=corpus),), length=16, batch_size=4, split="validation", shuffle=False, repeat=False
    )
    again = Evaluator(lambda: data.batches(held_out), opened.token_bytes())(efftrain.load(unbroken))
    assert figures["bpb"]["value"] == pytest.approx(again["bpb"], rel=1e-5)
    assert figures["train_tokens"]["value"] == STEPS * 4 * 16
    assert figures["mfu"].items() >= {"value": None, "unit": "share", "method": "unavailable"}.items()


def test_two_processes_that_share_the_parameters_leave_one_scorecard(command, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    whole = command(tmp_path / "run", "--training.steps", "4", "--training.n-microbatches", "1")
    places = [{"EFFTRAIN_COORDINATOR": address, "EFFTRAIN_PROCESSES": "2", "EFFTRAIN_PROCESS": str(i)} for i in (0, 1)]
    processes = [start(whole, **place) for place in places]
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    figures = json.loads((tmp_path / "run" / "scorecard.json").read_text())["figures"]
    assert figures["bpb"]["value"] == pytest.approx(read_metrics(tmp_path / "run", "validation")[-1]["bpb"])
    assert figures["parameters_total"]["value"] == count_parameters(efftrain.load(tmp_path / "run")).total
    assert "sparsity" not in figures
    assert [line for line in said[1].splitlines() if not line.startswith("[Gloo]")] == []  # the first one speaks


def test_a_killed_run_continues_to_the_same_metrics(command, unbroken, tmp_path):
    out = tmp_path / "killed"
    kills = 0
    for wait_for in (3, 11):
        process = start(command(out))
        while process.poll() is None and len(rows_written(out)) < wait_for:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
    assert kills == 2
    code, output = run(command(out))
    assert code == 0, output
    for split in ("train", "validation"):
        assert computed(out, split) == computed(unbroken, split)


def rows_written(out: Path) -> list[str]:
    path = out / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def test_a_finished_run_is_left_as_it_is(command, unbroken):
    before = (unbroken / "metrics.jsonl").read_bytes()
    code, output = run(command(unbroken))
    assert code == 0, output
    assert "trained already" in output
    assert (unbroken / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (("--training.optimizer.peak-lr", "0.5"), "holds a run with another configuration (training.optimizer.peak_lr"),
        (("--out", "NEW", "--model.vocab-size", "200"), "the tokenizer of"),
        (("--out", "NEW", "--training.length", "64"), "model.max_length is 32"),
        (("--out", "NEW", "--training.finetune", "OTHER"), "differ: entry"),
        (("--out", "NEW", "--training.mesh.fsdp", "3"), "mesh: fsdp=3 needs 3 devices and there are 1"),
        (("--out", "NEW", "--corpus", "nowhere"), "there is no corpus"),
        (("--out", "NEW", "--training.stepz", "3"), "--training.stepz"),
    ],
)
def test_bad_input_is_one_sentence_and_changes_nothing(command, unbroken, tmp_path, changes, sentence):
    before = {p: p.read_bytes() for p in unbroken.glob("*.json*")}
    places = {"NEW": tmp_path / "new", "OTHER": tmp_path / "other"}
    if "OTHER" in changes:
        with_other_tokenizer(unbroken, places["OTHER"])
    code, output = run(command(unbroken, *(str(places.get(c, c)) for c in changes)))
    assert code == 2, output
    assert sentence in " ".join(output.split())
    assert "Traceback" not in output
    assert {p: p.read_bytes() for p in unbroken.glob("*.json*")} == before
    assert not places["NEW"].exists()


def with_other_tokenizer(run: Path, copy: Path) -> None:
    """A run in whose tokenizer two entries have changed places."""
    shutil.copytree(run, copy)
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    entries = tokenizer["model"]["vocab"]
    names = {number: token for token, number in entries.items()}
    entries[names[290]], entries[names[291]] = 291, 290
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))


def guide(flag: str) -> list[str]:
    """The command in recipes/README.md that has this flag, without ``python``."""
    lines = (ROOT / "recipes" / "README.md").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("python ") and f" {flag} " in line)
    return shlex.split(line)[1:]


def test_fine_tuning_as_the_guide_says(unbroken, corpus, tmp_path):
    """The two commands of recipes/README.md; the first loss is that of the trained model on the new corpus."""
    built = guide("--tokenizer")
    assert built[built.index("--tokenizer") + 1] == "runs/dense/tokenizer.json"
    other = build_corpus(tmp_path / "mine", seed=1, tokenizer=unbroken / "tokenizer.json")
    (unbroken / "chat_template.jinja").write_text("{{ messages }}")  # as an imported run has one
    places = {"runs/dense": unbroken, "corpora/mine": other, "runs/tuned": tmp_path / "tuned"}
    command = [str(places.get(word, word)) for word in guide("--training.finetune")]
    code, output = run([sys.executable, str(ROOT / command[0]), *command[1:], *SMALL])
    assert code == 0, output
    said = " ".join(output.split())
    assert f"at the last step of {unbroken}; here 0.0003 at step 1, at most 0.0003" in said
    first = read_metrics(tmp_path / "tuned")[0]["loss"]
    loader = data.LoaderConfig(corpora=(data.Part(path=other),), length=16, batch_size=4)
    graph, state = nnx.split(efftrain.load(unbroken))
    loss = jax.jit(lambda state, batch: next_token_loss(nnx.merge(graph, state), batch, None)[2]["loss"])
    total, count = loss(state, next(data.batches(loader)))
    assert first == pytest.approx(float(total / count), rel=1e-4)
    assert (tmp_path / "tuned" / "tokenizer.json").read_bytes() == (corpus / "tokenizer.json").read_bytes()
    assert (tmp_path / "tuned" / "chat_template.jinja").read_text() == "{{ messages }}"


def test_the_named_configurations_have_the_size_that_they_claim():
    configs = import_script(ROOT / "recipes" / "dense.py").configs
    sizes = {name: count_parameters(abstract_decoder(config.model)).total for name, config in configs.items()}
    assert sizes["gpu"] == pytest.approx(125e6, rel=0.03)
    assert sizes["v5e-64"] == pytest.approx(1e9, rel=0.05)
    for config in configs.values():
        assert config.training.length <= config.model.max_length
    jax.clear_caches()


class BuildReached(Exception):
    """The model is being built, so that batch and mesh were accepted."""


def test_the_sharding_rules_that_an_error_advises_can_be_given(corpus, tmp_path):
    """Six rows do not divide among eight devices; the sentence says what to pass to ``train_and_score``."""
    training = Training(steps=1, batch_size=6, length=16)
    model = llama(vocab_size=300, d_model=16, n_layers=1, n_heads=2, d_ff=16, max_length=16)
    config = Experiment(model=model, training=training, corpus=corpus, out=tmp_path / "run")

    def build(rngs):
        raise BuildReached

    with pytest.raises(ConfigError, match=r"train_and_score or fit rules=DEFAULT_RULES\.replace\(batch=None\)"):
        train_and_score(config, build, next_token_loss)
    with pytest.raises(BuildReached):
        train_and_score(config, build, next_token_loss, rules=DEFAULT_RULES.replace(batch=None))
