"""Runs and a corpus as training and building leave them, without training."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from efftrain import data
from efftrain.config import to_json
from efftrain.data.splits import SplitByGroup
from efftrain.models.decoder import Decoder
from efftrain.train.checkpoints.checkpoints import Checkpoints
from efftrain.train.state import split_model

LENGTH, VOCABULARY = 16, 280
OWN_BLOCK = """
from dataclasses import dataclass
from efftrain.models.config import Dense

@dataclass(frozen=True, kw_only=True)
class Odd(Dense):
    SCALE = 1.0
"""


WORDS = ("alpha", "beta", "gamma", "delta", "naïve", "return", "数据")


def write_corpus(folder: Path, words: Sequence[str] = WORDS, tokenizer: Path | None = None) -> data.Corpus:
    rng = np.random.default_rng(0)
    for number in range(24):
        (folder / f"{number}.txt").write_text(f"{number} " + " ".join(rng.choice(words, rng.integers(3, 30))))
    return data.build(
        data.CorpusConfig(
            sources=(data.TextFolder(path=folder),),
            rules=(),
            vocabulary=VOCABULARY,
            tokenizer=tokenizer,
            block=64,
            split=SplitByGroup(validation=0.2, test=0),
        ),
        folder / "corpus",
    )


def write_run(run: Path, model: Decoder, corpus: data.Corpus, training: Any = None) -> Path:
    """As training leaves it, at step 40."""
    run.mkdir(parents=True)
    training = {"length": LENGTH} if training is None else to_json(training)
    settings = {"model": to_json(model.config), "training": training, "corpus": str(corpus.path)}
    (run / "config.json").write_text(json.dumps(settings))
    _, params, rest = split_model(model)
    with Checkpoints(run / "checkpoints") as checkpoints:
        checkpoints.save(40, {"params": params, "model_state": rest}, None, None, squeezed=True)
        checkpoints.wait()
    return run


def with_own_block(run: Path, source: str = OWN_BLOCK) -> Path:
    """Its feed-forward part is then one that its own recipe defines."""
    settings = json.loads((run / "config.json").read_text())
    settings["model"]["pattern"][0]["mlp"]["type"] = "recipe.py:Odd"
    (run / "config.json").write_text(json.dumps(settings))
    (run / "recipe.py").write_text(source)
    return run
