"""The command line of ``efftrain compress`` before it had subcommands is answered with that of today."""

import pytest

from efftrain.cli.main import main
from efftrain.compress.old_options import check_words
from efftrain.errors import ConfigError

ANSWERS = {
    "RUN --quantize int4:g32 --method gptq": "quantize RUN --weights int4:g32 --method gptq",
    "RUN --quantize=int8 --activations fp8 --cache int8": "quantize RUN --weights=int8 --activations fp8 --cache int8",
    "RUN --quantize int8,int4 --budget 0.2 --rows 8": "quantize RUN --weights int8,int4 --budget 0.2 --rows 8",
    "RUN --method nearest": "quantize RUN --method rtn",
    "RUN --method=nearest --layers blocks/.*": "quantize RUN --method=rtn --layers 'blocks/.*'",
    "RUN --out small --corpus text": "quantize RUN --out small --corpus text",
    "--sparsity 2:4 RUN --quantize int8": "prune --sparsity 2:4 RUN --weights int8",
    "RUN --sparsity 0.5 --recover 400000 --rounds 3": "prune RUN --sparsity 0.5 --recovery-tokens 400000 --rounds 3",
    "RUN --slim 0.33 --recover 400000 --distill": "structured RUN --ratio 0.33 --recovery-tokens 400000 --distill",
    "RUN --slim 0.3 --by latency --way any --search 4": (
        "structured RUN --ratio 0.3 --metric latency --axis any --search 4"
    ),
    "RUN --way depth": "structured RUN --axis depth",
    "structured RUN --slim 0.33": "structured RUN --ratio 0.33",
    "prune RUN --sparsity 0.5 --recover=9": "prune RUN --sparsity 0.5 --recovery-tokens=9",
    "quantize RUN --method nearest": "quantize RUN --method rtn",
    "quantize RUN --quantize int8": "quantize RUN --weights int8",
}


@pytest.mark.parametrize("words", ANSWERS)
def test_flags_of_before_are_answered_with_the_command_of_today(words):
    with pytest.raises(ConfigError) as error:
        check_words(words.split())
    expected = f"the options of efftrain compress have changed; run: efftrain compress {ANSWERS[words]}"
    assert str(error.value) == expected


def test_a_run_without_flags_is_answered_too(tmp_path):
    with pytest.raises(ConfigError, match=f"run: efftrain compress quantize {tmp_path}$"):
        check_words([str(tmp_path)])


@pytest.mark.parametrize(
    "words", ["", "--help", "quantise", "runs/nowhere", "structured --help", "quantize RUN --method rtn", "prune RUN"]
)
def test_other_words_are_left_to_the_parser(words):
    check_words(words.split())


def test_the_command_ends_with_the_answer_and_code_2(capfd):
    with pytest.raises(SystemExit) as stop:
        main(["compress", "runs/dense", "--slim", "0.33", "--recover", "400000"])
    assert stop.value.code == 2
    said = " ".join(capfd.readouterr().err.split())
    assert said.endswith("run: efftrain compress structured runs/dense --ratio 0.33 --recovery-tokens 400000")


@pytest.mark.parametrize(
    ("options", "now"), [({"slim": 0.3}, "StructuredPrune"), ({"sparsity": "0.5"}, "Prune"), ({}, "Quantize")]
)
def test_a_recipe_of_before_imports_its_class_and_hears_which_one_to_use(options, now):
    with pytest.warns(DeprecationWarning, match=r"options\.Compression is now"):
        from efftrain.compress.options import Compression
    with pytest.raises(ConfigError, match=rf"; use {now} of efftrain\.compress\.commands"):
        Compression(**options)
