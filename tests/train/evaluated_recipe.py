"""A run whose evaluation after one of its steps lasts for ever. Started by test_evaluations.py: OUT STEP (0: none)."""

import sys
import time
from pathlib import Path

import tiny

from efftrain.recipe import exit_cleanly


def main(out: Path, step: int) -> None:
    taken = tiny.Walks()

    def evaluate(model) -> dict[str, float]:
        if taken.taken == step:
            (out / "evaluating").touch()
            while True:
                try:
                    time.sleep(0.1)
                except Exception:
                    continue  # as a library may do
        return {"bpb": float(model.head.kernel[...].sum())}

    tiny.train(out, taken, evaluate=evaluate, eval_every=2)


if __name__ == "__main__":
    with exit_cleanly():
        main(Path(sys.argv[1]), int(sys.argv[2]))
