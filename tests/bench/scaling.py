"""How work and traffic of a train step change with the number of devices, read from compiled programs.

    python tests/bench/scaling.py                 # with the extra aot; 7 minutes on 2 cores, most of it compiling
    python tests/bench/scaling.py --cpu-only      # half a minute

Part 1, fake CPU devices: one batch on 1, 2, 4 and 8 devices. Ideal: FLOPs / n, and the traffic of fsdp by formula.
Part 2, v5e slices of 4 to 256 chips: the model of ``recipes/dense.py v5e-64`` at its full depth with 8 rows a chip,
compiled ahead of time. Ideal: the same FLOPs on each chip. Bytes: those of gathers and reductions must grow as
(n - 1) / n (from 4 to 256 chips by a third), because a device has its own n-th already; nothing may grow beyond it.

Measured (jax 0.10.2, libtpu 0.0.52): FLOPs of a device are the ideal on every slice (ratio 1.0000). Divided by
(n - 1) / n, a v5e chip sends 7.3, 7.1, 6.8 and 6.8 GB on 4, 16, 64 and 256 chips: nothing grows beyond. Parameters are
split at most 16 ways, as the recipe does: split 64 ways, XLA takes all-reduces for the small shards, and a chip of 64
sends 9.7 GB.

Writes ``tests/bench/results/aot.json`` after part 2. The last line is JSON: ``ratio`` is the worst FLOPs of a device
against the ideal, ``goal`` what it may be.
"""

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()

from efftrain.measure.compiled.aot import CompiledStep, Target, compile_target, read_target
from efftrain.measure.cost.mesh_estimate import axis_traffic
from efftrain.models.config import llama
from efftrain.models.decoder import Decoder, abstract_decoder
from efftrain.sharding.mesh import MeshConfig
from efftrain.sharding.topologies import find_topology
from efftrain.train.config import Training
from efftrain.train.objectives.objective import next_token_loss

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results" / "aot.json"
SLICES = ("v5e:2x2", "v5e:4x4", "v5e:8x8", "v5e:16x16")
ROWS_PER_CHIP = 8
GOAL = 1.03


def strong_on_cpu() -> tuple[list[dict], float]:
    """One batch on more and more fake devices: rows, and the worst FLOPs against the ideal."""
    model = llama(vocab_size=512, d_model=256, n_layers=4, n_heads=8, d_ff=768, max_length=128, scan=True, remat="full")
    training = Training(steps=10, batch_size=16, length=128)
    target = Target(
        name="small", build=lambda rngs: Decoder(model, rngs=rngs), objective=next_token_loss, training=training
    )
    rows, alone = [], 0.0
    print("fake CPU devices, 16 rows of 128 tokens in all, fsdp\n")
    print(f"{'devices':>8}{'GFLOPs each':>14}{'/ ideal':>9}{'MB sent each':>14}{'fsdp formula':>14}")
    for n in (1, 2, 4, 8):
        found = compile_target(target.with_mesh(MeshConfig(fsdp=n)), find_topology(f"cpu:{n}"))
        alone = alone or found.flops
        formula = sum(axis_traffic(abstract_decoder(model), training, found.mesh).values())
        row = {
            "devices": n,
            "flops": found.flops,
            "flops_to_ideal": found.flops * n / alone,
            "sent": sum(c.sent for c in found.collectives),
            "sent_formula": formula,
        }
        rows.append(row)
        print(
            f"{n:>8}{row['flops'] / 1e9:>14.3f}{row['flops_to_ideal']:>9.4f}{row['sent'] / 1e6:>14.2f}"
            f"{formula / 1e6:>14.2f}",
            flush=True,
        )
    return rows, max(row["flops_to_ideal"] for row in rows)


def weak_on_v5e() -> tuple[list[dict], float]:
    """The same work on each chip of larger and larger slices."""
    dense = read_target(ROOT / "recipes" / "dense.py", "v5e-64")
    reports: list[CompiledStep] = []
    print(f"\nv5e, dense v5e-64, {ROWS_PER_CHIP} rows of {dense.training.length} tokens a chip, replica x fsdp\n")
    heading = (
        f"{'slice':>10}{'TFLOPs':>9}{'/ first':>9}{'GB memory':>11}{'ms':>8}{'by':>9}{'GB sent':>9}{'compile s':>11}"
    )
    print(heading, flush=True)
    for name in SLICES:
        topology = find_topology(name)
        chips = len(topology.devices)
        mesh = MeshConfig(replica=-1, fsdp=min(dense.training.mesh.fsdp, chips))
        training = replace(dense.training, batch_size=ROWS_PER_CHIP * chips, mesh=mesh)
        report = compile_target(replace(dense, training=training), topology)
        reports.append(report)
        print(
            f"{name:>10}{report.flops / 1e12:>9.2f}{report.flops / reports[0].flops:>9.4f}"
            f"{report.memory.total / 1e9:>11.2f}{report.times.step_s * 1e3:>8.0f}{report.times.dominant:>9}"
            f"{sum(c.sent for c in report.collectives) / 1e9:>9.2f}{report.compile_s:>11.0f}",
            flush=True,
        )
        for c in report.collectives[:6]:
            place = " in a loop" if c.in_loop else ""
            print(f"{'':>12}{c.kind} over {'+'.join(c.axes)}{place}, {c.count} times: {c.sent / 1e9:.3f} GB")
        for warning in report.warnings:
            print(f"{'':>12}warning: {warning}")
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(
        json.dumps({"rows_per_chip": ROWS_PER_CHIP, "reports": [r.as_json() for r in reports]}, indent=1)
    )
    rows = [
        {
            "slice": r.topology,
            "flops": r.flops,
            "sent": sum(c.sent for c in r.collectives),
            "sent_over_share": sum(c.sent for c in r.collectives) / (1 - 1 / r.devices),
        }
        for r in reports
    ]
    return rows, max(max(r.flops / reports[0].flops, reports[0].flops / r.flops) for r in reports)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu-only", action="store_true", help="part 1 alone, without libtpu")
    given = parser.parse_args()
    strong, worst = strong_on_cpu()
    result = {"bench": "scaling", "cpu": strong}
    if not given.cpu_only:
        result["v5e"], weak = weak_on_v5e()
        worst = max(worst, weak)
    print(json.dumps(result | {"ratio": round(worst, 4), "goal": GOAL}))


if __name__ == "__main__":
    main()
