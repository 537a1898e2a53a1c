"""The commands of ``efftrain compress``: combinations that are refused, names of new runs, and rounds."""

import pytest

from efftrain.cli import compress as command_line
from efftrain.compress.commands.prune import Prune
from efftrain.compress.commands.quantize import Quantize
from efftrain.compress.commands.recovery_training import RecoveryTraining
from efftrain.compress.commands.structured_prune import StructuredPrune
from efftrain.config import from_json, to_json
from efftrain.errors import ConfigError

ONE, TWO = (RecoveryTraining(tokens=4096, rounds=rounds) for rounds in (1, 2))
NEEDED = {Quantize: {}, Prune: {"sparsity": "0.5"}, StructuredPrune: {"ratio": 0.3}, RecoveryTraining: {"tokens": 4096}}
ALL_WEIGHTS = "--budget is for the weights of all blocks; remove --activations and --layers"
SEVERAL = {"weights": "int8,int4", "budget": 0.2}
REFUSED = [
    (Quantize, {"rows": 0}, "--rows is 0; give at least 1"),
    (Quantize, {"method": "nearest"}, "--method is nearest; use one of rtn, gptq, awq"),
    (Quantize, {"method": "wanda"}, "--method is wanda; use one of rtn, gptq, awq"),
    (Quantize, {"weights": "int3"}, "'int3' is not a number format"),
    (Quantize, {"weights": "int8", "activations": "int3"}, "'int3' is not a number format"),
    (Quantize, {"cache": "int8:g4"}, "quantization: the cache has one scale for each token and head"),
    (Quantize, SEVERAL | {"budget": 1.5}, "--budget is 1.5; give a share between 0 and 1"),
    (Quantize, {"weights": "int8", "budget": 0.2}, "--budget chooses between formats; give several"),
    (Quantize, {"budget": 0.2}, "--budget chooses between formats; give several"),
    (Quantize, SEVERAL | {"activations": "int8"}, ALL_WEIGHTS),
    (Quantize, SEVERAL | {"layers": "head"}, ALL_WEIGHTS),
    (Quantize, {"weights": "int8,int4"}, "--weights is int8,int4; give one format, or a --budget to choose by"),
    (Quantize, {"layers": "head"}, "--layers is given without a number format; add --weights or --activations"),
    (Prune, {"rows": 0}, "--rows is 0; give at least 1"),
    (Prune, {"sparsity": "half"}, "--sparsity is 'half'; give a share such as 0.5, or 2:4"),
    (Prune, {"sparsity": "2:x"}, "--sparsity is '2:x'; give a share such as 0.5, or 2:4"),
    (Prune, {"sparsity": "1.5"}, "sparsity is 1.5; it is the share of weights to remove"),
    (Prune, {"method": "gptq"}, "--method is gptq; use one of magnitude, wanda, sparsegpt"),
    (Prune, {"weights": "int3"}, "'int3' is not a number format"),
    (Prune, {"weights": "int8", "method": "wanda"}, "--weights and --activations need --method sparsegpt"),
    (Prune, {"activations": "int8", "method": "magnitude"}, "--weights and --activations need --method sparsegpt"),
    (Prune, {"weights": "int8", "recovery": ONE}, "--recovery-tokens trains float weights; remove --weights"),
    (Prune, {"sparsity": "2:4", "recovery": TWO}, "--sparsity 2:4 is reached in one round; remove --rounds"),
    (StructuredPrune, {"rows": 0}, "--rows is 0; give at least 1"),
    (StructuredPrune, {"ratio": 1.2}, "--ratio is 1.2; give the share to remove, between 0 and 1"),
    (StructuredPrune, {"ratio": 0.0}, "--ratio is 0.0; give the share to remove, between 0 and 1"),
    (StructuredPrune, {"axis": "height"}, "--axis is height; use one of width, depth, any"),
    (StructuredPrune, {"metric": "bytes"}, "--metric is bytes; use one of parameters, flops, latency"),
    (StructuredPrune, {"axis": "any"}, "--axis any needs a search over shapes; add --search 4 and --recovery-tokens"),
    (StructuredPrune, {"search": 1, "recovery": ONE}, "--search is 1; give 2 shapes or more"),
    (StructuredPrune, {"search": 4}, "--search trains each shape; add --recovery-tokens"),
    (RecoveryTraining, {"tokens": 0}, "--recovery-tokens is 0; give at least 1, or remove the flag"),
    (RecoveryTraining, {"rounds": 0}, "--rounds is 0; give at least 1"),
]


@pytest.mark.parametrize(("command", "changes", "message"), REFUSED)
@pytest.mark.smoke
def test_an_option_or_a_combination_is_refused_in_one_sentence(command, changes, message):
    with pytest.raises(ConfigError) as error:
        command(**NEEDED[command] | changes)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("command", ["prune", "structured"])
@pytest.mark.parametrize(("flag", "value"), [("distill", True), ("rounds", 2)])
def test_flags_of_recovery_need_its_tokens(command, flag, value, tmp_path):
    needed = {"prune": {"sparsity": "0.5"}, "structured": {"ratio": 0.3}}[command]
    with pytest.raises(ConfigError, match=rf"^--{flag} .*; add --recovery-tokens with a number of tokens$"):
        getattr(command_line, command)(tmp_path, **needed, **{flag: value})


NAMES = {
    "stored": Quantize(),
    "int4g32-gptq": Quantize(weights="int4:g32", method="gptq"),
    "int8-a-int8-kv-int8": Quantize(weights="int8", activations="int8", cache="int8"),
    "int8-int4g32-0.2x": Quantize(weights="int8,int4:g32", budget=0.2),
    "sparse0.5": Prune(sparsity="0.5"),
    "sparse2of4-int4g32": Prune(sparsity="2:4", weights="int4:g32"),
    "sparse0.5-magnitude-r4096-2rounds": Prune(sparsity="0.5", method="magnitude", recovery=TWO),
    "structured0.33-r4096": StructuredPrune(ratio=0.33, recovery=ONE),
    "structured0.3-any-latency-search4-r9-distilled": StructuredPrune(
        ratio=0.3, axis="any", metric="latency", search=4, recovery=RecoveryTraining(tokens=9, distill=True)
    ),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_new_run_is_named_by_its_options_and_they_are_read_back(name):
    assert NAMES[name].name == name
    assert from_json(to_json(NAMES[name])) == NAMES[name]


def test_every_round_removes_the_same_share_of_what_is_left():
    three = RecoveryTraining(tokens=4096, rounds=3)
    pruned = [float(Prune(sparsity="0.488", recovery=three).in_round(n).sparsity) for n in (1, 2, 3)]
    assert pruned == pytest.approx([1 - 0.8, 1 - 0.8**2, 1 - 0.8**3])
    once = [StructuredPrune(ratio=0.488, axis="depth", recovery=three).in_round(n) for n in (1, 2, 3)]
    assert [each.ratio for each in once] == pytest.approx([0.2] * 3)
    assert {(each.axis, each.recovery) for each in once} == {("depth", None)}
    alone = StructuredPrune(ratio=0.3, axis="any", search=2, recovery=ONE).in_round(1)
    assert (alone.ratio, alone.search, alone.recovery) == (0.3, None, None)
