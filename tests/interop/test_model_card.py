"""The model card: what the files of a run say, and nothing else."""

import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
from flax import nnx
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from efftrain.config import to_json
from efftrain.interop.card_facts import card_facts
from efftrain.interop.export_gguf import origin_fields
from efftrain.interop.export_model import export_model
from efftrain.interop.import_model import import_model
from efftrain.interop.markdown import code, plain, table, yaml
from efftrain.interop.model_card import TRANSFORMERS, model_card
from efftrain.measure.scorecard.scorecard import Figure, Scorecard
from efftrain.models.config import llama
from efftrain.models.decoder import Decoder
from efftrain.train.config import Training
from efftrain.train.optimizers import AdamW
from efftrain.train.run.model_run import write_model_run
from efftrain.train.state import split_model

MODEL = llama(vocab_size=61, d_model=24, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=40, max_length=32)
TRAINING = Training(steps=20, batch_size=4, length=16, optimizer=AdamW(peak_lr=3e-3))
HOSTILE = "a|b\n# x `<b>*"
ENVIRONMENT = {
    "time": "2026-01-02T03:04:05+0000",
    "command": ["recipes/dense.py", "cpu", "--corpus", "/home/me/corpora/small", "--out=/home/me/runs/small run"],
    "commit": "0123456789ab",
    "cpu": "Some CPU",
    "cpu_cores": 2,
    "devices": ["cpu:cpu", "cpu:cpu"],
    "packages": {"jax": "0.10.2", "efftrain": "0.1.0"},
}


def write(folder: Path, name: str, value) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(value))


def bpb(value: float, split: str) -> dict[str, Figure]:
    return {"bpb": Figure(value, "bits/byte", "measured", split=split)}


def write_scorecard(run: Path, figures: dict[str, Figure]) -> None:
    write(run, "scorecard.json", asdict(Scorecard(run.name, figures, ENVIRONMENT)))


@pytest.fixture
def trained(tmp_path) -> Path:
    """A run that was trained on a corpus, beside it."""
    corpus, run = tmp_path / "corpora" / "small", tmp_path / "runs" / "small"
    manifest = {
        "funnel": [
            {"stage": "seen", "documents": 1234, "bytes": 56789},
            {"stage": "too_short", "documents": 34, "bytes": 89},
            {"stage": "kept", "documents": 1200, "bytes": 56700},
        ],
        "sources": {"web": [{"stage": "kept", "documents": 1200, "bytes": 56700}]},
        "splits": {"train": {"documents": 1100, "bytes": 50000, "tokens": 20000}},
        "files": {},
    }
    write(corpus, "manifest.json", manifest)
    settings = {"type": "dense.py:Config", "model": to_json(MODEL), "training": to_json(TRAINING)}
    write(run, "config.json", settings | {"corpus": str(corpus), "out": str(run)})
    write(run, "environment.json", ENVIRONMENT)
    rows = [{"step": step, "split": "train", "loss": 4 - step / 10} for step in range(1, 21)]
    rows.append({"step": 20, "split": "validation", "bpb": 1.5, "loss": 2.5})
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    figures = bpb(1.5, "validation") | {
        "train_tokens": Figure(1280, "tokens", "counted"),
        "train_flops": Figure(2.5e12, "FLOP", "counted", "causal"),
        "train_energy": Figure(None, "J", "unavailable", "no meter"),
    }
    write_scorecard(run, figures)
    return run


@pytest.fixture
def imported(tmp_path) -> Path:
    run = tmp_path / "runs" / "base"
    write(run, "config.json", {"model": to_json(MODEL)})
    origin = {"format": "safetensors", "dtypes": {"BF16": 21}, "license": "Apache-2.0", "languages": ["en"]}
    write(run, "import.json", origin | {"source": "Some-Model-1B", "architecture": "llama", "digest": "00ff"})
    return run


def compressed(before: Path, corpus: Path, name: str = "base-int8") -> Path:
    """A run that was quantised from another one."""
    run = before.with_name(name)
    write(run, "config.json", json.loads((before / "config.json").read_text()))
    matrix = {"format": "int8", "why": "", "bytes_before": 4000, "bytes_after": 1000}
    kept = {"format": "float32", "why": "no rule", "bytes_before": 500, "bytes_after": 500}
    report = {"run": str(before), "corpus": str(corpus), "matrices": [matrix, matrix, kept]}
    write(run, "compression.json", report | {"options": {"type": "Quantize", "weights": "int8", "method": "rtn"}})
    return run


