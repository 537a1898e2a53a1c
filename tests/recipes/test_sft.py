"""The fine-tuning recipe as a user starts it: an imported run learns the answers of a file, and nothing else."""

import json
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from chat_runs import CHATML, LENGTH, chat_tokenizer, write_chat_run
from running import run

import efftrain
from efftrain.data.tasks.rows import TaskBatches
from efftrain.errors import ConfigError
from efftrain.interop.conversations import encode_conversations, read_conversations, rows_once
from efftrain.interop.fine_tuning import FineTuning
from efftrain.interop.run_tokenizer import read_run_tokenizer
from efftrain.models.decoding.generate import generate
from efftrain.recipe import import_script
from efftrain.train.metrics.metrics_log import read_metrics
from efftrain.train.objectives.objective import next_token_loss

ROOT = Path(__file__).parents[2]
STEPS = 60
SMALL = f"""
    --training.steps {STEPS} --training.batch-size 4 --training.length {LENGTH} --training.n-microbatches 2
    --training.eval-every 30 --training.optimizer.peak-lr 0.02 --n-new 12
""".split()
TURNS = {"alpha": "beta", "beta": "gamma", "gamma": "delta", "delta": "alpha"}


@pytest.fixture(scope="module")
def started(tmp_path_factory) -> Path:
    """A folder with an imported run and two files of conversations of two turns."""
    folder = tmp_path_factory.mktemp("sft")
    write_chat_run(folder / "imported", chat_tokenizer("byte_level"), CHATML)
    for name in ("chats", "held-out"):
        lines = []
        for first, second in TURNS.items():
            asked = ((first, second), (second, TURNS[second]))
            messages = [m for question, answer in asked for m in turn(question, answer)]
            lines.append(json.dumps({"messages": messages}))
        (folder / f"{name}.jsonl").write_text("\n".join(lines * 4))
    return folder


def turn(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def command(folder: Path, out: str, *changes: str) -> list[str]:
    files = ["--conversations", str(folder / "chats.jsonl"), "--held-out", str(folder / "held-out.jsonl")]
    start = ["--training.finetune", str(folder / "imported"), "--out", str(folder / out)]
    return [sys.executable, str(ROOT / "recipes" / "sft.py"), "cpu", *files, *start, *SMALL, *changes]


@pytest.fixture(scope="module")
def tuned(started) -> tuple[Path, str]:
    code, output = run(command(started, "tuned"))
    assert code == 0, output
    return started / "tuned", output


def test_the_loss_on_answers_falls_and_the_model_gives_them(tuned, started):
    out, output = tuned
    rows = read_metrics(out)
    assert np.mean([row["loss"] for row in rows[-5:]]) < 0.3 < 3 < rows[0]["loss"]
    figures = json.loads((out / "scorecard.json").read_text())["figures"]
    assert figures["bpb"]["split"] == "held out"
    assert figures["bpb"]["note"] == "the answers of 16 conversations"
    assert figures["loss"]["value"] == pytest.approx(read_metrics(out, "validation")[-1]["loss"])
    tokenizer = read_run_tokenizer(out)
    prompt = tokenizer.encode_chat([{"role": "user", "content": "gamma"}])
    answer = generate(efftrain.load(out), [prompt], n_new=12, end_token=tokenizer.eos)[0].tolist()
    assert tokenizer.decode(answer) == "delta"
    assert answer[-1] in tokenizer.eos
    assert "alpha -> beta" in " ".join(output.split())
    assert "LlamaForCausalLM" in output  # as what it can be exported


def test_the_first_loss_is_that_of_the_answers_under_the_imported_model(tuned, started):
    """Computed from every position's likelihood, one conversation after another; the questions count nothing."""
    tokenizer, model = read_run_tokenizer(started / "imported"), efftrain.load(started / "imported")
    nats, n_bytes = [], 0
    for first, second in TURNS.items():
        chat = turn(first, second) + turn(second, TURNS[second])
        ids = jnp.asarray([tokenizer.encode_chat(chat, add_generation_prompt=False)])
        logits = np.asarray(model(ids), np.float64)[0]
        likelihoods = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        for number in (1, 3):
            start = len(tokenizer.encode_chat(chat[:number]))
            stop = start + len(tokenizer.tokenizer.encode(chat[number]["content"]).ids) + 1
            assert ids[0, stop - 1] in tokenizer.eos
            nats += [-likelihoods[i - 1, ids[0, i]] for i in range(start, stop)]
            n_bytes += len(chat[number]["content"])
    chats = read_conversations(started / "chats.jsonl")
    items = encode_conversations(tokenizer, chats, length=LENGTH)
    (batch,) = rows_once(items.items, length=LENGTH, batch_size=8)
    loss, count, _ = next_token_loss(model, batch, None)
    assert count == 4 * len(nats)
    assert float(loss / count) == pytest.approx(np.mean(nats), rel=1e-5)
    assert items.token_bytes[batch["targets"]][batch["mask"]].sum() == 4 * n_bytes
    first = next(TaskBatches(items.items, length=LENGTH, batch_size=4, seed=0, n_labels=0))
    loss, count, _ = next_token_loss(model, first, None)
    assert read_metrics(tuned[0])[0]["loss"] == pytest.approx(float(loss / count), rel=1e-4)


def test_a_fine_tuned_run_has_all_that_it_needs(tuned, started, tmp_path):
    out, _ = tuned
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (out / name).read_bytes() == (started / "imported" / name).read_bytes()
    moved = (started / "imported").rename(tmp_path / "elsewhere")
    try:
        code, output = run(command(started, "tuned"))
    finally:
        moved.rename(started / "imported")
    assert code == 0, output
    assert "trained already" in output


def test_one_conversation_per_row_learns_too(started):
    code, output = run(command(started, "unpacked", "--no-packed", "--training.steps", "2", "--n-new", "0"))
    assert code == 0, output
    assert "16 conversations" in output


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (("--training.finetune", "None"), "training.finetune names no run; give the run to fine-tune"),
        (("--training.finetune", "nowhere"), "nowhere holds no config.json, so it is not a run"),
        (("--training.length", "999"), f"training.length is 999 and model.max_length is {LENGTH}"),
        (("--conversations", "nowhere.jsonl"), "nowhere.jsonl cannot be read"),
        (("--fields.messages", "turns"), "line 1: it has no list of messages in 'turns'"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(started, changes, sentence):
    code, output = run(command(started, "bad", *changes))
    assert code == 2, output
    assert sentence in " ".join(output.split())
    assert not (started / "bad").exists()


def test_the_named_configurations_name_no_run():
    for config in import_script(ROOT / "recipes" / "sft.py").configs.values():
        assert isinstance(config, FineTuning)
        with pytest.raises(ConfigError, match=r"training\.finetune names no run"):
            config.with_model()
