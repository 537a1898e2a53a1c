"""``efftrain import``."""

from pathlib import Path


def import_model(source: Path, /, *, out: Path, length: int | None = None, max_length: int | None = None) -> None:
    """Import a pretrained model as a run directory, which every command reads as one that was trained here.

    Reads Llama, Mistral, Qwen2, Qwen3, SmolLM, Gemma, Gemma 2 and 3, OLMo 2, GPT-2, Phi, Phi-3, Granite, Mixtral,
    Qwen3-MoE and OLMoE.

    Args:
      source: a folder with config.json and safetensors, a GGUF file, or a name of the Hugging Face Hub, such as
        HuggingFaceTB/SmolLM2-135M-Instruct.
      out: the new run directory.
      length: number of tokens of the rows that other commands read from a corpus, such as 1024; without it, they ask
        for it.
      max_length: number of tokens of the longest text, if it is less than what the model was made for; models with
        LongRoPE (Phi-3) take other frequencies then.
    """
    from efftrain.interop.import_model import import_model as import_files
    from efftrain.interop.import_model import notes
    from efftrain.measure.cost.parameters import count_parameters
    from efftrain.models.decoder import abstract_decoder
    from efftrain.progress import console

    config = import_files(source, out, length=length, max_length=max_length)
    total = count_parameters(abstract_decoder(config)).total
    console.print(f"{out}: {total:,} parameters, imported from {source}", markup=False)
    for note in notes(config):
        console.print(note, markup=False)