def card(run: Path, **more) -> str:
    return model_card(card_facts(run), loading=TRANSFORMERS, **more)


CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- efftrain
---

# small

Written by efftrain from the files of the run. What the run does not record is not said here.

## Origin

1. `small` was trained.

The run records no licence.

## Model

|  |  |
| --- | --- |
| Files | LlamaForCausalLM, float32 |
| Parameters | 12,264, of which 1,464 in the embedding |
| Layers | 2 of width 24 |
| Attention | 4 heads of 6, 2 of keys and values |
| Feed-forward | 40 hidden units |
| Vocabulary | 61 tokens, untied head |
| Context | 32 tokens |

## Data

The corpus `small`:

| Split | Documents | Bytes | Tokens |
| --- | ---: | ---: | ---: |
| train | 1,100 | 50,000 | 20,000 |

What was read, removed and kept:

| Stage | Documents | Bytes |
| --- | ---: | ---: |
| seen | 1,234 | 56,789 |
| too_short | 34 | 89 |
| kept | 1,200 | 56,700 |

What was kept of each source:

| Source | Documents | Bytes |
| --- | ---: | ---: |
| web | 1,200 | 56,700 |

The corpus records neither the licences nor the languages of its documents.

## Training

|  |  |
| --- | --- |
| Steps | 20 of 20 |
| Tokens of a step | 4 rows of 16 |
| Tokens | 1,280 |
| FLOPs | 2.5 TFLOP (causal) |
| Optimizer | AdamW, peak learning rate 0.003, WarmupStableDecay |
| Recipe | `dense.py:Config` |
| Command | `python recipes/dense.py cpu --corpus small '--out=small run'` |
| Code | efftrain 0.1.0, jax 0.10.2, commit `0123456789ab` |
| Started | 2026-01-02T03:04:05+0000 on 2 x cpu:cpu; Some CPU, 2 cores |

| Step | Training loss (nats/token) | Validation (bits per byte) |
| ---: | ---: | ---: |
| 1 | 3.9000 |  |
| 3 | 3.7000 |  |
| 5 | 3.5000 |  |
| 7 | 3.3000 |  |
| 9 | 3.1000 |  |
| 12 | 2.8000 |  |
| 14 | 2.6000 |  |
| 16 | 2.4000 |  |
| 18 | 2.2000 |  |
| 20 | 2.0000 | 1.5000 |

## Scorecard

| Figure | Value | Method | Note |
| --- | ---: | --- | --- |
| `bpb` | 1.5000 bits/byte | measured | validation split |
| `train_tokens` | 1.28k tokens | counted |  |
| `train_flops` | 2.5 TFLOP | counted | causal |

Scored on 2 x cpu:cpu; Some CPU, 2 cores. Not measured: `train_energy`.

## Limits

- A row has at most 32 tokens. Training rows had 16; more is not tested.
- A note.
- No training for safety and no test of harmful output is recorded.
- The languages that the model knows are not recorded.

## How to load it

