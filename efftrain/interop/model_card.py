"""The model card of an export: README.md, written from the files of the run. What they do not say, it does not say."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from efftrain.interop import card_sections as sections
from efftrain.interop.card_facts import CardFacts, RunFacts
from efftrain.interop.markdown import code, one_line, plain, table, yaml
from efftrain.measure.cost.parameters import count_parameters
from efftrain.models.config import Attention, Dense
from efftrain.models.decoder import abstract_decoder
from efftrain.models.moe.layer import MoE

FILE_NAME = "README.md"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?\Z", re.ASCII)
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]*\Z")


@dataclass(frozen=True, kw_only=True)
class Loading:
    """How the files of an export are loaded.

    Attributes:
      library: ``library_name`` of the front matter.
      snippet: Python, run in the folder.
      imported: ``efftrain import`` reads the folder.
    """

    library: str
    snippet: str
    imported: bool


TRANSFORMERS = Loading(
    library="transformers",
    snippet="""\
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer, model = AutoTokenizer.from_pretrained("."), AutoModelForCausalLM.from_pretrained(".")
tokens = tokenizer("Once upon a time", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(tokens, max_new_tokens=32)[0]))""",
    imported=True,
)
WITHOUT_TOKENIZER = replace(
    TRANSFORMERS,
    snippet="""\
import torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(".")
print(model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=32))  # token ids: the run has no tokenizer.json""",
)
STABLEHLO = Loading(
    library="jax",
    snippet="""\
import pathlib, numpy, safetensors.numpy, jax.export
forward = jax.export.deserialize(bytearray(pathlib.Path("forward.stablehlo").read_bytes()))
weights = {k: v for f in pathlib.Path().glob("*.safetensors") for k, v in safetensors.numpy.load_file(f).items()}
logits = forward.call(weights, numpy.array([[1, 2, 3]], numpy.int32))  # (batch, length, vocabulary)""",
    imported=False,
)


def write_card(folder: Path, facts: CardFacts, *, loading: Loading, form: str = "", notes: Sequence[str] = ()) -> None:
    """Writes a model card into the folder of an export; see ``model_card``."""
    text = model_card(facts, loading=loading, form=form, notes=notes)
    (folder / FILE_NAME).write_text(text, encoding="utf-8")


def model_card(facts: CardFacts, *, loading: Loading, form: str = "", notes: Sequence[str] = ()) -> str:
    """Returns the text of a model card, with the front matter that the Hugging Face hub reads.

    Args:
      facts: what the run says.
      loading: how the exported files are loaded.
      form: what the files hold, such as "LlamaForCausalLM, bfloat16".
      notes: what the export does not carry over, as sentences.
    """
    runs = list(facts.run.chain())
    texts = {
        "Origin": _origin(runs),
        "Model": _model(facts, form),
        "Data": sections.data(runs),
        "Training": sections.training(runs),
        "Scorecard": sections.scorecard(facts.run),
        "Compression": sections.compression(runs),
        "Limits": _limits(facts, notes),
        "How to load it": _loading(loading),
    }
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in texts.items() if text)
    intro = "Written by efftrain from the files of the run. What the run does not record is not said here."
    return f"---\n{_front_matter(runs, loading)}\n---\n\n# {plain(facts.run.name)}\n\n{intro}\n\n{body}\n"


def _front_matter(runs: list[RunFacts], loading: Loading) -> str:
    origin = runs[-1].imported or {}
    licence = one_line(origin.get("license") or "")
    known = bool(_LICENCE.match(licence.lower()))
    name = one_line(origin.get("license_name") or (licence if not known else "")) or None
    source = one_line(origin.get("source") or "")
    kinds = {_kind(run) for run in runs if run.compression}
    return yaml(
        {
            "license": (licence.lower() if known else "other") if licence else None,
            "license_name": name,
            "license_link": one_line(origin.get("license_link") or "") or None,
            "language": [one_line(name) for name in origin.get("languages") or ()],
            "library_name": loading.library,
            "pipeline_tag": "text-generation",
            "base_model": source if _HUB_ID.match(source) and not source.endswith(".gguf") else None,
            "tags": ["efftrain", *sorted(kinds)],
        }
    )


def _kind(run: RunFacts) -> str:
    return "quantized" if str(sections.options_of(run).get("type")) == "Quantize" else "pruned"


