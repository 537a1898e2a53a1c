"""Before a training, one line says as what the model can be exported."""

import re
import time
from dataclasses import replace

import pytest

from efftrain.experiment import presets
from efftrain.interop import announce
from efftrain.interop.announce import announce_export
from efftrain.models.config import ModelConfig
from efftrain.models.decoder import abstract_decoder
from efftrain.models.depth.routed_depth import MixtureOfDepths
from efftrain.models.moe.layer import MoE
from efftrain.sharding import hosts


def changed(**fields) -> ModelConfig:
    block = replace(presets.llama_125m.pattern[0], **fields)
    return presets.llama_125m.replace(pattern=(presets.llama_125m.pattern[0], block), n_repeats=2)


def test_a_model_that_transformers_has_is_named(capfd):
    announce_export(presets.llama_125m)
    assert capfd.readouterr().err == "export: LlamaForCausalLM\n"


def test_for_a_model_that_nobody_has_the_reason_and_the_alternatives_are_said(capfd):
    announce_export(changed(depth=MixtureOfDepths()))
    assert capfd.readouterr().err == (
        "export: not possible: layer 1 has depth MixtureOfDepths, by which tokens skip or repeat layers, and no other "
        "project has an architecture for it; train with depth Full, or with early exits, which are exported or keep "
        "the run directory, which efftrain.load opens\n"
    )


def test_of_layers_that_differ_the_field_is_named_and_nothing_else(capfd):
    announce_export(changed(mlp=MoE(n_experts=4, d_expert=8)))
    said = capfd.readouterr().err
    assert re.fullmatch(
        r"export: not possible: no other project's architecture computes this model; the nearest: \w+ differs in "
        r"layers\[[01]\]\.\S+: .{1,40}; change that field before training or export a program for JAX alone "
        r"\(--format stablehlo\) or keep the run directory, which efftrain.load opens\n",
        said,
    ), said


def test_an_error_is_said_and_does_not_pass(capfd, monkeypatch):
    def fails(config):
        raise RuntimeError("a fork's own error")

    monkeypatch.setattr(announce, "classify", fails)
    announce_export(presets.llama_125m)
    assert capfd.readouterr().err == "export: not known (RuntimeError: a fork's own error)\n"


def test_of_several_processes_only_the_first_says_it(capfd, monkeypatch):
    monkeypatch.setattr(hosts, "process_index", lambda: 1)
    announce_export(presets.llama_125m)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("model", [presets.llama_125m, presets.llama_3b])
def test_it_takes_no_time_beside_the_start_of_a_run(model):
    abstract_decoder(model)  # which a run traces anyway, and which is kept
    start = time.process_time()
    announce_export(model)
    assert time.process_time() - start < 0.3  # 0.1 s on an idle core
