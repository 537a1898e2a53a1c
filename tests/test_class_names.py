"""Names of configuration classes in files: they outlive the modules in which the classes are."""

import dataclasses
import importlib
import inspect
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

from efftrain.class_names import RENAMED_FIELDS, class_name, current_name, find_class, package_dataclasses
from efftrain.config import difference, from_json, to_json
from efftrain.data.loading.loader import LoaderConfig, Part, _identity
from efftrain.data.tasks.task import Example, Task
from efftrain.errors import ConfigError
from efftrain.models.config import Dense
from efftrain.recipe import import_script

WRITTEN_BY_4F30595 = {  # module -> the configurations that it had: in config.json "module:Class"
    "efftrain.compress.distill": "Distill",
    "efftrain.compress.features": "HiddenStates Relations",
    "efftrain.compress.on_policy": "OnPolicy",
    "efftrain.compress.options": "Compression",
    "efftrain.compress.recover": "Recovery",
    "efftrain.compress.shape": "Shape",
    "efftrain.compress.sparsify": "Magnitude Saliency Regrow Zeros Sparsity",
    "efftrain.compress.sparsity_schedules": "OneShot Gradual Iterative Constant Uniform ErdosRenyi Global",
    "efftrain.compress.task": "TaskLoss",
    "efftrain.compress.task_run": "Learner TaskRun",
    "efftrain.compress.task_texts": "Augmentation",
    "efftrain.compress.teacher_cache": "CacheOptions",
    "efftrain.data.classify": "NgramClassifier",
    "efftrain.data.corpus": "CorpusConfig",
    "efftrain.data.decontaminate": "EvaluationSet Decontaminate",
    "efftrain.data.huggingface_source": "HuggingFaceDataset",
    "efftrain.data.loader": "Part LoaderConfig",
    "efftrain.data.minhash": "MinHash",
    "efftrain.data.parquet_source": "Columns Parquet",
    "efftrain.data.repeated_lines": "RepeatedLines",
    "efftrain.data.rules.base": "AtMost AtLeast Between",
    "efftrain.data.rules.c4": "C4Lines LoremIpsum CurlyBrackets Sentences C4",
    "efftrain.data.rules.code": "TooShort TooLong NonText Generated LongLine LongLines FewLetters TableLike Code",
    "efftrain.data.rules.fineweb": "EndedLines ShortLines RepeatedLineChars NewlinesPerWord FineWeb",
    "efftrain.data.rules.gopher": (
        "WordCount MeanWordLength HashRatio EllipsisRatio BulletLines EllipsisLines AlphabeticWords StopWords Gopher"
    ),
    "efftrain.data.rules.language": "Language",
    "efftrain.data.rules.redact": "Redact",
    "efftrain.data.rules.repetition": (
        "DuplicateLines DuplicateParagraphs DuplicateLineChars DuplicateParagraphChars TopNgram "
        "DuplicateNgrams GopherRepetition"
    ),
    "efftrain.data.score_table": "ScoreTable",
    "efftrain.data.sources": "PythonFiles TextFolder JsonLines",
    "efftrain.data.splits": "SplitByPackage",
    "efftrain.data.task": "TaskFiles",
    "efftrain.data.tfds_source": "Tfds",
    "efftrain.data.warc_source": "Warc",
    "efftrain.measure.calibrate_depth": "Calibration",
    "efftrain.measure.experiment": "Experiment",
    "efftrain.models.config": "Attention MlpConfig Dense DepthConfig Full BlockConfig LayerDropout ModelConfig",
    "efftrain.models.early_exit": "ConfidenceExit",
    "efftrain.models.moe": "MoE",
    "efftrain.models.quantization": "QuantizationRule Quantization",
    "efftrain.models.routed_depth": "RoutedDepthConfig MixtureOfDepths Recursion",
    "efftrain.models.sampling": "Sampling",
    "efftrain.models.self_speculation": "SelfSpeculation",
    "efftrain.ops.masks": "Unstructured Blocks NofM",
    "efftrain.ops.number_formats": "Format Integer Ternary Float8",
    "efftrain.sharding.mesh": "MeshConfig",
    "efftrain.train.classifier": "ClassifierTraining",
    "efftrain.train.loop": "Training",
    "efftrain.train.objective": "SelfDistillation EarlyExitLoss",
    "efftrain.train.optimizers": "AdamW Muon",
    "efftrain.train.schedules": "WarmupStableDecay Cosine Ramp",
    "efftrain.train.watchdog": "Watchdog",
}


def test_no_two_configurations_share_a_name():
    shared = {name: modules for name, modules in package_dataclasses()[0].items() if len(modules) > 1}
    assert not shared, "rename one of them: files name them by their class alone"


def test_every_configuration_is_found_by_its_name():
    """From the sources, without importing all of the package: the same classes as Python has."""
    keyword_only, others = package_dataclasses()
    assert len(keyword_only) > 120
    for name, (module,) in keyword_only.items():
        found = getattr(importlib.import_module(module), name)
        own = inspect.get_annotations(found)
        assert all(field.kw_only for field in dataclasses.fields(found) if field.name in own)
        assert class_name(found) == name
        assert find_class(name, None) is found
    assert "Example" in others


@pytest.mark.parametrize("module", WRITTEN_BY_4F30595)
def test_a_name_of_an_earlier_version_is_found(module):
    for name in WRITTEN_BY_4F30595[module].split():
        found = find_class(f"{module}:{name}", None)
        assert dataclasses.is_dataclass(found)
        assert class_name(found) == current_name(f"{module}:{name}")


