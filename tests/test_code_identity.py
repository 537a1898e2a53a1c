"""Results of other code have another identity."""

import functools
import subprocess
import sys

import pytest

from efftrain import code_identity as identities
from efftrain.class_names import SCRIPT_PREFIX
from efftrain.code_identity import changed_code, code_identity, package_identity
from efftrain.data.rules import Code
from efftrain.recipe import import_script

RULE = """
from dataclasses import dataclass
import numpy as np
import my_words
from efftrain.data.rules import AtMost

@dataclass(frozen=True, kw_only=True)
class Shouting(AtMost):
    name = "shouting"
    threshold: float = 0.5

    def score(self, text):
        return 0.0
"""


@pytest.fixture
def script(tmp_path, monkeypatch):
    """A script with a rule, and a module that it imports."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_words.py").write_text("WORDS = 3\n")
    (tmp_path / "essays.py").write_text(RULE)
    yield tmp_path / "essays.py"
    for name in ("my_words", SCRIPT_PREFIX + "essays"):
        sys.modules.pop(name, None)


def test_the_source_of_a_rule_and_of_what_it_imports_counts(script):
    rule = import_script(script).Shouting()
    first = code_identity([(rule,)], rooms=("data",))
    assert first.keys() == {"efftrain", "essays.py", "my_words"}
    script.write_text(RULE.replace("return 0.0", "return 1.0"))
    assert code_identity([(rule,)], rooms=("data",))["essays.py"] != first["essays.py"]
    script.write_text(RULE)
    (script.parent / "my_words.py").write_text("WORDS = 4\n")
    second = code_identity([(rule,)], rooms=("data",))
    assert second["my_words"] != first["my_words"]
    assert second["essays.py"] == first["essays.py"]


def test_a_base_class_in_another_script_counts(script, tmp_path):
    import_script(script)
    (tmp_path / "louder.py").write_text(
        f"from {SCRIPT_PREFIX}essays import Shouting\nclass Louder(Shouting):\n    threshold: float = 0.9\n"
    )
    assert code_identity(import_script(tmp_path / "louder.py").Louder()).keys() == {
        "efftrain", "louder.py", "essays.py", "my_words",
    }  # fmt: skip


def test_a_script_has_one_name_however_it_is_run(script):
    found = code_identity(import_script(script).Shouting())
    with script.open("a") as file:
        file.write("\nfrom efftrain.code_identity import code_identity\nprint(sorted(code_identity(Shouting())))\n")
    output = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True, cwd=script.parent)
    assert output.stdout.strip() == str(sorted(found))


def test_an_edit_of_the_package_counts_only_in_its_room(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "config.py").write_text("A = 1\n")
    (tmp_path / "data" / "rules.py").write_text("B = 1\n")
    monkeypatch.setattr(identities, "_PACKAGE", tmp_path)

    def identity(*rooms):
        package_identity.cache_clear()
        return package_identity(rooms)

    try:
        data, config, whole = identity("data"), identity("config"), identity()
        (tmp_path / "data" / "rules.py").write_text("B = 2\n")
        assert identity("data") != data
        assert identity("config") == config
        assert identity() != whole
    finally:
        package_identity.cache_clear()


def test_rules_of_the_package_are_no_modules_of_their_own():
    assert code_identity(Code(), rooms=("data",)).keys() == {"efftrain"}


def test_scripts_of_one_name_are_not_taken_for_each_other(tmp_path):
    """The recipes of two runs: each of their classes leads to its own source."""
    found = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "recipe.py").write_text(f"class Block:\n    NAME = '{name}'\n")
        found.append(import_script(tmp_path / name / "recipe.py").Block)
    alone = [code_identity(block)["recipe.py"] for block in found]
    (tmp_path / "two" / "recipe.py").write_text("class Block:\n    NAME = 'three'\n")
    assert code_identity(found[0])["recipe.py"] == alone[0]
    assert code_identity(found[1])["recipe.py"] not in alone
    assert code_identity(found)["recipe.py"] not in alone


def test_the_room_that_defines_a_value_takes_part():
    from efftrain.data.rules.classifier import NgramClassifier

    assert code_identity(NgramClassifier, rooms=("config",)) == code_identity(rooms=("config", "data"))
    assert code_identity(rooms=("data", "config")) == code_identity(rooms=("config", "data"))


def test_a_room_that_is_not_there_is_an_error():
    with pytest.raises(ValueError, match="no room 'dtaa'"):
        code_identity(rooms=("dtaa",))


def test_functions_in_wrappers_and_objects_that_are_called_count(script):
    script.write_text("import functools\ndef loss(x): return x\nclass Loss:\n    def __call__(self, x): return x\n")
    module = import_script(script)
    wrapped = functools.wraps(module.loss)(functools.lru_cache(module.loss))
    for value in (module, wrapped, functools.partial(module.loss, 1), module.Loss(), module.Loss().__call__):
        assert "essays.py" in code_identity(value), value


def test_what_changed_is_named():
    assert changed_code({"efftrain": "1", "a.py": "x"}, {"efftrain": "1", "a.py": "x"}) is None
    assert changed_code({"efftrain": "1", "a.py": "x"}, {"efftrain": "2", "b.py": "x"}) == "a.py, b.py, efftrain"
    assert changed_code(None, {"efftrain": "1"}) == "efftrain"
