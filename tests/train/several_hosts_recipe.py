"""The tiny run on all devices of all processes, fed by the real loader. Started by test_several_hosts.py:
CORPUS OUT [FIELD=VALUE ...].

``die_at=STEP:SIGNAL:PROCESS``: that process gets the signal while it makes that batch. ``die_evaluating``: the same
with batches of the first evaluation. ``teacher=RUN``: it teaches.
"""

import dataclasses
import os
import sys
from pathlib import Path

import jax
import tiny
from flax import nnx

from efftrain import data
from efftrain.compress.distillation.distill import Distill, FromTeacher, teacher_run
from efftrain.measure.quality.evaluate import Evaluator
from efftrain.models.decoder import Decoder
from efftrain.recipe import exit_cleanly
from efftrain.sharding import hosts
from efftrain.sharding.mesh import MeshConfig
from efftrain.train.batches import batch_part
from efftrain.train.loop import fit
from efftrain.train.objectives.objective import next_token_loss
from efftrain.train.run.directory import Run

STEPS, EVAL_EVERY = 12, 6


class Deadly:
    """A loader; this process gets a signal while it makes a batch."""

    def __init__(self, batches, at: int, number: int):
        self._batches, self._at, self._number = batches, at, number
        self.get_state, self.set_state, self._taken = batches.get_state, batches.set_state, 0

    def __iter__(self):
        return self

    def __next__(self):
        self._taken += 1
        if self._taken == self._at:
            os.kill(os.getpid(), self._number)
        return next(self._batches)


def main(corpus: str, out: str, **options: str) -> None:
    hosts.connect()
    pairs = (pair.split("-", 1) for pair in options.get("mesh", "fsdp--1").split("+"))
    mesh = MeshConfig(**{axis: int(n) for axis, n in pairs})
    training = dataclasses.replace(
        tiny.TRAINING,
        steps=STEPS,
        mesh=mesh,
        checkpoint_every=int(options.get("checkpoint_every", 4)),
        eval_every=EVAL_EVERY,
        keep_checkpoints=3,
        seed=int(options.get(f"seed{hosts.process_index()}", 0)),
    )
    loader = data.LoaderConfig(
        corpora=(data.Part(path=Path(corpus)),), length=training.length, batch_size=training.batch_size
    )
    opened = data.open(corpus)
    if "not_shared" in options and hosts.process_index() == 1:
        Run.checkpoints = property(lambda self: Path(f"{out}-of-another-host"), lambda self, place: None)
    model = dataclasses.replace(tiny.MODEL, vocab_size=opened.vocab_size)
    run = Run(out, tiny.Config(model=model, training=training))
    part = batch_part(training)
    held_out = dataclasses.replace(loader, split="validation", shuffle=False, repeat=False)

    def made(loader: data.LoaderConfig, deadly: str):
        batches = data.batches(loader, *part)
        at, number, process = map(int, options.get(deadly, "0:0:-1").split(":"))
        return Deadly(batches, at, number) if process == hosts.process_index() else batches

    objective = next_token_loss
    if "teacher" in options:
        objective = FromTeacher(how=Distill(), teacher=teacher_run(Path(options["teacher"]), Path(corpus)))
    fitted = fit(
        lambda rngs: Decoder(model, rngs=rngs),
        objective,
        made(loader, "die_at"),
        training,
        run,
        evaluate=Evaluator(lambda: made(held_out, "die_evaluating"), opened.token_bytes(), max_batches=4),
    )
    assert fitted.evaluation["step"] == STEPS
    print(jax.process_count(), sum(x.size for x in jax.tree.leaves(nnx.state(fitted.model))))


if __name__ == "__main__":
    with exit_cleanly():
        main(*sys.argv[1:3], **dict(word.split("=") for word in sys.argv[3:]))
