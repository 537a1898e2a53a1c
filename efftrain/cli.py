"""The command ``efftrain VERB``. A verb imports what it needs when it runs, so that ``efftrain --help`` is instant."""

import itertools
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from rich.console import Console

import efftrain
from efftrain.errors import ConfigError
from efftrain.progress import write_in_any_locale
from efftrain.recipe import exit_cleanly, use_compilation_cache
from efftrain.sharding.mesh import MeshConfig

RESTARTS = "--max-restarts"


def main(args: Sequence[str] | None = None) -> None:
    """Runs one verb, or prints the version.

    An unknown verb or flag, or a mistake that the user can correct, ends with exit code 2, Ctrl-C with 130.

    Args:
      args: the command line without the program's name. None: that of the process.
    """
    write_in_any_locale()
    arguments = list(sys.argv[1:] if args is None else args)
    if arguments == ["--version"]:
        print(f"efftrain {efftrain.__version__}")
        return

    import tyro

    verbs = [tyro.conf.subcommand(f.__name__, constructor=f) for f in (report, inspect)]

    def corpus(verb: Annotated[Any, verbs[0]] | Annotated[Any, verbs[1]]) -> None:
        """Look at what a corpus was made of and what was removed from it."""

    own, recipe_arguments = _split_train(arguments)

    def train(recipe: Path, /, *, max_restarts: int = 3) -> None:
        """Run a recipe, and start it again after a crash, a kill or a preemption; it continues from its newest
        checkpoint.

        All other arguments after the recipe belong to the recipe, such as cpu and --out in: efftrain train
        recipes/dense.py cpu --out runs/dense --max-restarts 5

        Args:
          recipe: the script.
          max_restarts: give up after this many restarts in a row that brought no newer checkpoint.
        """
        from efftrain.train.supervision.supervise import supervise

        if not recipe.is_file():
            raise ConfigError(f"there is no script {recipe}; give the path of a recipe, such as recipes/dense.py")
        raise SystemExit(supervise([sys.executable, str(recipe), *recipe_arguments], max_restarts=max_restarts))

    use_compilation_cache()
    with exit_cleanly():
        tyro.extras.subcommand_cli_from_dict(
            {
                "doctor": doctor,
                "train": train,
                "aot": aot,
                "compress": compress,
                "teacher": teacher,
                "corpus": corpus,
                "calibrate-depth": calibrate_depth,
            },
            prog="efftrain",
            description=f"{efftrain.__doc__.splitlines()[0]} --version prints the version.",
            args=own,
            config=(tyro.conf.OmitSubcommandPrefixes,),
        )


def _split_train(args: list[str]) -> tuple[list[str], list[str]]:
    """Splits the arguments of ``efftrain`` from those of the recipe that ``efftrain train`` starts."""
    positional = (i for i in range(1, len(args)) if not args[i].startswith("-") and args[i - 1] != RESTARTS)
    recipe = next(positional, None)
    if args[:1] != ["train"] or recipe is None:
        return args, []
    own, words = args[: recipe + 1], iter(args[recipe + 1 :])
    rest = []
    for word in words:
        if word == RESTARTS:
            own += [word, *itertools.islice(words, 1)]
        else:
            (own if word.startswith(f"{RESTARTS}=") else rest).append(word)
    return own, rest


def report(dir: Path, /, *, out: Path | None = None) -> None:
    """Write one HTML page about a corpus that works offline: funnel, scores, near duplicates, rejects, alarms.

    Args:
      dir: the folder of the corpus.
      out: the file to write; by default NAME-report.html beside the folder.
    """
    from efftrain.data.report import write_report

    print(write_report(dir, out))


def inspect(
    dir: Path,
    /,
    *,
    rule: str | None = None,
    source: str | None = None,
    seed: int | None = None,
    limit: int | None = None,
) -> None:
    """Page through the documents that were removed from a corpus.

    Args:
      dir: the folder of the corpus.
      rule: show only documents that this rule removed.
      source: show only documents of this source.
      seed: show a random choice instead of the first documents; another seed gives another choice.
      limit: number of documents to show; by default 20 with a seed or if stdin is no terminal, otherwise all.
    """
    from efftrain.data.report.inspect import inspect_corpus

    inspect_corpus(dir, rule=rule, source=source, seed=seed, limit=limit)


