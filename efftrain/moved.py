"""Old names of modules and classes, kept for one version because the recipes stored in runs still import them.

``efftrain.models.decode`` is imported as ``efftrain.models.decoding.generate``, and ``NofM`` as ``SemiStructured``,
with a ``DeprecationWarning``. A present module or folder with the name of an old module uses ``old_names``.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from efftrain.class_names import RENAMED, find_class
from efftrain.errors import ConfigError

# "old folder, new folder": names of modules, as ``old:new`` if the name has changed too.
_FOLDERS = {
    "compress compress.quantization": "awq mixed_precision quantize:convert",
    "compress compress.distillation": "distill features on_policy student teacher_cache:build_teacher_cache",
    "compress compress.structured": "importance shape shape_count shape_latency shapes slim:cut",
    "compress compress.layerwise": "observe:calibration pieces:layerwise_model second_order",
    "compress compress.pruning": "one_shot sparsify sparsity_schedules sparsity_state",
    "compress compress.task": "task task_run task_teach task_texts",
    "compress compress": "options:old_options text:corpus_rows",
    "data data.sources": (
        "arrow_source:arrow columns compressed cutting huggingface_source:huggingface json_source:json "
        "metadata parquet_source:parquet sources:base text_source:text tfds_source:tfds"
    ),
    "data data.dedup": (
        "canary dedup:exact exact_duplicates lsh minhash near_duplicates normalise_words:normalise "
        "repeated_lines:lines shingles verify"
    ),
    "data data.rules": "classify:classifier score_table",
    "data data.decontamination": "contamination:stages decontaminate ngram_index readings",
    "data data.storage": "encoding inputs long_texts packing shards store teacher_cache token_bytes tokenizer",
    "data data.stages": (
        "engines evidence:exclusion_log funnel:filter_statistics kept:kept_documents removals spool stages:stage"
    ),
    "data.engines data.stages.engines": "beam local",
    "data data.report": "inspect",
    "data data.loading": "loader mixture",
    "data data.tasks": "made_up_task:synthetic task task_items:items task_rows:rows",
    "data data.pipeline": "pipeline:build reading rule_scores writing",
    "data.report data.report": "alarms:alerts",
    "data data.sources.warc": "warc_members:members warc_page:page warc_records:records warc_source:source",
    "measure measure.compiled": "aot aot_table aot_traffic aot_warnings hlo hlo_products hlo_text replica_groups",
    "measure measure.depth": "calibrate_depth depth_report depth_table exit_curves risk speculation",
    "measure experiment": "compare experiment",
    "measure measure.quality": (
        "document_scores evaluate few_shot held_out probe row_documents task_scores token_classes unigram"
    ),
    "measure measure.cost": "flops latency layer_flops memory mesh_estimate parameters task_cost traced_flops",
    "measure measure": "kept:measurements",
    "measure measure.scorecard": "score scorecard",
    "models models.decoding": "decode:generate prompts sampling self_speculation unrolled",
    "models models": "depth:stack",
    "models models.depth": "depth_router early_exit routed_depth routed_tokens",
    "models models.moe": "expert_parallel moe:layer upcycle",
    "ops ops": "head_loss:fused_linear_loss masks",
    "train train": "branch:resume_from",
    "train train.metrics": "alarms:alerts metric_sink metrics_log profile recorder:metric_logger timing",
    "train train.checkpoints": "checkpoint_folder checkpoints fingerprints finite sparse_storage",
    "train train.supervision": "interruption supervise watchdog",
    "train train.objectives": "objective teacher",
    "train train.run": "run:directory run_identity:identity tokenizers",
}


def _modules() -> dict[str, str]:
    found = {}
    for folders, names in _FOLDERS.items():
        old, new = folders.split()
        for name in names.split():
            before, _, now = name.partition(":")
            found[f"{__package__}.{old}.{before}"] = f"{__package__}.{new}.{now or before}"
    return found


MODULES = _modules()
NAMES = RENAMED | {
    "By": "CountedMetric",
    "Fitted": "TrainResult",
    "Pieces": "LayerwiseModel",
    "Probe": "ExitProbe",
    "SlimReport": "StructuredPruneReport",
    "SwiGLU": "FeedForward",
    "Taught": "TeacherObjective",
    "parse_branch": "parse_resume_from",
    "quantile_limits": "quantile_thresholds",
    "slim": "structured_prune",
    "Way": "Axis",
}


def old_names(module: str) -> Callable[[str], Any]:
    """Returns the ``__getattr__`` of a module or folder that has the name of an old module, or had renamed classes."""
    where = MODULES.get(module, module)

    def get(name: str) -> Any:
        if name.startswith("__") or _is_module(f"{module}.{name}"):  # which ``from package import module`` imports
            raise AttributeError(name)
        now = vars(importlib.import_module(where))
        found = now.get(name, now.get(NAMES.get(name)))
        if found is None:
            try:
                found = find_class(name, None)  # a configuration that moved to another place than its old module
            except ConfigError:
                raise AttributeError(f"module {module!r}, now {where}, has no attribute {name!r}") from None
        home = getattr(found, "__module__", where)
        warnings.warn(
            f"{module}.{name} is now {home}.{getattr(found, '__name__', name)}; import it from there, because "
            "the next version removes the old name",
            DeprecationWarning,
            stacklevel=2,
        )
        return found

    return get


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # it would be within a module, which is no package
        return False


class _OldModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(name, self) if name in MODULES else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = types.ModuleType(spec.name, f"Now ``{MODULES[spec.name]}``.")
        vars(module)["__getattr__"] = old_names(spec.name)
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        """Does nothing: the names of the module are looked up on access."""


sys.meta_path.append(_OldModules())  # last, so that it is only asked for modules that do not exist
