"""What saving costs: a training step of the dense `cpu` configuration with and without a checkpoint being written.

    python tests/bench/checkpoint.py

One run with the shared loop, the recipe's model, optimizer and batch, random tokens, no evaluation. It saves every 20
steps. The 10 steps behind a save (with the time that the loop waits for it, and the background writing beside them)
stand against the 10 steps before the next one, so that windows with and without a save alternate. The median difference
is the cost of one save; the ratio is that of 50 steps with one save to 50 steps without.
The same in seconds of the processor (``cpu_ratio``), which others who use the machine disturb less.
Goal: ratio <= 1.05.
"""

import argparse
import dataclasses
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

WINDOW, EVERY = 10, 50
ROOT = Path(__file__).parents[2]


class RandomTokens:
    """Batches of the configuration's shape without a corpus."""

    def __init__(self, rows: int, length: int, vocabulary: int):
        self.taken, self._shape, self._vocabulary = 0, (rows, length + 1), vocabulary
        self.processor_s: list[float] = []  # of the whole process, when it asked for each batch

    def __next__(self):
        import numpy as np

        self.processor_s.append(time.process_time())
        self.taken += 1
        tokens = (np.random.default_rng(self.taken).zipf(1.3, self._shape) % self._vocabulary).astype(np.int32)
        ones = np.ones_like(tokens[:, 1:])
        positions = np.broadcast_to(np.arange(ones.shape[1], dtype=np.int32), ones.shape)
        return {
            "tokens": tokens[:, :-1],
            "targets": tokens[:, 1:],
            "segments": ones,
            "positions": positions,
            "mask": ones.astype(bool),
        }

    def get_state(self):
        return {"taken": self.taken}

    def set_state(self, state):
        self.taken = state["taken"]


def train(rounds: int, out: Path) -> tuple[list[dict], list[float]]:
    """The rows of the run's metrics, and the processor's seconds of the steps before each."""
    from efftrain.models.decoder import Decoder
    from efftrain.recipe import import_script
    from efftrain.train.loop import fit
    from efftrain.train.metrics.metrics_log import read_metrics
    from efftrain.train.objectives.objective import next_token_loss
    from efftrain.train.run.directory import Run

    config = import_script(ROOT / "recipes" / "dense.py").configs["cpu"]
    period = 2 * WINDOW
    training = dataclasses.replace(
        config.training, steps=period * (rounds + 1), checkpoint_every=period, eval_every=None
    )
    config = dataclasses.replace(config, training=training)
    batches = RandomTokens(training.batch_size, training.length, config.model.vocab_size)
    fit(lambda rngs: Decoder(config.model, rngs=rngs), next_token_loss, batches, training, Run(out, config))
    return read_metrics(out), batches.processor_s


def seconds(row: dict) -> float:
    return sum(row.get(name, 0.0) for name in ("input_wait_s", "compute_s", "checkpoint_s"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()

    from efftrain.recipe import restart_with_huge_pages, use_compilation_cache
    from efftrain.train.run.environment import cpu_name

    use_compilation_cache()
    restart_with_huge_pages()
    with tempfile.TemporaryDirectory() as folder:
        rows, processor_s = train(arguments.rounds, Path(folder) / "run")
        state_bytes = sum(f.stat().st_size for f in (Path(folder) / "run" / "checkpoints").rglob("*") if f.is_file())
        n_kept = len(list((Path(folder) / "run" / "checkpoints").iterdir()))
    costs, waits, quiet_steps, cpu_costs, cpu_quiet = [], [], [], [], []
    for number in range(1, arguments.rounds + 1):
        first = 2 * WINDOW * number  # rows count from 0: this one follows the save
        saving, quiet = rows[first : first + WINDOW], rows[first + WINDOW : first + 2 * WINDOW]
        costs.append(sum(map(seconds, saving)) - sum(map(seconds, quiet)))
        waits.append(saving[0]["checkpoint_s"])
        quiet_steps += [seconds(row) for row in quiet]
        # Batch i is asked for when the save behind step i - 1 has returned: its cost is in the window before.
        start, middle, end = (processor_s[i] for i in (first - 1, first + WINDOW - 1, first + 2 * WINDOW - 1))
        cpu_costs.append((middle - start) - (end - middle))
        cpu_quiet.append((end - middle) / WINDOW)
        print(
            f"round {number}: a save costs {costs[-1]:6.2f} s, of which the loop waits {waits[-1]:.2f} s; "
            f"{cpu_costs[-1]:6.2f} s of the processor",
            flush=True,
        )
    step_s, cost_s = statistics.median(quiet_steps), statistics.median(costs)
    cpu_step_s, cpu_cost_s = statistics.median(cpu_quiet), statistics.median(cpu_costs)
    print(
        json.dumps(
            {
                "bench": "checkpoint",
                "cpu": cpu_name(),
                "cores": os.cpu_count(),
                "load": round(os.getloadavg()[0], 2),
                "python": platform.python_version(),
                "step_s": round(step_s, 4),
                "save_cost_s": round(cost_s, 3),
                "save_cost_range_s": [round(min(costs), 3), round(max(costs), 3)],
                "save_wait_s": round(statistics.median(waits), 3),
                "checkpoint_megabytes": round(state_bytes / n_kept / 1e6, 1),
                "step_processor_s": round(cpu_step_s, 4),
                "save_cost_processor_s": round(cpu_cost_s, 3),
                "cpu_ratio": round(1 + cpu_cost_s / (EVERY * cpu_step_s), 4),
                "rounds": arguments.rounds,
                "every": EVERY,
                "ratio": round(1 + cost_s / (EVERY * step_s), 4),
                "goal": 1.05,
            }
        )
    )


if __name__ == "__main__":
    main()
