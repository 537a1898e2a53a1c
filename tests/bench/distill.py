"""A distillation step against what it is made of, and the memory of its loss.

    python tests/bench/distill.py

Time: a student's step with the teacher beside it, over a plain step plus the teacher's forward pass; a step from a
cache of 64 probabilities, and of 50 samples, over a plain step; in turn, medians. Memory: temporaries of the loss and
its gradient at a vocabulary of 32k in chunks, and with all logits of both, as XLA plans them.

Writes ``tests/bench/results/distill.json``. The last line is JSON: ``ratio`` is the step with a teacher over the sum of
its parts, ``goal`` what it may be.
"""

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from clock import Stepper, in_turn
from flax import nnx

from efftrain.compress.distillation.distill import Distill, FromCache, FromTeacher
from efftrain.models.config import ModelConfig, llama
from efftrain.models.decoder import Decoder
from efftrain.ops.divergence import distillation_loss, generalized_jsd
from efftrain.recipe import restart_with_huge_pages, use_compilation_cache
from efftrain.train.config import Training
from efftrain.train.objectives.teacher import Teacher
from efftrain.train.run.environment import environment

RESULTS = Path(__file__).parent / "results" / "distill.json"
GOAL = 1.1
SIZES = {
    "cpu": (
        llama(vocab_size=4096, d_model=192, n_layers=6, n_heads=6, d_ff=512, max_length=256),
        llama(vocab_size=4096, d_model=512, n_layers=6, n_heads=8, d_ff=1408, max_length=256),
        Training(steps=1000, batch_size=16, length=256),
    ),
    "gpu": (
        llama(vocab_size=4096, d_model=768, n_layers=12, n_heads=12, d_ff=2048, max_length=1024, dtype="bfloat16"),
        llama(vocab_size=4096, d_model=2048, n_layers=24, n_heads=16, d_ff=5632, max_length=1024, dtype="bfloat16"),
        Training(steps=1000, batch_size=32, length=1024),
    ),
}
VOCAB, TOKENS, WIDTH, TEACHER_WIDTH = 32_000, 4096, 256, 1024


class Forward:
    """The teacher's states for the batch of a step."""

    def __init__(self, model: ModelConfig, training: Training):
        graph, self._state = nnx.split(Decoder(model, rngs=nnx.Rngs(0)))
        self._tokens = np.random.default_rng(0).integers(0, 4096, (training.batch_size, training.length), np.int32)

        def run(state: nnx.State, tokens: np.ndarray) -> tuple[jax.Array, jax.Array]:
            teacher = nnx.merge(graph, state)
            hidden_btd, _ = teacher.hidden(tokens)
            # Its distribution is a part of the pass; as in the step, all logits of the batch do not stay.
            return hidden_btd, jax.nn.logsumexp(teacher.logits(hidden_btd), axis=-1)

        self._run = jax.jit(run)

    def __call__(self) -> None:
        jax.block_until_ready(self._run(self._state, self._tokens))


def kept(training: Training, k: int) -> dict[str, np.ndarray]:
    """What a loader adds to a batch from a cache."""
    rng = np.random.default_rng(1)
    shape = training.batch_size, training.length, k
    return {
        "teacher_ids": rng.integers(0, 4096, shape, np.int32),
        "teacher_probs": np.full(shape, 0.9 / k, np.float32),
    }


def steps(student: ModelConfig, teacher: ModelConfig, training: Training, rounds: int) -> dict[str, float]:
    taught = FromTeacher(how=Distill(), teacher=Teacher.of(Decoder(teacher, rngs=nnx.Rngs(0))))
    cached = {
        f"cached, {name}": Stepper(
            student, training, objective=FromCache(how=Distill(), tail=tail), more=kept(training, k)
        )
        for name, k, tail in (("top 64", 64, True), ("50 samples", 50, False))
    }
    programs = {
        "plain": Stepper(student, training),
        "teacher forward": Forward(teacher, training),
        "with teacher": Stepper(student, training, objective=taught),
        **cached,
    }
    return in_turn(programs, rounds)


def memory() -> dict[str, int]:
    """Bytes of temporaries."""
    shapes = [
        (1, TOKENS, WIDTH),
        (WIDTH, VOCAB),
        (1, TOKENS),
        (1, TOKENS),
        (1, TOKENS, TEACHER_WIDTH),
        (TEACHER_WIDTH, VOCAB),
    ]
    types = [jnp.float32, jnp.float32, jnp.int32, jnp.float32, jnp.float32, jnp.float32]
    arguments = [jax.ShapeDtypeStruct(s, t) for s, t in zip(shapes, types, strict=True)]

    def chunked(x, kernel, targets, weights, t, t_kernel):
        return distillation_loss(x, kernel, targets, weights, t, t_kernel)[0]

    def naive(x, kernel, targets, weights, t, t_kernel):
        return (generalized_jsd(x @ kernel, t @ t_kernel, 0.0) * weights).sum()

    def temporaries(loss) -> int:
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*arguments).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    return {"chunked": temporaries(chunked), "naive": temporaries(naive)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    use_compilation_cache()
    restart_with_huge_pages()
    step_s = steps(*SIZES[options.size], options.rounds)
    print("step_s", json.dumps(step_s), flush=True)
    n_bytes = memory()
    result = {
        "environment": environment(),
        "size": options.size,
        "step_s": step_s,
        "cached_ratio": {n: s / step_s["plain"] for n, s in step_s.items() if n.startswith("cached")},
        "loss_bytes_at_32k": n_bytes,
        "loss_bytes_share": n_bytes["chunked"] / n_bytes["naive"],
        "ratio": step_s["with teacher"] / (step_s["plain"] + step_s["teacher forward"]),
        "goal": GOAL,
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
