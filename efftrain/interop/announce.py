"""Says before a training as what its model can be exported afterwards."""

from efftrain.interop.plan import ExportPlan, classify
from efftrain.models.config import ModelConfig
from efftrain.progress import console
from efftrain.sharding import hosts


def announce_export(config: ModelConfig) -> None:
    """Prints one line on stderr, on the first process: the class of transformers, or why there is none and what to do.

    Nothing is built or read, and no error passes: a run must not end because of what it may never need.

    Args:
      config: configuration of the model that is about to be trained.
    """
    if hosts.process_index() != 0:
        return
    try:
        plan = classify(config)
    except Exception as error:  # a component of a fork may raise anything where its fields are read
        console.print(f"export: not known ({type(error).__name__}: {error})", style="yellow", markup=False)
        return
    if isinstance(plan, ExportPlan):
        console.print(f"export: {plan.architecture.name}", markup=False)
    else:
        text = f"export: not possible: {plan.reason}; {' or '.join(plan.alternatives)}"
        console.print(text, style="yellow", markup=False)
