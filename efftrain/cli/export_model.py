"""``efftrain export``."""

from pathlib import Path
from typing import Literal

Folder = Literal["float32", "bfloat16", "float16", "compressed-tensors", "stablehlo"]
File = Literal["gguf:F32", "gguf:F16", "gguf:Q8_0", "gguf:Q4_0", "gguf:Q4_1"]
Format = Literal[Folder, File]


def export_model(run: Path, /, *, to: Path, format: Format = "float32") -> None:
    """Export the model of a run for other programs: a folder for transformers and vLLM, a GGUF file for llama.cpp, or a
    program for JAX alone. A folder holds a model card, README.md, which says what the run records.

    Args:
      run: the run directory.
      to: the new folder or file.
      format: the dtype of the weights in a folder of safetensors; compressed-tensors, to keep what efftrain compress
        quantize made quantised; stablehlo, for a program of the forward pass with its weights; or gguf: and the type of
        the matrices in a GGUF file.
    """
    from efftrain.progress import console

    if format == "stablehlo":
        from efftrain.interop.stablehlo import export_stablehlo

        what, notes = "tokens to logits", export_stablehlo(run, to)
    else:
        if format.startswith("gguf:"):
            from efftrain.interop.export_gguf import export_gguf

            plan = export_gguf(run, to, format.removeprefix("gguf:"))  # ty: ignore[invalid-argument-type]
        else:
            from efftrain.interop.export_model import export_model as export_files

            if format == "compressed-tensors":
                plan = export_files(run, to, compressed=True)
            else:
                plan = export_files(run, to, dtype=format)
        what, notes = plan.architecture.name, plan.notes
    console.print(f"{to}: {what}, {format}", markup=False)
    for note in notes:
        console.print(f"note: {note}", markup=False)
