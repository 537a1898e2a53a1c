"""Supervised fine-tuning (SFT) on conversations: a pretrained model learns to answer, with the loss on answers only.

    efftrain import models/SmolLM2-135M-Instruct --out runs/smollm2
    python recipes/sft.py cpu --training.finetune runs/smollm2 --conversations chats.jsonl --held-out more.jsonl
    python recipes/sft.py gpu --training.finetune runs/smollm2 --conversations gsm8k-train.jsonl \\
        --fields.question question --fields.answer answer

Each line of a file is an object with ``messages`` (``role`` and ``content``, as in Hugging Face's and OpenAI's data),
or with the fields of a question and an answer. They are written with the chat template of the run, and packed into rows
in which no conversation sees another; only what the assistant says and the token that ends it are targets of the loss.

Afterwards the recipe answers the first question of the held-out file (``efftrain export`` takes the run elsewhere).

Measured: not measured yet.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from flax import nnx

from efftrain.interop.chat_format import ASSISTANT
from efftrain.interop.conversations import read_conversations
from efftrain.interop.fine_tuning import FineTuning, fine_tune
from efftrain.interop.run_tokenizer import read_run_tokenizer
from efftrain.measure.scorecard.scorecard import Scorecard, table
from efftrain.models.decoder import Decoder
from efftrain.models.decoding.generate import generate
from efftrain.progress import console
from efftrain.recipe import run_recipe
from efftrain.sharding import hosts
from efftrain.sharding.mesh import MeshConfig
from efftrain.train.config import Training
from efftrain.train.objectives.objective import Objective, next_token_loss
from efftrain.train.optimizers import AdamW
from efftrain.train.schedules import Cosine


@dataclass(frozen=True, kw_only=True)
class Config(FineTuning):
    """A fine-tuned run.

    Attributes:
      n_new: longest answer to the first held-out question, in tokens. 0: no answer is shown.
    """

    conversations: Path = Path("chats.jsonl")
    out: Path = Path("runs/sft")
    n_new: int = 128


cpu = Config(
    training=Training(
        steps=200,
        batch_size=8,
        length=512,
        n_microbatches=4,
        optimizer=AdamW(peak_lr=2e-5, weight_decay=0.0),
        schedule=Cosine(warmup=0.03),
        eval_every=100,
    )
)
gpu = replace(cpu, training=replace(cpu.training, steps=1000, batch_size=32, length=1024, n_microbatches=1))
v5e_64 = replace(gpu, training=replace(gpu.training, batch_size=256, length=2048, mesh=MeshConfig(replica=-1, fsdp=16)))
configs = {"cpu": cpu, "gpu": gpu, "v5e-64": v5e_64}


def trained(config: FineTuning) -> tuple[Callable[[nnx.Rngs], Decoder], Objective]:
    """The model and what is minimised: the batches have the mask of the answers, so that any objective fits."""
    return lambda rngs: Decoder(config.model, rngs=rngs), next_token_loss


def main(config: Config) -> Scorecard:
    ready = config.with_model()
    model, card = fine_tune(ready, *trained(ready))
    if config.held_out is not None and config.n_new and hosts.process_count() == 1:
        show_answer(model, config)
    console.print(table([card]))
    return card


def show_answer(model: Decoder, config: Config) -> None:
    """Prints the first question of the held-out file and what the model answers."""
    tokenizer = read_run_tokenizer(config.out)
    messages = read_conversations(config.held_out, config.fields)[0].messages
    first = next(i for i, message in enumerate(messages) if message["role"] == ASSISTANT)
    prompt = tokenizer.encode_chat(messages[:first])
    n_new = min(config.n_new, model.config.max_length - len(prompt))
    answer = generate(model, [prompt], n_new=n_new, end_token=tokenizer.eos)[0].tolist()
    console.print(f"{messages[first - 1]['content']}\n-> {tokenizer.decode(answer)}", markup=False)


if __name__ == "__main__":
    run_recipe(main, configs)
