"""What guides say can be followed: code compiles, commands and links exist, tables are those of the result files."""

import ast
import builtins
import re
import shlex
import sys
from dataclasses import fields
from functools import cache
from inspect import getsource, signature
from pathlib import Path

import pytest

from efftrain.cli.aot import aot
from efftrain.cli.calibrate_depth import calibrate_depth
from efftrain.cli.compress import prune, quantize, structured
from efftrain.cli.corpus import inspect, report
from efftrain.cli.doctor import doctor
from efftrain.cli.export_model import export_model
from efftrain.cli.import_model import import_model
from efftrain.cli.main import main
from efftrain.cli.teacher import teacher
from efftrain.measure.cost.parameters import count_parameters
from efftrain.measure.depth.calibrate_depth import DepthCalibration
from efftrain.models.decoder import abstract_decoder
from efftrain.models.quantization import matrices
from efftrain.ops.number_formats import parse_format
from efftrain.ops.quantize import group_size
from efftrain.recipe import MODEL_OF, flag_hint, import_script

ROOT = Path(__file__).parent.parent
BENCH = ROOT / "tests" / "bench"
README = ROOT / "README.md"
GUIDES = [README, *(path for folder in ("*", "efftrain/*", "tests/*") for path in sorted(ROOT.glob(f"{folder}/*.md")))]
BLOCKS = [(guide, block) for guide in GUIDES for block in re.findall(r"```python\n(.*?)```", guide.read_text(), re.S)]
OF_A_RECIPE = {"cpu", "configs"}  # what is read where configurations are made
WITHIN_MAIN = {"run", "build", "model", "corpus", "batches", "training", "objective"}
VERBS = {
    "doctor": doctor,
    "aot": aot,
    "compress quantize": quantize,
    "compress prune": prune,
    "compress structured": structured,
    "teacher": teacher,
    "calibrate-depth": calibrate_depth,
    "export": export_model,
    "import": import_model,
    "corpus report": report,
    "corpus inspect": inspect,
}


def name(guide):
    return str(guide.relative_to(ROOT))


def names(tree, kind):
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, kind)}


def bound(tree):
    found = names(tree, ast.Store)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.arg):
            found.add(node.arg)
        if isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
    return found


@pytest.mark.parametrize(("guide", "block"), BLOCKS, ids=[f"{name(g)}-{i}" for i, (g, _) in enumerate(BLOCKS)])
def test_every_name_of_a_block_is_imported_and_what_makes_configurations_runs(guide, block):
    tree = ast.parse(block)
    free = names(tree, ast.Load) - bound(tree) - set(dir(builtins)) - {"__file__"}
    assert free <= OF_A_RECIPE | WITHIN_MAIN, f"{guide} uses {free} without an import"
    context = {"__name__": "guide"}
    if free <= OF_A_RECIPE:
        configs = import_script(ROOT / "recipes" / "dense.py").configs
        context |= {"cpu": configs["cpu"], "configs": dict(configs)}
        whole = tree
    else:  # the imports alone: what follows them trains
        whole = ast.Module([node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], [])
    exec(compile(whole, str(guide), "exec"), context)
    if "squared-relu" in context.get("configs", ()):
        forked = context["configs"]["squared-relu"].model
        assert forked.layers[0].mlp.d_ff == 1056
        assert count_parameters(abstract_decoder(forked)).total > 0


def test_the_formats_of_the_readme_fit_the_run_of_the_readme():
    model = abstract_decoder(import_script(ROOT / "recipes" / "dense.py").configs["cpu"].model)
    formats = set(re.findall(r"--weights ([a-z0-9:]+)", README.read_text()))
    assert "int4:g32" in formats
    for _, module, name in matrices(model):
        matrix = getattr(module, name)
        for format in formats:
            group_size(matrix.shape[matrix.get_metadata()["contraction"]], parse_format(format))


