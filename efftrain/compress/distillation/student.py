"""Initialisation of a student with parts of its teacher."""

from collections.abc import Sequence
from dataclasses import replace

from flax import nnx

from efftrain.compress.layerwise.calibration import CalibrationRows
from efftrain.compress.layerwise.layerwise_model import LayerwiseModel, assemble
from efftrain.compress.structured.cut import structured_prune
from efftrain.compress.structured.importance import importance
from efftrain.compress.structured.shape import Shape, shaped
from efftrain.compress.structured.shapes import candidates
from efftrain.errors import ConfigError
from efftrain.measure.cost.parameters import count_parameters
from efftrain.models.config import Dense, ModelConfig, standard_attention
from efftrain.models.decoder import Decoder, abstract_decoder
from efftrain.models.moe import MoE


def spread_layers(n_student: int, n_teacher: int) -> tuple[int, ...]:
    """Indices of teacher layers at equal distances, including the last one: 3 layers of 6 are (1, 3, 5)."""
    if not 1 <= n_student <= n_teacher:
        raise ConfigError(f"model.n_layers is {n_student} and the teacher has {n_teacher}; use at most as many layers")
    return tuple(-(-(i + 1) * n_teacher // n_student) - 1 for i in range(n_student))


def from_layers(teacher: LayerwiseModel, layers: Sequence[int]) -> Decoder:
    """Builds a student from some layers of its teacher, with the teacher's embedding, final norm and head.

    Args:
      teacher: the teacher, taken apart; not changed.
      layers: indices of the layers, ascending.

    Source: Sanh et al. 2019 (DistilBERT), section 2, where the initialisation mattered more than the loss.
    """
    shape = replace(Shape.of(teacher.config), n_layers=len(layers))
    config = shaped(teacher.config, shape, layers)
    return assemble(config, teacher.outer, [nnx.state(teacher.layers[i]) for i in layers])


def cut_from(teacher: LayerwiseModel, student: ModelConfig, calibration: CalibrationRows) -> Decoder:
    """Cuts a student of a given configuration out of its teacher by structured pruning.

    Args:
      teacher: the teacher, taken apart; not changed.
      student: configuration of the student.
      calibration: text by which the most important parts of the teacher are found.

    Raises:
      ConfigError: a model of this configuration cannot be cut out of this teacher.
    """
    model, _ = structured_prune(teacher, shape_within(student, teacher.config), importance(teacher, calibration))
    if not same_parameters(model.config, student):
        raise ConfigError(
            "model cannot be cut out of its teacher, which needs the same vocabulary, head size and kinds of layers, "
            "and layers of equal size; initialise it at random"
        )
    return model


def same_parameters(one: ModelConfig, other: ModelConfig) -> bool:
    """Whether two configurations have the same parameters: they may differ in dtype, scan, remat and maximum length."""
    names = ["dtype", "scan", "remat"] + ([] if one.learned_positions else ["max_length"])
    how = {name: getattr(other, name) for name in names}
    return one.replace(**how) == other


def shape_within(student: ModelConfig, teacher: ModelConfig) -> Shape:
    """The shape that turns the first layer of a teacher into the first layer of a student."""
    s, t = student.layers[0], teacher.layers[0]
    attentions = [standard_attention(block, "a student that starts as a cut of its teacher") for block in (s, t)]
    several = attentions[1].n_kv_heads > 1  # with a single KV head (MQA), query heads are cut
    heads = [a.n_kv_heads if several else a.n_heads for a in attentions]
    ffn = experts = 1.0
    if isinstance(s.mlp, Dense) and isinstance(t.mlp, Dense):
        ffn = s.mlp.d_ff / t.mlp.d_ff
    elif isinstance(s.mlp, MoE) and isinstance(t.mlp, MoE):
        experts = s.mlp.n_experts / t.mlp.n_experts
    else:
        raise ConfigError(
            "model and its teacher have different kinds of feed-forward layers; initialise the model at random"
        )
    return Shape(
        d_model=student.d_model,
        ffn=ffn,
        heads=heads[0] / heads[1],
        experts=experts,
        n_layers=student.n_layers,
    )


def equal_students(teacher: ModelConfig, length: int) -> tuple[ModelConfig, ModelConfig]:
    """Two students of about equally many parameters: with half of the teacher's layers, and with narrower layers.

    Args:
      teacher: configuration of the teacher.
      length: tokens of a row.
    """
    keep = spread_layers(max(teacher.n_layers // 2, 1), teacher.n_layers)
    half = shaped(teacher, replace(Shape.of(teacher), n_layers=len(keep)), keep)
    share = count_parameters(abstract_decoder(half)).total / count_parameters(abstract_decoder(teacher)).total
    shape = candidates(teacher, share, axis="width", metric="parameters", length=length)[0]
    return half, shaped(teacher, shape, range(teacher.n_layers))
