"""``efftrain aot``."""

import os
import sys
from pathlib import Path

from rich.console import Console

from efftrain.cli.fake_devices import fake_devices


def aot(
    recipe: Path,
    config: str | None = None,
    /,
    *,
    topology: str,
    model_of: Path | None = None,
    search: bool = False,
    compile: int = 2,
    json: bool = False,
) -> None:
    """Compile a recipe's train step for a TPU slice that is not attached: memory, step time, traffic, warnings.

    Args:
      recipe: a recipe script.
      config: the name of one of its configurations; the first one by default.
      topology: the TPU slice, such as v5e:8x8, v6e:4x4, v5p:2x2x2, v4:2x2x4, or cpu:8 to try this out.
      model_of: a run, such as an imported one, whose model is compiled instead of the configuration's.
      search: rank the mesh shapes that fit by formulas, and compile the best few.
      compile: number of mesh shapes that a search compiles.
      json: print one JSON object.
    """
    import dataclasses
    from json import dumps

    kind, _, count = topology.partition(":")
    if kind == "cpu" and count.isdigit():
        fake_devices(int(count))
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # compiling for another machine needs no device of this one

    from efftrain.measure.compiled.aot import compile_target, read_target
    from efftrain.measure.compiled.aot_table import show, show_search
    from efftrain.measure.mesh_advisor import search as search_meshes
    from efftrain.sharding.topologies import find_topology

    found, target = find_topology(topology), read_target(recipe, config, model_of=model_of)
    ranked, reports = search_meshes(target, found, n_compiled=compile) if search else ([], [])
    if not search:
        reports = [compile_target(target, found)]
    if json:
        plain = [dataclasses.asdict(e) for e in ranked]
        print(dumps({"meshes": plain, "reports": [r.as_json() for r in reports]} if search else reports[0].as_json()))
        return
    out = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    if search:
        show_search(ranked, out)
    for report in reports:
        out.print()
        show(report, out)