def test_every_guide_that_shows_code_is_covered():
    shown = {name(guide) for guide, _ in BLOCKS}
    techniques = {
        f"recipes/{guide}.md" for guide in ("moe", "adaptive-depth", "quantization", "pruning", "distillation")
    }
    assert shown >= {"README.md", "data/README.md", *techniques}
    assert {"tests/bench/README.md", "efftrain/README.md", "efftrain/sharding/README.md"} <= set(map(name, GUIDES))


def test_the_readme_is_two_pages():
    text = README.read_text()
    assert len(text.split()) <= 900
    assert text.count("\n| --- |") <= 3


# Links


def anchors(guide):
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", guide.read_text(), flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("guide", GUIDES, ids=name)
def test_links_lead_to_files_and_headings(guide):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", guide.read_text(), flags=re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (guide.parent / path).resolve() if path else guide
        assert target.exists(), f"{name(guide)} links to {link}, which is not there"
        assert not anchor or anchor in anchors(target), f"{name(guide)} links to {link}: no such heading"


# Commands


FENCE = re.compile(r"```(\w*)\n(.*?)```", re.S)
COMMAND = re.compile(r"(?:\S*python3? )?(?!-)\S+\.py\b|efftrain [a-z]|tpu/\w+\.sh|(?:bash|sbatch) .*\.sbatch")


def commands(guide):
    """Every command that a guide shows in a block or inside of a sentence, without its comment."""
    text = guide.read_text()
    blocks = [block for language, block in FENCE.findall(text) if not language]
    text = FENCE.sub("", text)
    blocks += re.findall(r"(?:^    .+\n)+", text, re.M)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    for line in lines + re.findall(r"`([^`\n]+ [^`\n]+)`", text):
        for part in re.split(r" && | -- |\s# ", line.strip()):
            if COMMAND.match(part.strip()):
                yield part.strip()


COMMANDS = sorted({(name(guide), command) for guide in GUIDES for command in commands(guide)})


def flags(words):
    return [word.partition("=")[0] for word in words if word.startswith("--")]


@cache
def configurations(script):
    return import_script(ROOT / script).configs


def check_script(script, words):
    path = ROOT / script
    assert path.is_file(), f"there is no {script}"
    if path.parent.name != "recipes":
        text = path.read_text()
        unknown = [
            flag for flag in flags(words) if flag not in text and not re.search(rf"^    {field(flag)}\b", text, re.M)
        ]
    else:
        configs = configurations(script)
        named = words[0] if words and not words[0].startswith("--") else next(iter(configs))
        if named == "NAME":
            named = next(iter(configs))
        assert named in configs, f"{script} has no configuration {named}"
        given = [flag for flag in flags(words) if flag != f"--{MODEL_OF}" or not hasattr(configs[named], "for_flags")]
        hints = [flag_hint(configs[named], flag) for flag in given]
        unknown = [hint for hint in hints if hint] + [flag for flag in given if not leads(configs[named], flag)]
    assert not unknown, unknown


def field(flag):
    return flag.removeprefix("--").replace("-", "_").removeprefix("no_")


def leads(config, flag):
    """Whether each group of a dotted flag is a field; ``flag_hint`` judges the last part."""
    for group in field(flag).split(".")[:-1]:
        if not hasattr(config, group):
            return False
        config = getattr(config, group)
    return flag == "--help" or hasattr(config, field(flag).split(".")[-1]) or config is None


def check_verb(words):
    verb = next((verb for verb in (words[0], " ".join(words[:2])) if verb in VERBS), None)
    if words[0] == "train":
        recipe = next((word for word in words[1:] if word.endswith(".py")), None)
        if recipe is None:
            return
        at = words.index(recipe)
        check_script(recipe, [word for word in words[at + 1 :] if word != "--max-restarts" and not word.isdigit()])
        return
    if len(words) == 1 and any(verb.startswith(f"{words[0]} ") for verb in VERBS):
        return  # all of its subcommands
    assert verb, f"efftrain has no verb {' '.join(words[:2])}"
    known = {f"--{parameter.replace('_', '-')}" for parameter in signature(VERBS[verb]).parameters}
    assert set(flags(words)) <= known | {"--help"}, f"efftrain {verb} has no {set(flags(words)) - known}"


