"""Configurations to JSON and back."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from efftrain.config import difference, digest, from_json, to_json
from efftrain.errors import ConfigError
from efftrain.models.config import Attention, BlockConfig, Dense, ModelConfig


@dataclass(frozen=True)
class Fixed:
    rate: float = 0.1


@dataclass(frozen=True)
class Decay:
    rate: float
    steps: tuple[int, ...] = (10, 20)


@dataclass(frozen=True)
class Recipe:
    model: ModelConfig
    out: Path
    schedule: Fixed | Decay
    resume: Path | None = None
    betas: tuple[float, float] = (0.9, 0.95)
    stages: tuple[Fixed | Decay, ...] = ()
    mixture: dict[str, float] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    seed: int | None = None


@dataclass(frozen=True)
class Collections:
    pairs: tuple[tuple[str, float], ...]
    files: tuple[Path, ...]
    by_name: dict[str, tuple[int, int]]
    home: dict[str, Path]


BLOCKS = tuple(
    BlockConfig(
        attention=Attention(n_heads=4, n_kv_heads=2, d_head=8, window=window, qk_norm=window is None),
        mlp=Dense(d_ff=32),
    )
    for window in (None, 16)
)
MODEL = ModelConfig(vocab_size=64, d_model=32, pattern=BLOCKS, n_repeats=3, max_length=128, remat="dots")


def through_json(value):
    return from_json(json.loads(json.dumps(to_json(value))))


@pytest.mark.smoke
def test_a_model_survives():
    assert through_json(MODEL) == MODEL
    assert hash(through_json(MODEL)) == hash(MODEL)  # the pattern is a tuple again


def test_a_nested_configuration_survives_with_its_types():
    recipe = Recipe(
        model=MODEL,
        out=Path("runs/a"),
        schedule=Decay(rate=3e-4),
        resume=Path("/b"),
        stages=(Fixed(), Decay(rate=0.5, steps=())),
        mixture={"code": 0.75, "prose": 0.25},
        names=["x", "y"],
    )
    back = through_json(recipe)
    assert back == recipe
    assert isinstance(back.resume, Path)
    assert isinstance(back.names, list)


def test_collections_of_collections_survive():
    value = Collections(
        pairs=(("a", 0.5), ("b", 1.5)),
        files=(Path("x"), Path("y/z")),
        by_name={"n": (1, 2)},
        home={"here": Path("w")},
    )
    assert through_json(value) == value


def test_defaults_are_written_too():
    """A file made today means the same after a default has changed."""
    assert to_json(Fixed()) == {"type": "test_config:Fixed", "rate": 0.1}
    assert from_json({"type": "test_config:Fixed", "rate": 0.25}) == Fixed(rate=0.25)


def test_an_unknown_field_is_refused():
    written = to_json(MODEL) | {"n_expertz": 4}
    with pytest.raises(ConfigError, match=r"ModelConfig has no field 'n_expertz'"):
        from_json(written)


def test_a_missing_field_is_refused():
    """Written before the field existed; it has no default."""
    with pytest.raises(ConfigError, match=r"test_config:Decay.*'?rate'?"):
        from_json({"type": "test_config:Decay"})


@pytest.mark.parametrize("name", ["efftrain.models.config:Sparse", "no_such_module:X", "gone.py:X"])
def test_an_unknown_class_is_refused(name):
    written = json.loads(json.dumps(to_json(MODEL)))
    written["pattern"][1]["mlp"]["type"] = name
    with pytest.raises(ConfigError, match=rf"config.json names {name}, which cannot be imported"):
        from_json(written)


def test_only_dataclasses_are_built():
    with pytest.raises(ConfigError, match=r"names os:system, which is not a dataclass"):
        from_json({"type": "os:system", "command": "true"})


def test_an_impossible_value_in_the_file_is_refused_as_it_is_in_python():
    written = to_json(MODEL) | {"n_repeats": 0}
    with pytest.raises(ConfigError, match=r"model.n_repeats is 0"):
        from_json(written)


def test_a_function_cannot_be_written():
    with pytest.raises(ConfigError, match=r"cannot be written to config.json; wrap the choice in a frozen dataclass"):
        to_json(Fixed(rate=max))


def test_the_digest_is_that_of_the_content():
    assert digest(MODEL) == digest(through_json(MODEL))
    assert digest(MODEL) != digest(MODEL.replace(scan=True))
    assert digest(Fixed(0.1)) != digest(Decay(0.1, steps=()))  # another class with the same field
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})


def test_differences_are_named_by_their_path():
    changed = MODEL.replace(
        d_model=64, pattern=(BLOCKS[0], BlockConfig(attention=BLOCKS[1].attention, mlp=Dense(d_ff=48)))
    )
    lines = difference(to_json(MODEL), to_json(changed))
    assert lines == ["d_model: 32 -> 64", "pattern[1].mlp.d_ff: 32 -> 48"]
    assert difference(to_json(MODEL), to_json(MODEL)) == []
    assert difference({"a": 1}, {"b": 1}) == ["a: 1 -> None", "b: None -> 1"]