def calibrate_depth(
    run: Path,
    /,
    *,
    corpus: Path | None = None,
    exits: tuple[int, ...] = (),
    drafts: tuple[int, ...] = (1, 2, 3, 4, 6),
    prompts: int = 24,
    n_new: int = 64,
    rows: int = 384,
    risk: float = 0.1,
    error: float = 0.05,
) -> None:
    """Measure how a run's model decodes with fewer layers: self-speculation, exits by confidence, mean depth.

    Leaves depth.json in the run, and figures in its scorecard. When interrupted, the same command continues.

    Args:
      run: the directory of a training run.
      corpus: corpus whose validation split is used to choose and whose test split to report; by default that of the
        run.
      exits: numbers of layers that draft; by default 1 up to half of the model's.
      drafts: lengths of a draft, in tokens.
      prompts: number of prompts that are continued, each alone.
      n_new: number of new tokens after each prompt.
      rows: rows of the validation split for the confidence curves; their choices are measured on the test split.
      risk: the share of tokens that an exit may change.
      error: the probability that it changes more.
    """
    from efftrain.measure.depth.calibrate_depth import DepthCalibration, calibrate
    from efftrain.measure.depth.depth_table import summary

    options = DepthCalibration(
        exits=exits, drafts=drafts, prompts=prompts, n_new=n_new, rows=rows, risk=risk, error=error
    )
    out = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    for table in summary(calibrate(run, options, corpus=corpus)):
        out.print(table)


def compress(
    run: Path,
    /,
    *,
    quantize: str | None = None,
    activations: str | None = None,
    cache: str | None = None,
    layers: str = "blocks/.*",
    method: Literal["nearest", "gptq", "awq", "magnitude", "wanda", "sparsegpt"] | None = None,
    budget: float | None = None,
    rows: int = 128,
    sparsity: str | None = None,
    slim: float | None = None,
    way: Literal["width", "depth", "any"] = "width",
    by: Literal["parameters", "flops", "latency"] = "parameters",
    search: int | None = None,
    recover: int = 0,
    rounds: int = 1,
    distill: bool = False,
    out: Path | None = None,
    corpus: Path | None = None,
) -> None:
    """Make a smaller model from that of a run, in a run directory of its own: fewer bits, weights, or a smaller shape.

    Such as: efftrain compress runs/dense --quantize int4:g32 --method gptq; --sparsity 0.5; --slim 0.33 --recover
    400000. When interrupted, the same command continues. Only --slim makes a model faster: JAX has no sparse products,
    neither for single zeros nor for 2:4.

    Args:
      run: the directory of a training run.
      quantize: number format of the weights: int8, int4:g32, fp8, ternary:g32, where g32 means that 32 numbers share a
        scale (by default all those of an output). By default the format that the run was trained for. With a budget:
        several, such as int8,int4:g32.
      activations: number format of the inputs of the weights, such as int8, with one scale per token; by default float.
      cache: number format of keys and values in decoding, such as int8; by default float.
      layers: a regular expression for the names of matrices, such as blocks/.*/mlp/.* or blocks/.*|embedding.
      method: to quantise: round to nearest (nearest, the default), or use the inputs on calibration text (gptq, awq).
        To prune: by size (magnitude), by size and inputs (wanda), or with compensation in the remaining weights
        (sparsegpt, the default).
      budget: bytes of the blocks' matrices as a share of float32; each layer gets the format that it can bear.
      rows: rows of calibration text, or of each trial of a budget.
      sparsity: weights that become zero: a share, such as 0.5, or 2:4. Fewer bytes on disk, no speed.
      slim: share to cut off by structured pruning, such as 0.33: the least important units, heads and channels. Faster.
      way: cut width (better quality) or depth (better latency); any: a search over both.
      by: slim is a share of the parameters, of training FLOPs, or of the time to decode one row.
      search: number of shapes to try, each trained with a tenth of the tokens of recover.
      recover: tokens of training after the cut; a twentieth to a tenth of what the run was trained on.
      rounds: number of rounds in which to cut and train, for 50 % and more.
      distill: in that training, learn from the original run instead of the text.
      out: the new run directory; by default the run's name with these options.
      corpus: corpus for calibration and training; by default that of the run.
    """
    from efftrain.compress.options import Compression
    from efftrain.compress.run import compress as compress_run
    from efftrain.measure.scorecard.scorecard import table

    options = Compression(
        quantize=quantize,
        activations=activations,
        cache=cache,
        layers=layers,
        method=method,
        budget=budget,
        rows=rows,
        sparsity=sparsity,
        slim=slim,
        way=way,
        by=by,
        search=search,
        recover=recover,
        rounds=rounds,
        distill=distill,
    )
    card = compress_run(run, options, out=out, corpus=corpus)
    Console(highlight=False, width=None if sys.stdout.isatty() else 120).print(table([card]))