@pytest.mark.parametrize(("guide", "command"), COMMANDS, ids=[f"{g}: {c[:60]}" for g, c in COMMANDS])
def test_commands_name_scripts_verbs_and_flags_that_exist(guide, command):
    words = shlex.split(command)
    if words[0] == "efftrain":
        check_verb(words[1:])
    elif words[0].startswith("tpu/"):
        text = (ROOT / words[0]).read_text() + (ROOT / "tpu" / "common.sh").read_text()
        assert [flag for flag in flags(words) if flag not in text] == []
    elif "sbatch" in command:
        assert (ROOT / next(word for word in words if word.endswith(".sbatch"))).is_file()
    else:
        script, *words = words if words[0].endswith(".py") else words[1:]
        if script not in OF_THE_READER:
            check_script(script, words)


OF_THE_READER = {"recipes/my_dense.py"}  # what a guide tells the reader to write


def test_verbs_are_those_of_the_command_line():
    """The list above is that of ``efftrain --help``."""
    text = getsource(main)
    assert {verb.split()[0] for verb in VERBS} | {"train"} == set(
        re.findall(r'^                "([a-z-]+)":', text, re.M)
    )


def test_calibrate_depth_has_the_defaults_of_its_options():
    flags = signature(calibrate_depth).parameters
    defaults = {field.name: field.default for field in fields(DepthCalibration)}
    assert {name: flag.default for name, flag in flags.items() if name in defaults} == {
        name: default for name, default in defaults.items() if name in flags
    }
    assert len(defaults.keys() & flags.keys()) == 8


def test_every_benchmark_is_in_its_guide():
    text = (BENCH / "README.md").read_text()
    scripts = {path.name for path in BENCH.glob("*.py") if "__main__" in path.read_text()}
    assert [script for script in sorted(scripts) if f"python tests/bench/{script}" not in text] == []


# Generated parts


@pytest.fixture(scope="module")
def bench():
    """The modules that generate, which import one another as scripts do."""
    sys.path.insert(0, str(BENCH))
    try:
        import pareto
        import tables

        yield tables, pareto
    finally:
        sys.path.remove(str(BENCH))


@pytest.mark.parametrize("guide", GUIDES, ids=name)
def test_generated_parts_are_those_of_the_result_files(guide, bench):
    tables, _ = bench
    assert tables.generate(guide) == guide.read_text(), "run: python tests/bench/tables.py"


def test_every_table_is_in_a_guide_that_is_generated(bench):
    tables, _ = bench
    markers = [(guide, table) for guide in GUIDES for table in re.findall(r"<!-- table: (\w+) -->", guide.read_text())]
    assert sorted(table for _, table in markers) == sorted(tables.TABLES)
    assert {guide for guide, _ in markers} <= set(tables.GUIDES)


def test_rows_that_rest_on_a_mended_fault_have_their_dagger(bench):
    tables, _ = bench
    everything = "".join(guide.read_text() for guide in GUIDES)
    for table, rows in tables.DAGGERS.items():
        part = re.search(rf"<!-- table: {table} -->(.*?)<!-- end -->", everything, re.S).group(1)
        assert [row for row in rows if f"\n| {row}† |" not in part] == [], table


def test_the_picture_is_that_of_the_result_files(bench):
    _, pareto = bench
    assert pareto.FILE.read_text() == pareto.draw(), "run: python tests/bench/pareto.py"


def test_the_picture_shows_as_a_front_what_nothing_else_beats(bench):
    _, pareto = bench
    points = [
        pareto.Point(label, flops, [bits], "equal")
        for label, flops, bits in (("a", 1, 0), ("b", 0.5, 3), ("c", 0.7, 4))
    ]
    assert [point.label for point in pareto.front(points)] == ["b", "a"]