In this folder:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer, model = AutoTokenizer.from_pretrained("."), AutoModelForCausalLM.from_pretrained(".")
tokens = tokenizer("Once upon a time", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(tokens, max_new_tokens=32)[0]))
```

To train or compress it further: `efftrain import FOLDER --out RUN`.
"""


def test_a_trained_run_in_full(trained):
    assert card(trained, form="LlamaForCausalLM, float32", notes=("A note.",)) == CARD


def test_an_import_keeps_the_licence_and_the_languages_and_names_its_base(imported):
    text = card(imported)
    assert text.startswith(
        "---\nlicense: apache-2.0\nlanguage:\n- en\nlibrary_name: transformers\npipeline_tag: text-generation\n"
        "base_model: Some-Model-1B\ntags:\n- efftrain\n---\n"
    )
    assert (
        "1. `base` was imported from `Some-Model-1B` (tensors: 21 BF16, SHA-256 of the files' digests `00ff`)." in text
    )
    assert "The licence of the original is `Apache-2.0`" in text
    for absent in ("## Training", "## Data", "## Compression", "languages that the model knows"):
        assert absent not in text
    assert "The run has no scorecard." in text


def test_a_licence_that_is_no_identifier_is_named(imported):
    write(imported, "import.json", {"license": "My own: licence", "source": "model.Q4_1.gguf"})
    text = card(imported)
    assert text.startswith('---\nlicense: other\nlicense_name: "My own: licence"\nlibrary_name')
    assert "base_model" not in text  # a file is no model of the hub


def test_a_compressed_import_is_traced_to_its_origin(imported, trained):
    run = compressed(imported, trained.parents[1] / "corpora" / "small")
    write_scorecard(imported, bpb(1.25, "test"))
    write_scorecard(run, bpb(1.375, "test"))
    text = card(run)
    assert "license: apache-2.0\n" in text
    assert "- efftrain\n- quantized\n---" in text
    assert "1. `base` was imported from" in text
    assert "2. `base-int8` was compressed from `base`." in text
    assert "| Method | Quantize: weights int8, method rtn |" in text
    assert "| Matrices | 2 in int8; 1 in float32 (no rule) |" in text
    assert "| Bytes of the matrices | 8,500 before, 2,500 after |" in text
    assert "| Bits per byte | 1.2500 before, 1.3750 after (test split) |" in text
    write_scorecard(imported, bpb(1.25, "validation"))
    assert "1.2500 before" not in card(run)  # other rows
    shutil.rmtree(imported)
    text = card(run)
    assert "license" not in text.split("---")[1]
    assert "`base` is not at its recorded place any more: its origin is not known here." in text


def test_figures_of_another_corpus_at_the_same_place_are_not_taken(trained):
    write(trained, "identity.json", {"inputs": {"corpus": "of another corpus"}})
    text = card(trained)
    assert "The corpus `small` is not described, because what is at its recorded place now is another one." in text
    assert "1,234" not in text
    shutil.rmtree(trained.parents[1] / "corpora")
    assert "because it is not at its recorded place any more." in card(trained)


@pytest.mark.parametrize(
    "named",
    [
        lambda run: {"source": run},
        lambda run: {"upcycle": run},
        lambda run: {"convert": run},
        lambda run: {"initial": "cut", "teacher": run},
        lambda run: {"training": {"finetune": run}},
        lambda run: {"training": {"resume_from": f"{run}@480"}},
    ],
)
def test_the_licence_follows_every_way_to_start_from_a_run(imported, named):
    run = imported.with_name("started")
    write(run, "config.json", {"model": to_json(MODEL)} | named(str(imported)))
    text = card(run)
    assert "2. `started` was trained from `base`." in text
    assert "license: apache-2.0\n" in text


def test_runs_that_name_each_other_end(imported):
    first = compressed(imported, imported, "first")
    second = compressed(first, imported, "second")
    write(first, "compression.json", {"run": str(second), "options": {"type": "Quantize"}})
    assert "`second` was compressed from `first`" in card(second)


def test_hostile_names_stay_text(trained):
    corpora = trained.parents[1] / "corpora"
    manifest = json.loads((corpora / "small" / "manifest.json").read_text())
    manifest["sources"] = {HOSTILE: manifest["sources"]["web"]}
    write(corpora / HOSTILE, "manifest.json", manifest)
    settings = json.loads((trained / "config.json").read_text())
    write(trained, "config.json", settings | {"corpus": str(corpora / HOSTILE)})
    changed = ENVIRONMENT | {"cpu": "<script>|", "command": ["x", "```\n# y"], "commit": "`a`"}
    write(trained, "environment.json", changed)
    text = card(trained)
    assert [line for line in text.splitlines() if line.startswith("#")] == [
        line for line in CARD.splitlines() if line.startswith("#")
    ]
    assert "| a\\|b \\# x \\`\\<b\\>\\* | 1,200 | 56,700 |" in text
    assert "The corpus ``a|b # x `<b>*``:" in text
    assert "```` python x '``` # y' ````" not in text  # a fence only where the text needs its spaces
    assert "| Command | ````python x '``` # y'```` |" in text
    assert "| Code | efftrain 0.1.0, jax 0.10.2, commit `` `a` `` |" in text
    html = rendered(text)
    assert "<b>" not in html
    assert "<script" not in html
    assert html.count("<table>") == rendered(CARD).count("<table>")


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A run with a checkpoint, a tokenizer of words, and an origin whose licence has a name of its own."""
    out = tmp_path_factory.mktemp("runs") / "small"
    _, params, rest = split_model(Decoder(MODEL, rngs=nnx.Rngs(0)))
    words = Tokenizer(WordLevel({"[UNK]": 0, "Once": 1, "upon": 2, "a": 3, "time": 4}, "[UNK]"))
    words.pre_tokenizer = Whitespace()
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    write_model_run(
        out,
        {"params": params, "model_state": rest},
        step=0,
        made_from=("import.json", {"architecture": "llama", "source": "Theirs", "license": "mit", "languages": ["de"]}),
        config={"model": to_json(MODEL)},
        texts={"tokenizer.json": words.to_str(), "tokenizer_config.json": json.dumps(config)},
    )
    return out


FRONT_MATTER = """\
---
# a comment
language:
- en
- "de"
license: other
license_name: 'their-own'
license_link: LICENSE
model-index:
- name: x
---
license: mit
"""


def test_an_import_records_what_the_front_matter_says_and_its_export_repeats_it(small, tmp_path):
    export_model(small, tmp_path / "exported")
    (tmp_path / "exported" / "README.md").write_text(FRONT_MATTER)
    import_model(tmp_path / "exported", tmp_path / "run")
    said = json.loads((tmp_path / "run" / "import.json").read_text())
    assert (said["license"], said["license_name"], said["license_link"]) == ("other", "their-own", "LICENSE")
    assert said["languages"] == ["en", "de"]
    export_model(tmp_path / "run", tmp_path / "again", dtype="bfloat16")
    text = (tmp_path / "again" / "README.md").read_text()
    assert text.startswith(
        "---\nlicense: other\nlicense_name: their-own\nlicense_link: LICENSE\nlanguage:\n- en\n- de\n"
    )
    assert "| Files | LlamaForCausalLM, bfloat16 |" in text
    assert "a comment" not in text


def test_fields_of_gguf_name_the_origin(small, trained):
    assert origin_fields(small) == {
        "general.license": "mit",
        "general.languages": ["de"],
        "general.base_model.count": 1,
        "general.base_model.0.name": "Theirs",
    }
    assert origin_fields(trained) == {}


@pytest.mark.parametrize("tokenizer", [True, False])
def test_the_lines_of_the_card_run_in_its_folder(small, tmp_path, monkeypatch, capsys, tokenizer):
    pytest.importorskip("torch", reason="needs the extra interop-test")
    pytest.importorskip("transformers", reason="needs the extra interop-test")
    run = Path(shutil.copytree(small, tmp_path / "run"))
    if not tokenizer:
        (run / "tokenizer.json").unlink()
    export_model(run, tmp_path / "exported")
    monkeypatch.chdir(tmp_path / "exported")
    snippet = re.search(r"```python\n(.*?)```", Path("README.md").read_text(), re.S)
    exec(snippet[1], {})
    assert ("Once upon a time" if tokenizer else "tensor([[") in capsys.readouterr().out


def rendered(text: str) -> str:
    markdown = pytest.importorskip("markdown_it", reason="renders Markdown; comes with rich")
    return markdown.MarkdownIt("commonmark").enable("table").render(text.split("---\n", 2)[2])


@pytest.mark.parametrize("name", [HOSTILE, "no", "2.0", "- x", "a: b", "é\u2028\x7f", '"', "🙂", "#x", "null", ""])
def test_front_matter_is_read_as_what_was_meant(name):
    loaded = pytest.importorskip("yaml", reason="reads YAML; comes with orbax").safe_load
    meant = " ".join("".join(c if c.isprintable() else " " for c in name).split())
    assert loaded(yaml({"x": name, "tags": ["efftrain", name], "none": None, "empty": []})) == {
        "x": meant,
        "tags": ["efftrain", meant],
    }


def test_the_hub_reads_the_card(imported):
    hub = pytest.importorskip("huggingface_hub", reason="needs the extra interop-test")
    data = hub.ModelCard(card(imported)).data
    assert data.license == "apache-2.0"
    assert data.base_model == "Some-Model-1B"
    assert data.tags == ["efftrain"]
    assert data.library_name == "transformers"


def test_a_bar_does_not_end_a_cell_within_code():
    text = table(["Name", "n"], [[code("a|b"), "1"], [plain("c|d"), "2"]])
    assert text == "| Name | n |\n| --- | ---: |\n| `a\\|b` | 1 |\n| c\\|d | 2 |"
    assert re.findall(r"<code>(.*?)</code>", rendered(f"---\n---\n{text}")) == ["a|b"]
