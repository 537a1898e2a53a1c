"""What the guides show in Python can be copied: it compiles, and every name in it is imported or of the recipe."""

import ast
import builtins
import re
from pathlib import Path

import pytest

from efftrain.recipe import import_script

ROOT = Path(__file__).parent.parent
GUIDES = [ROOT / "README.md", *sorted(ROOT.glob("*/README.md")), *sorted(ROOT.glob("efftrain/*/README.md"))]
BLOCKS = [(guide, block) for guide in GUIDES for block in re.findall(r"```python\n(.*?)```", guide.read_text(), re.S)]
OF_A_RECIPE = {"cpu", "configs"}  # what is read where configurations are made
WITHIN_MAIN = {"run", "build", "model", "corpus", "batches", "training", "objective"}


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


@pytest.mark.parametrize(("guide", "block"), BLOCKS, ids=[f"{g.parent.name}-{i}" for i, (g, _) in enumerate(BLOCKS)])
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
        assert context["configs"]["squared-relu"].model.layers[0].mlp.d_ff == 1032


def test_the_guides_have_blocks():
    assert len([block for guide, block in BLOCKS if guide == ROOT / "README.md"]) >= 7
