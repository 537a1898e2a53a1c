"""The settings of a pretrained model, read field by field, so that a field which nobody reads is noticed."""

from collections.abc import Mapping
from typing import Any

from efftrain.errors import ConfigError

# Fields of a config.json that change nothing that a model computes after training.
_NO_EFFECT = frozenset(
    (
        *("architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "use_cache"),
        *("initializer_range", "attention_dropout", "embd_pdrop", "resid_pdrop", "attn_pdrop", "hidden_dropout"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "id2label", "label2id", "problem_type", "return_dict"),
        *("output_hidden_states", "output_attentions", "output_router_logits", "router_aux_loss_coef"),
        *("router_jitter_noise", "chunk_size_feed_forward", "is_encoder_decoder", "task_specific_params", "n_ctx"),
        *("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "cache_implementation"),
        *("summary_first_dropout", "max_window_layers", "pretraining_tp", "reorder_and_upcast_attn", "embedding_size"),
        *("rope_interleaved", "is_llama_config", "transformers.js_config", "hidden_activation_dropout", "quantization"),
        *("efftrain", "model_type", "_sliding_window_pattern", "sliding_window_pattern"),
    )
)
_NOTHING: tuple[Any, ...] = (None, False, [], {})


class Settings:
    """A model's ``config.json``, or what a GGUF file says in its place.

    Args:
      values: the fields.
      origin: the file, for messages.
    """

    def __init__(self, values: Mapping[str, Any], origin: str):
        self._values, self.origin = values, origin
        self._read: set[str] = set()

    @property
    def read(self) -> frozenset[str]:
        """Names of the fields that were read so far."""
        return frozenset(self._read)

    def __contains__(self, name: str) -> bool:
        return self._values.get(name) is not None

    def get(self, name: str, default: Any = None) -> Any:
        """Returns a field; a field that is null or missing has the default."""
        self._read.add(name)
        value = self._values.get(name)
        return default if value is None else value

    def number(self, name: str, default: float | None = None) -> Any:
        """Returns a number.

        Raises:
          ConfigError: it is missing and has no default, or is not a number.
        """
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{self.origin}: {name} is {value!r}; it must be a number")
        return value

    def count(self, name: str, default: int | None = None) -> int:
        """Returns an integer of at least 1, or raises ``ConfigError``."""
        value = self.number(name, default)
        if value != int(value) or value < 1:
            raise ConfigError(f"{self.origin}: {name} is {value!r}; it must be an integer of at least 1")
        return int(value)

    def flag(self, name: str, default: bool = False) -> bool:
        """Returns a boolean, or raises ``ConfigError``."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise ConfigError(f"{self.origin}: {name} is {value!r}; it must be true or false")
        return value

    def require(self, name: str, *allowed: Any, default: Any = None) -> Any:
        """Returns a field that may only have some values.

        Raises:
          ConfigError: it has another one.
        """
        value = self.get(name, default)
        if value not in allowed:
            raise self.refusal(name, f"only {', '.join(map(repr, allowed))} can be imported")
        return value

    def choice(self, name: str, names: Mapping[str, str], default: str | None = None) -> str:
        """Returns efftrain's name of a choice; ``names`` maps the field's values to them."""
        value = self.get(name, default)
        if value not in names:
            raise self.refusal(name, f"only {', '.join(map(repr, names))} can be imported")
        return names[value]

    def part(self, name: str) -> "Settings | None":
        """Returns a field that is an object of fields; None: there is none."""
        value = self.get(name)
        if value is not None and not isinstance(value, Mapping):
            raise ConfigError(f"{self.origin}: {name} is {value!r}; it must be an object")
        return None if value is None else Settings(value, f"{self.origin}: {name}")

    def refusal(self, name: str, why: str) -> ConfigError:
        return ConfigError(f"{self.origin}: {name} is {self._values.get(name)!r}; {why}")

    def check_all_read(self) -> None:
        """Makes sure that no field was overlooked.

        Raises:
          ConfigError: a field may change what the model computes, and nothing has read it.
        """
        for name in sorted(set(self._values) - self._read - _NO_EFFECT):
            if self._values[name] not in _NOTHING:
                raise self.refusal(name, "this field is unknown to efftrain and may change what the model computes")
