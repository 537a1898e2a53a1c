"""How much of a teacher's quality its students have."""

from pathlib import Path
from typing import Any

from efftrain import data
from efftrain.experiment.compare import Comparison, on_test
from efftrain.experiment.experiment import Experiment
from efftrain.measure.cost.objective_flops import forward_flops
from efftrain.measure.quality.unigram import unigram_bpb
from efftrain.measure.scorecard.scorecard import FILE_NAME, Scorecard
from efftrain.train.run.directory import load_model_config


def teacher_gain(found: Comparison, teacher: Path, student: Experiment) -> dict[str, Any]:
    """Compares students with their teacher and with a unigram model, on the rows on which a comparison reports.

    Args:
      found: the comparison of the students, which have equally many parameters.
      teacher: run directory of the teacher.
      student: configuration of a student, for the corpus and for the length of the rows.

    Returns:
      ``unigram_bpb`` and ``teacher_bpb``; the numbers of ``parameters``; ``kept_share_of_gain``: for each variant and
      seed the student's gain over the unigram model divided by the teacher's; ``teacher_flops_per_token`` of a forward
      pass.

    Raises:
      RunError: the run of the teacher has not finished.
    """
    config = Experiment(model=load_model_config(teacher), training=student.training, corpus=student.corpus, out=teacher)
    card = on_test(Scorecard.read(teacher / FILE_NAME), config)
    lowest, highest = (
        card.value("bpb"),
        unigram_bpb(data.open(student.corpus, verify=False), split=card.figures["bpb"].split),
    )
    first = next(iter(found.cards.values()))[0]
    return {
        "unigram_bpb": highest,
        "teacher_bpb": lowest,
        "parameters": {
            "teacher": card.figures["parameters_total"].value,
            "student": first.figures["parameters_total"].value,
        },
        "kept_share_of_gain": {
            name: [(highest - of.value("bpb")) / (highest - lowest) for of in cards]
            for name, cards in found.cards.items()
        },
        "teacher_flops_per_token": forward_flops(config.model, student.training.length),
    }
