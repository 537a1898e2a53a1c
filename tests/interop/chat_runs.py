"""Runs of a tiny model with tokenizers and chat templates, as importing leaves them."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from kinds_of_tokenizers import gpt2, llama2
from tiny_models import PLAIN, build, config
from tiny_runs import write_run
from tokenizers import AddedToken, Tokenizer

MARKERS = ("<|im_start|>", "<|im_end|>")
TEXTS = ["user assistant system\nthe alpha beta gamma delta 1234567890\n", "naïve über 数据 epsilon zeta eta theta\n"]
LENGTH = 192

# The shortest form of ChatML, and the same with its answers marked.
CHATML = """\
{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}\
{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
MARKED = """\
{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}\
{% if message.role == 'assistant' %}{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}\
{% else %}{{ message.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
# Mistral's form: the markers of turns are ordinary text, and a space comes before what the model says.
INSTRUCT = """\
{{ bos_token }}{% for message in messages %}{% if message.role == 'assistant' %}{{ ' ' + message.content + eos_token }}\
{% else %}{{ '[INST] ' + message.content + ' [/INST]' }}{% endif %}{% endfor %}"""


def chat_tokenizer(kind: str) -> Tokenizer:
    """A byte-level BPE, or SentencePiece with bytes for unknown characters, that knows ``MARKERS``."""
    tokenizer = {"byte_level": gpt2, "sentence_piece": llama2}[kind](TEXTS)
    tokenizer.add_special_tokens([AddedToken(marker, normalized=False) for marker in MARKERS])
    return tokenizer


def write_chat_run(run: Path, tokenizer: Tokenizer, template: str | None = CHATML, **generation: Any) -> Path:
    """Writes a run of an untrained model; ``generation`` are fields of ``generation_config.json``."""
    size = max(tokenizer.get_vocab().values()) + 1
    model = build(config(vocab_size=size, pattern=(PLAIN,), n_repeats=2, max_length=LENGTH))
    write_run(run, model, SimpleNamespace(path=run))
    tokenizer.save(str(run / "tokenizer.json"))
    ids = {"eos_token_id": [tokenizer.token_to_id("<|im_end|>")]} | generation
    (run / "generation_config.json").write_text(json.dumps(ids))
    if template is not None:
        (run / "chat_template.jinja").write_text(template)
    return run