@pytest.mark.parametrize("module", WRITTEN_BY_4F30595)
def test_a_recipe_of_an_earlier_version_imports_what_it_did(module):
    """Runs keep their recipes, and a model with a block of its own is loaded by them."""
    for name in WRITTEN_BY_4F30595[module].split():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            assert getattr(importlib.import_module(module), name) is find_class(f"{module}:{name}", None)


def test_an_old_name_says_what_it_is_called_now():
    with pytest.warns(
        DeprecationWarning, match=r"efftrain\.models\.decode\.generate is now efftrain\.models\.decoding\."
    ):
        from efftrain.models.decode import generate
    from efftrain.models.decoding import generate as now

    assert generate is now.generate
    with pytest.raises(ImportError):
        from efftrain.models.decode import nothing  # noqa: F401
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("efftrain.models.nowhere")


def test_a_folder_with_the_name_of_an_old_module_has_its_modules():
    """``build`` is a function of the old module, and a module of the folder in its place."""
    program = "from efftrain.data.pipeline import build\nfrom efftrain.data import pipeline\nprint(build.__name__)"
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "efftrain.data.pipeline.build\n"


def test_a_class_keeps_its_name_where_it_moves(monkeypatch):
    """In to_json, in what is compared, and in the digests that say whether data and tasks are the same."""
    before = to_json(Dense(d_ff=8))
    monkeypatch.setitem(sys.modules, "efftrain.models.elsewhere", SimpleNamespace(__name__="efftrain.models.elsewhere"))
    monkeypatch.setattr(Dense, "__module__", "efftrain.models.elsewhere")
    assert to_json(Dense(d_ff=8)) == before == {"type": "Dense", "d_ff": 8}


def test_an_old_name_is_no_difference():
    old = {"model": {"type": "efftrain.models.config:Dense", "d_ff": 8}, "source": {"type": "mine.py:Own"}}
    new = {"model": {"type": "Dense", "d_ff": 8}, "source": {"type": "mine.py:Own"}}
    assert difference(old, new) == []
    assert difference(old["model"], {"type": "MoE", "d_ff": 8}) == ["type: 'Dense' -> 'MoE'"]
    assert difference({"kind": "efftrain.a:B"}, {"kind": "B"}) == ["kind: 'efftrain.a:B' -> 'B'"]


def test_a_class_of_a_script_is_that_of_the_script(tmp_path):
    """Also where the package has one of its name."""
    path = tmp_path / "mine.py"
    path.write_text(
        "from dataclasses import dataclass\n\n@dataclass(frozen=True, kw_only=True)\nclass Dense:\n    d_ff: int = 3\n"
    )
    own = import_script(path).Dense()
    assert to_json(own) == {"type": "mine.py:Dense", "d_ff": 3}
    assert from_json(to_json(own), script=sys.modules[type(own).__module__]) == own
    assert from_json({"type": "Dense", "d_ff": 3}) == Dense(d_ff=3)


@pytest.mark.parametrize(
    ("written", "old", "new"),
    [
        ({"type": "efftrain.data.code:TooShort", "limit": 3}, "limit", "threshold"),
        ({"type": "TextFolder", "path": "a", "package_by_folder": True}, "package_by_folder", "group_by_folder"),
        ({"type": "OnPolicy", "share": 0.25}, "share", "fraction"),
        ({"type": "Training", "steps": 9, "batch_size": 1, "length": 1, "branch": "a@3"}, "branch", "resume_from"),
    ],
)
def test_a_field_of_an_earlier_version_is_read_and_is_no_difference(written, old, new):
    now = to_json(from_json(written))
    assert now[new] == written[old]
    given = {name: now[name] for name in (*written, new) if name != old}
    assert difference(written, given) == []
    assert difference(written, given | {new: 7}) == [f"{new}: {written[old]!r} -> 7"]


def test_every_renamed_field_exists_and_no_class_has_the_old_name():
    for name, fields in RENAMED_FIELDS.items():
        names = {field.name for field in dataclasses.fields(find_class(name, None))}
        assert {*fields.values()} <= names, name
        assert not names & {*fields}, name


def test_a_script_may_use_a_name_that_a_field_had(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from dataclasses import dataclass\nfrom efftrain.data.rules.base import AtMost\n\n"
        "@dataclass(frozen=True, kw_only=True)\nclass Own(AtMost):\n    limit: int = 1\n    threshold: int = 1\n"
    )
    own = import_script(path).Own(threshold=2, limit=3)
    assert from_json(to_json(own), script=sys.modules[type(own).__module__]) == own


def test_names_that_are_none_are_refused():
    for name in ("Densse", "efftrain.models.config:Densse", "efftrain.gone.module:Densse", "Text"):
        with pytest.raises(ConfigError, match=f"names {name}, which cannot be imported"):
            find_class(name, None)


def test_positions_and_tasks_of_4f30595_are_still_those():
    """Its digests, of the same data: a run of then goes on at its place in the data."""
    corpus = SimpleNamespace(token_fingerprint="f0")
    parts = Part(path=Path("a")), Part(path=Path("a"), weight=2.0, rows=7)
    assert _identity(LoaderConfig(corpora=parts[:1]), [corpus], []) == "1f668f78bb6403e31b1ea91d6c4c4f13"
    other = LoaderConfig(corpora=parts[1:], length=16, batch_size=4, seed=3, shuffle=False)
    assert _identity(other, [corpus], []) == "d7c4ea9fbe3b47bdb0064f2e87c82112"
    examples = {"train": (Example("a", "b", 1),), "validation": (), "test": (Example("c", None, 2),)}
    task = Task(labels=("b",), unlabelled=(), removed={}, **examples)
    assert task.fingerprint == "17862914b4c557caa11f986a6b2cbf69"
