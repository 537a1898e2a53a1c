"""On-policy distillation: the teacher scores answers of the student, so that the student learns from its mistakes."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from efftrain import data
from efftrain.errors import ConfigError
from efftrain.models.decoder import Decoder
from efftrain.models.decoding.generate import AllLayers, decode_tokens, read_prompts
from efftrain.models.decoding.sampling import Sampling
from efftrain.models.decoding.unrolled import unrolled
from efftrain.ops.platform import conditional
from efftrain.sharding.rules import constrain, shard_count


@dataclass(frozen=True, kw_only=True)
class OnPolicy:
    """In some steps the student generates answers to the prompts of the batch, and both models score these answers.

    No gradient goes through the sampling. An untrained student generates nonsense: train it on data first.

    Attributes:
      fraction: probability that a step is on-policy; all other steps use the batch as it is.
      n_new: maximum length of an answer in tokens.
      prompt: length of the prompt in tokens, from the start of each row, for text without answers; the documents in a
        prompt are then read as one. None: the prompt is what comes before the first target that counts, as in
        instruction data; rows whose prompt leaves no space for an answer do not count.
      temperature: sampling temperature; all tokens can be sampled. Other values than 1 bias the gradient.
      end_token: id of the token that ends an answer and counts as its last target. None: every answer has ``n_new``
        tokens.

    Source: Agarwal et al. 2024 (GKD), algorithm 1; Gu et al. 2024 (MiniLLM) without its policy gradient.
    """

    fraction: float = 0.5
    n_new: int = 64
    prompt: int | None = None
    temperature: float = 1.0
    end_token: int | None = 0

    def __post_init__(self):
        if not 0 < self.fraction <= 1:
            raise ConfigError(f"on_policy.fraction is {self.fraction}; give a number above 0 and up to 1")
        if self.n_new < 1 or (self.prompt is not None and self.prompt < 1):
            raise ConfigError(f"on_policy.n_new is {self.n_new} and prompt {self.prompt}; give at least 1")
        if not self.temperature > 0:
            raise ConfigError(f"on_policy.temperature is {self.temperature}; give a positive number")

    def check_text(self, corpus: Path) -> None:
        """Raises ConfigError if these options do not fit a corpus of text, which has no prompts and answers."""
        if self.prompt is None:
            raise ConfigError("a corpus without answers has no prompts; set distill.on-policy.prompt, such as 64")
        end = data.open(corpus, verify=False).end_of_text_id
        if self.end_token not in (None, end):
            raise ConfigError(
                f"distill.on-policy.end-token is not the end of text of {corpus}; set it to {end}, or None"
            )

    def __call__(self, model: Decoder, batch: Mapping[str, Array], key: Array) -> tuple[dict[str, Array], Array]:
        """Returns the batch of this step, with or without the model's answers, and whether it has them, () bool."""
        choose, sample = jax.random.split(key)
        given = {name: batch[name] for name in ("tokens", "targets", "segments", "positions", "mask")}
        wanted = jax.random.uniform(choose) < self.fraction
        return conditional(wanted, lambda b: self.answered(model, b, sample), lambda b: b, given), wanted

    def answered(self, model: Decoder, batch: Mapping[str, Array], key: Array) -> dict[str, Array]:
        """Replaces what follows the prompts of a batch by answers of the model; each row becomes one segment.

        Raises:
          ConfigError: the rows are too short for a prompt and an answer, or are sharded along their length.
        """
        if shard_count("length") > 1:
            raise ConfigError(
                "on_policy cannot sample answers that are split over devices; set training.mesh.context to 1"
            )
        tokens_bt, mask_bt = batch["tokens"], batch["mask"]
        length = tokens_bt.shape[1]
        longest = length - self.n_new if self.prompt is None else self.prompt
        if longest < 1 or longest + self.n_new > length:
            raise ConfigError(
                f"on_policy needs {longest if self.prompt else 1} + {self.n_new} tokens and rows have {length}; lower "
                "n_new or lengthen the rows"
            )
        lengths_b, asked_b = jnp.full(len(tokens_bt), longest), mask_bt.any(1)
        if self.prompt is None:  # the token before the first target that counts ends the prompt
            lengths_b = jnp.argmax(mask_bt, axis=1) + 1
            asked_b &= lengths_b <= longest
            lengths_b = jnp.minimum(lengths_b, longest)
        sampled_bn = jax.lax.stop_gradient(self._sample(model, tokens_bt[:, :longest], lengths_b, key))

        place_t, ends_b = jnp.arange(length), lengths_b + self.n_new
        if self.end_token is not None:
            ended_bn = sampled_bn == self.end_token
            n_b = jnp.where(ended_bn.any(1), jnp.argmax(ended_bn, axis=1) + 1, self.n_new)
            ends_b = lengths_b + n_b
        number_bt = jnp.clip(place_t - lengths_b[:, None], 0, self.n_new - 1)
        answer_bt = jnp.take_along_axis(sampled_bn, number_bt, axis=1)
        tokens = jnp.where(place_t < lengths_b[:, None], tokens_bt, answer_bt)
        tokens = jnp.where(place_t < ends_b[:, None], tokens, 0)
        inside_bt = place_t < ends_b[:, None]
        targets = jnp.concatenate([tokens[:, 1:], jnp.zeros_like(tokens[:, :1])], axis=1)
        counts_bt = (place_t >= lengths_b[:, None] - 1) & (place_t < ends_b[:, None] - 1)
        found: dict[str, Any] = {
            "tokens": tokens,
            "targets": targets,
            "segments": inside_bt,
            "positions": jnp.broadcast_to(place_t, tokens.shape),
            "mask": counts_bt & asked_b[:, None],
        }
        return {name: value.astype(batch[name].dtype) for name, value in found.items()}

    def _sample(self, model: Decoder, prompts_bp: Array, lengths_b: Array, key: Array) -> Array:
        """Samples (batch, n_new) tokens; always all, because an early end would make the loop depend on the rows."""
        graph, state = nnx.split(unrolled(model))
        state = jax.tree.map(jax.lax.stop_gradient, state)
        prompts_bp = constrain(prompts_bp, "batch", None)
        sampling = Sampling(temperature=self.temperature)
        first_b, cache = read_prompts(graph, state, prompts_bp, lengths_b, key, self.n_new, sampling)
        return decode_tokens(
            graph, state, first_b, cache, key, self.n_new, sampling, AllLayers(), None, 0.0, None, None
        )[0]  # fmt: skip
