"""Models by their names on the Hugging Face Hub, downloaded by the package huggingface_hub."""

import re
from pathlib import Path

from efftrain.errors import ConfigError, RunError

_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
# What a run keeps or reads, at the top of a repository; never pickled weights or code. README.md has the licence.
_WANTED = ("*.json", "*.safetensors", "*.jinja", "README.md")
_UNWANTED = ("*/*", "consolidated*")  # other formats of the same weights


def local_folder(source: Path) -> Path:
    """Returns where a model's files are; those of a name on the Hub are downloaded, once, into its cache.

    Args:
      source: a path, or if that does not exist, a name such as ``HuggingFaceTB/SmolLM2-135M-Instruct``.

    Returns:
      The path itself, or the folder in the cache, whose name is the commit of the repository.

    Raises:
      ConfigError: it is neither, or the package huggingface_hub is not installed.
      RunError: the model cannot be downloaded.
    """
    name = source.as_posix()
    if source.exists() or source.suffix == ".gguf" or not _NAME.fullmatch(name):
        return source
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ConfigError(
            f"{name} does not exist here; to download a model of this name, install huggingface_hub with: pip install "
            "'efftrain[interop]', or give the folder of a model"
        ) from error
    try:
        return Path(snapshot_download(name, allow_patterns=list(_WANTED), ignore_patterns=list(_UNWANTED)))
    except Exception as error:  # of the package, of its HTTP library, of the disk
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise RunError(
            f"{name} does not exist here and cannot be downloaded ({reason}); check the name and the connection, log "
            "in with hf auth login if the model asks for it, or give the folder of a model"
        ) from error
