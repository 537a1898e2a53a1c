"""Training step of a small Llama: efftrain against transformers.LlamaForCausalLM on PyTorch CPU, in alternating rounds.

    python tests/bench/train_step.py --peer-python SIDE_ENVIRONMENT/bin/python

Both sides start from the same weights, see the same tokens and use AdamW with clipping; the losses after the timed
steps are printed, so that a difference in what is computed shows. The side environment holds torch==2.13.0 and
transformers.
Goal: ratio (efftrain tokens/s over transformers tokens/s) >= 1.0.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LAYERS, D_MODEL, HEADS, D_FF, VOCAB, ROWS, LENGTH = 6, 384, 6, 1024, 4096, 16, 256
LEARNING_RATE, WEIGHT_DECAY, CLIP = 1e-3, 0.1, 1.0


def batch(step: int):
    import numpy as np

    tokens = np.random.default_rng(step).zipf(1.3, (ROWS, LENGTH + 1)) % VOCAB
    return tokens.astype(np.int32)


def serve_rounds(step, steps: int) -> None:
    """Runs a round of steps for each line on stdin; answers with seconds and the last loss."""
    for number in range(2):
        loss = step(batch(number))
    print(json.dumps({"ready": True}), flush=True)
    number = 2
    for _ in sys.stdin:
        started = time.perf_counter()
        for _ in range(steps):
            loss = step(batch(number))
            number += 1
        print(json.dumps({"seconds": time.perf_counter() - started, "loss": loss}), flush=True)


def run_efftrain(arguments) -> None:
    import jax
    import numpy as np
    from flax import nnx

    from efftrain.models.config import llama
    from efftrain.models.decoder import Decoder
    from efftrain.train.objectives.objective import next_token_loss
    from efftrain.train.optimizers import AdamW, with_clipping
    from efftrain.train.state import init_state, split_model
    from efftrain.train.step import make_step

    config = llama(vocab_size=VOCAB, d_model=D_MODEL, n_layers=LAYERS, n_heads=HEADS, d_ff=D_FF, max_length=LENGTH)

    def build(rngs):
        return Decoder(config, rngs=rngs)

    optimizer = with_clipping(AdamW(peak_lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY).build(lambda step: 1.0), CLIP)
    graph = split_model(nnx.eval_shape(lambda: build(nnx.Rngs(0))))[0]
    state = jax.jit(lambda: init_state(build, optimizer, seed=0, ema=False))()
    np.savez(arguments.weights, **to_llama(nnx.merge(graph, state.params, state.model_state)))
    train = jax.jit(
        make_step(graph, next_token_loss, optimizer, n_microbatches=arguments.microbatches), donate_argnums=0
    )
    positions = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
    ones = np.ones((ROWS, LENGTH), np.int32)

    def step(tokens) -> float:
        nonlocal state
        state, metrics = train(
            state,
            {
                "tokens": tokens[:, :-1],
                "targets": tokens[:, 1:],
                "segments": ones,
                "positions": positions,
                "mask": ones.astype(bool),
            },
        )
        total, count = metrics["loss"]
        return float(total / count)

    serve_rounds(step, arguments.steps)


def to_llama(model) -> dict:
    """The weights under their Hugging Face names: (out, in) matrices."""
    import numpy as np

    named = {
        "model.embed_tokens.weight": model.embedding.table[...],
        "model.norm.weight": model.norm.scale[...],
        "lm_head.weight": model.head.kernel[...].T,
    }
    for i, block in enumerate(model.layers()):
        parts = {
            "input_layernorm": block.attention_norm.scale[...],
            "post_attention_layernorm": block.mlp_norm.scale[...],
            "self_attn.q_proj": block.attention.query.kernel[...].T,
            "self_attn.k_proj": block.attention.key.kernel[...].T,
            "self_attn.v_proj": block.attention.value.kernel[...].T,
            "self_attn.o_proj": block.attention.out.kernel[...].T,
            "mlp.gate_proj": block.mlp.gate.kernel[...].T,
            "mlp.up_proj": block.mlp.up.kernel[...].T,
            "mlp.down_proj": block.mlp.down.kernel[...].T,
        }
        named |= {f"model.layers.{i}.{name}.weight": value for name, value in parts.items()}
    return {name: np.asarray(value) for name, value in named.items()}


def run_peer(arguments) -> None:
    import numpy as np
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(arguments.threads)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=D_MODEL,
            intermediate_size=D_FF,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            max_position_embeddings=LENGTH,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
            use_cache=False,
            attn_implementation="sdpa",
        )
    )
    weights = np.load(arguments.weights)
    model.load_state_dict({name: torch.from_numpy(weights[name]) for name in weights.files})
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}],
        lr=LEARNING_RATE,
        betas=(0.9, 0.95),
    )

    def step(tokens) -> float:
        ids = torch.from_numpy(tokens).long()
        targets = ids[:, 1:].contiguous()
        loss = model(input_ids=ids[:, :-1], labels=targets, shift_labels=targets).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    serve_rounds(step, arguments.steps)


class Worker:
    """One side of the comparison in its own process, which computes only when asked."""

    def __init__(self, python: str, side: str, arguments, weights: Path):
        command = [python, __file__, "--side", side, "--weights", str(weights), "--steps", str(arguments.steps)]
        command += ["--microbatches", str(arguments.microbatches), "--threads", str(arguments.threads)]
        environment = dict(os.environ)
        if side == "efftrain":
            from efftrain.recipe import HUGE_PAGES

            environment |= {"GLIBC_TUNABLES": HUGE_PAGES, "JAX_PLATFORMS": "cpu"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.read()

    def read(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a side of the comparison stopped; see its error above")
        return json.loads(line)

    def round(self) -> dict:
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self.read()


def compare(arguments) -> None:
    from efftrain.train.run.environment import cpu_name

    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.npz"
        ours = Worker(sys.executable, "efftrain", arguments, weights)
        peer = Worker(arguments.peer_python, "transformers", arguments, weights)
        results = {"efftrain": [], "transformers": []}
        for number in range(arguments.rounds):
            for name, worker in (("efftrain", ours), ("transformers", peer)):
                answer = worker.round()
                rate = arguments.steps * ROWS * LENGTH / answer["seconds"]
                results[name].append(rate)
                print(f"round {number}: {name:12} {rate:8,.0f} tokens/s, loss {answer['loss']:.5f}", flush=True)
        for worker in (ours, peer):
            worker.process.stdin.close()
            worker.process.wait()
    medians = {name: statistics.median(rates) for name, rates in results.items()}
    print(
        json.dumps(
            {
                "bench": "train_step",
                "cpu": cpu_name(),
                "cores": os.cpu_count(),
                "python": platform.python_version(),
                "efftrain_tokens_per_s": round(medians["efftrain"]),
                "transformers_tokens_per_s": round(medians["transformers"]),
                "efftrain_best": round(max(results["efftrain"])),
                "transformers_best": round(max(results["transformers"])),
                "rounds": arguments.rounds,
                "microbatches": arguments.microbatches,
                "ratio": round(medians["efftrain"] / medians["transformers"], 3),
                "goal": 1.0,
            }
        )
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that has torch and transformers")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=4, help="steps of a round")
    parser.add_argument("--microbatches", type=int, default=4)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of PyTorch; JAX uses all cores")
    parser.add_argument("--side", choices=["efftrain", "transformers"], help=argparse.SUPPRESS)
    parser.add_argument("--weights", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    {"efftrain": run_efftrain, "transformers": run_peer, None: compare}[given.side](given)