def _origin(runs: list[RunFacts]) -> str:
    first, steps = runs[-1], []
    for run in reversed(runs):
        if run.imported is not None:
            steps.append(f"{code(run.name)} was imported from {code(run.imported.get('source'))}{_of(run.imported)}.")
            continue
        done = "compressed" if run.compression is not None else "trained"
        start = f" from {code(run.made_from)}" if run.made_from else ""
        steps.append(f"{code(run.name)} was {done}{start}.")
    lines = [f"{number}. {step}" for number, step in enumerate(steps, 1)]
    if first.imported is not None:
        licence = first.imported.get("license")
        said = f"The licence of the original is {code(licence)}" if licence else "Its files name no licence"
        lines.append(f"\n{said}; the model card of the original says what it was made from and for.")
    elif first.made_from is not None:
        lines.append(f"\n{code(first.made_from)} is not at its recorded place any more: its origin is not known here.")
    else:
        lines.append("\nThe run records no licence.")
    return "\n".join(lines)


def _of(imported: Mapping[str, Any]) -> str:
    """Name, author and storage of an imported model, as far as they are recorded."""
    known = [f"{plain(imported['name'])}" if imported.get("name") else ""]
    known.append(f"by {plain(imported['organization'])}" if imported.get("organization") else "")
    dtypes = imported.get("dtypes") or {}
    stored = ", ".join(f"{count} {plain(name)}" for name, count in dtypes.items())
    known.append(f"tensors: {stored}" if stored else "")
    digest = imported.get("digest")
    known.append(f"SHA-256 of the files' digests {code(digest)}" if digest else "")
    text = ", ".join(filter(None, known))
    return f" ({text})" if text else ""


def _model(facts: CardFacts, form: str) -> str:
    config, counts = facts.model, count_parameters(abstract_decoder(facts.model))
    first = config.layers[0]
    rows = [["Files", plain(form)]] if form else []
    rows.append(["Parameters", f"{counts.total:,}, of which {counts.embedding:,} in the embedding"])
    if counts.active != counts.total:
        rows.append(["Active parameters of a token", f"{counts.active:,}"])
    rows.append(["Layers", f"{config.n_layers:,} of width {config.d_model:,}"])
    attention, mlp = first.attention, first.mlp
    if isinstance(attention, Attention):
        heads = f"{attention.n_heads} heads of {attention.d_head}, {attention.n_kv_heads} of keys and values"
        rows.append(["Attention" if _same(config, "attention") else "Attention of the first layer", heads])
    if isinstance(mlp, Dense | MoE):
        width = f"{mlp.d_ff:,} hidden units" if isinstance(mlp, Dense) else _experts(mlp)
        rows.append(["Feed-forward" if _same(config, "mlp") else "Feed-forward of the first layer", width])
    rows.append(["Vocabulary", f"{config.vocab_size:,} tokens, {'tied' if config.tied_embedding else 'untied'} head"])
    rows.append(["Context", f"{config.max_length:,} tokens"])
    return table(["", ""], rows)


def _same(config: Any, part: str) -> bool:
    return len({repr(getattr(block, part)) for block in config.pattern}) == 1


def _experts(mlp: MoE) -> str:
    shared = f", and {mlp.n_shared} for every token" if mlp.n_shared else ""
    return f"{mlp.n_experts} experts of {mlp.d_expert:,} hidden units, {mlp.top_k} a token{shared}"


def _limits(facts: CardFacts, notes: Sequence[str]) -> str:
    run, longest = facts.run, facts.model.max_length
    lengths = [r.training["length"] for r in run.chain() if r.trained and r.training.get("length")]
    context = f"A row has at most {longest:,} tokens."
    if lengths and max(lengths) < longest:
        context += f" Training rows had {max(lengths):,}; more is not tested."
    lines = [context, *map(plain, notes)]
    lines.append("No training for safety and no test of harmful output is recorded.")
    if not (list(run.chain())[-1].imported or {}).get("languages"):
        lines.append("The languages that the model knows are not recorded.")
    return "\n".join(f"- {line}" for line in lines)


def _loading(loading: Loading) -> str:
    text = f"In this folder:\n\n```python\n{loading.snippet}\n```"
    return text + (
        "\n\nTo train or compress it further: `efftrain import FOLDER --out RUN`." if loading.imported else ""
    )
