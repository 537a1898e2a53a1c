"""Results of other code have another identity."""

import subprocess
import sys

import pytest

from efftrain import code_identity as identities
from efftrain.code_identity import code_identity, package_identity
from efftrain.config import SCRIPT_PREFIX
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
    limit: float = 0.5

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
        f"from {SCRIPT_PREFIX}essays import Shouting\nclass Louder(Shouting):\n    limit: float = 0.9\n"
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