def teacher(
    run: Path,
    /,
    *,
    top_k: int | None = None,
    samples: int | None = None,
    rows: int | None = None,
    split: str = "train",
    length: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
    corpus: Path | None = None,
    out: Path | None = None,
) -> None:
    """Store what a run's model predicts at every token of a corpus, so that students learn from it without running it.

    Such as: efftrain teacher runs/dense --samples 50. Up to 4 bytes per token for each probability of --top-k (6 if
    the vocabulary is over 65,536), and about 1 for each of --samples. When interrupted, the same command continues.

    Args:
      run: the directory of the teacher's run; a compressed one can teach too.
      top_k: store this many of the largest probabilities at each position, and the sum of the others; by default 64.
      samples: instead, draw this many tokens from each distribution, 255 at most: an unbiased estimate of it.
      rows: store only the first rows of the split, this many; documents are in shuffled order.
      split: split of the corpus.
      length: tokens per row; by default as in the run's training. Students train on rows of the same length.
      batch_size: rows that the teacher reads at once.
      seed: seed of the draws.
      corpus: the corpus on which the students will train; by default that of the run.
      out: the folder to write; by default the run's name with these options.
    """
    from efftrain.compress.distillation.build_teacher_cache import CacheOptions, build_cache

    options = CacheOptions(
        top_k=64 if top_k is None and samples is None else top_k,
        samples=samples,
        rows=rows,
        split=split,
        length=length,
        batch_size=batch_size,
        seed=seed,
    )
    print(build_cache(run, options, corpus=corpus, out=out))


def aot(
    recipe: Path,
    config: str | None = None,
    /,
    *,
    topology: str,
    search: bool = False,
    compile: int = 2,
    json: bool = False,
) -> None:
    """Compile a recipe's train step for a TPU slice that is not attached: memory, step time, traffic, warnings.

    Args:
      recipe: a recipe script.
      config: the name of one of its configurations; the first one by default.
      topology: such as v5e:8x8, v6e:4x4, v5p:2x2x2, v4:2x2x4, or cpu:8 to try this out.
      search: rank the mesh shapes that fit by formulas, and compile the best few.
      compile: number of mesh shapes that a search compiles.
      json: print one JSON object.
    """
    import dataclasses
    from json import dumps

    kind, _, count = topology.partition(":")
    if kind == "cpu" and count.isdigit():
        _fake_devices(int(count))
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # compiling for another machine needs no device of this one

    from efftrain.measure.compiled.aot import compile_target, read_target
    from efftrain.measure.compiled.aot_table import show, show_search
    from efftrain.measure.mesh_advisor import search as search_meshes
    from efftrain.sharding.topologies import find_topology

    found, target = find_topology(topology), read_target(recipe, config)
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


def doctor(
    *,
    recipe: Path | None = None,
    config: str | None = None,
    mesh: MeshConfig = MeshConfig(),  # noqa: B008, a frozen value
    fake_devices: int | None = None,
) -> None:
    """Show versions, devices, the mesh, and how each parameter of a model is laid out on it.

    Args:
      recipe: a recipe script whose model is laid out; a small decoder by default.
      config: the name of one of its configurations; the first one by default.
      mesh: by default that of the recipe, or else all devices along fsdp.
      fake_devices: lay out for this many devices, which the CPU simulates.
    """
    if config is not None and recipe is None:
        raise ConfigError(f"--config {config} needs the recipe it belongs to; add --recipe PATH")
    if fake_devices is not None:
        _fake_devices(fake_devices)
    from efftrain.doctor import show

    show(Console(highlight=False, width=None if sys.stdout.isatty() else 120), recipe, config, mesh)


def _fake_devices(count: int) -> None:
    if count < 1:
        raise ConfigError(f"--fake-devices is {count}; give a positive number")
    # XLA reads this once, when the first device is requested; of two such flags the last one counts.
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={count}".strip()
    os.environ["JAX_PLATFORMS"] = "cpu"


if __name__ == "__main__":
    main()
