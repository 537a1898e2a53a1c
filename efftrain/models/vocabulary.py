"""Enlarges the vocabulary of a trained decoder, for further training."""

from flax import nnx

from efftrain.errors import ConfigError
from efftrain.models.decoder import Decoder


def with_vocabulary(model: Decoder, vocab_size: int, *, max_length: int | None = None, rngs: nnx.Rngs) -> Decoder:
    """Returns the model with entries added after its present ones, for which its logits stay the same.

    Args:
      model: a trained model, not quantised.
      vocab_size: vocabulary size of the new model.
      max_length: ``max_length`` of the new model. None: as before. Learned vectors of further positions are new.
      rngs: random keys for the vectors of the new entries.

    Raises:
      ConfigError: the new vocabulary is smaller.
    """
    before = model.config.vocab_size
    if vocab_size < before:
        raise ConfigError(f"the model has {before} entries and is to have {vocab_size}; entries can only be added")
    config = model.config.replace(vocab_size=vocab_size, max_length=max_length or model.config.max_length)
    n = min(config.max_length, model.config.max_length)
    grown = Decoder(config, rngs=rngs)
    for name in ("blocks", "norm"):
        nnx.update(getattr(grown, name), nnx.state(getattr(model, name)))
    table = grown.embedding.table
    table[...] = table[...].at[:before].set(model.embedding.table[...])
    if not config.tied_embedding:
        kernel = grown.head.kernel
        kernel[...] = kernel[...].at[:, :before].set(model.head.kernel[...])
    if config.head_bias:
        grown.head.bias[...] = grown.head.bias[...].at[:before].set(model.head.bias[...])
    if config.learned_positions:
        table = grown.positions.table
        table[...] = table[...].at[:n].set(model.positions.table[...][:n])
    return grown
