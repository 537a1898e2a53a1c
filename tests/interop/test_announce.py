"""Before a training, one line says as what the model can be exported."""

import time
from dataclasses import replace

import pytest

from efftrain.experiment import presets
from efftrain.interop import announce
from efftrain.interop.announce import announce_export
from efftrain.models.config import ModelConfig
from efftrain.models.decoder import abstract_decoder
from efftrain.models.depth.routed_depth import MixtureOfDepths
from efftrain.sharding import hosts


def changed(**fields) -> ModelConfig:
    block = replace(presets.llama_125m.pattern[0], **fields)
    return presets.llama_125m.replace(pattern=(presets.llama_125m.pattern[0], block), n_repeats=2)


def test_a_model_that_transformers_has_is_named(capfd):
    announce_export(presets.llama_125m)
    assert capfd.readouterr().err == "export: LlamaForCausalLM\n"


def test_for_a_model_that_nobody_has_the_reason_and_the_alternatives_are_said(capfd):
    announce_export(changed(depth=MixtureOfDepths()))
    said = capfd.readouterr().err
    assert said.startswith("export: not possible: ")
    assert "MixtureOfDepths" in said
    assert said.endswith("; change that field before training or keep the run directory, which efftrain.load opens\n")
    assert said.count("\n") == 1


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
    start = time.perf_counter()
    announce_export(model)
    assert time.perf_counter() - start < 0.2
