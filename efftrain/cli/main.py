"""The command ``efftrain VERB``. A verb imports what it needs when it runs, so that ``efftrain --help`` is instant."""

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import efftrain
from efftrain.cli.aot import aot
from efftrain.cli.calibrate_depth import calibrate_depth
from efftrain.cli.compress import prune, quantize, structured
from efftrain.cli.corpus import inspect, report
from efftrain.cli.doctor import doctor
from efftrain.cli.export_model import export_model
from efftrain.cli.import_model import import_model
from efftrain.cli.teacher import teacher
from efftrain.compress.old_options import check_words
from efftrain.errors import ConfigError
from efftrain.progress import write_in_any_locale
from efftrain.recipe import exit_cleanly, use_compilation_cache

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

    functions = (report, inspect, quantize, prune, structured)
    of = {f.__name__: tyro.conf.subcommand(f.__name__, constructor=f) for f in functions}

    def corpus(command: Annotated[Any, of["report"]] | Annotated[Any, of["inspect"]]) -> None:
        """Show what a corpus was made of and what was removed from it."""

    def compress(
        command: Annotated[Any, of["quantize"]] | Annotated[Any, of["prune"]] | Annotated[Any, of["structured"]],
    ) -> None:
        """Make a smaller model from that of a run, in a run directory of its own: fewer bits, weights, or a smaller
        shape. Only structured makes a model faster on every device."""

    own, recipe_arguments = _split_train(arguments)

    def train(recipe: Path, /, *, max_restarts: int = 3) -> None:
        """Run a recipe, and restart it after a crash, a kill or a preemption; it continues from its newest
        checkpoint.

        All other arguments after the recipe belong to the recipe, such as cpu and --out in: efftrain train
        recipes/dense.py cpu --out runs/dense --max-restarts 5

        Args:
          recipe: the script.
          max_restarts: number of consecutive restarts without a newer checkpoint after which to give up.
        """
        from efftrain.train.supervision.supervise import supervise

        if not recipe.is_file():
            raise ConfigError(f"there is no script {recipe}; give the path of a recipe, such as recipes/dense.py")
        raise SystemExit(supervise([sys.executable, str(recipe), *recipe_arguments], max_restarts=max_restarts))

    use_compilation_cache()
    with exit_cleanly():
        if own[:1] == ["compress"]:
            check_words(own[1:])
        tyro.extras.subcommand_cli_from_dict(
            {
                "doctor": doctor,
                "import": import_model,
                "export": export_model,
                "train": train,
                "aot": aot,
                "compress": compress,
                "teacher": teacher,
                "corpus": corpus,
                "calibrate-depth": calibrate_depth,
            },
            prog="efftrain",
            description=f"{(efftrain.__doc__ or 'efftrain.').splitlines()[0]} --version prints the version.",
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
