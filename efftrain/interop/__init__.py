"""Models of other projects: import and export of Hugging Face folders and GGUF files, their tokenizers and formats.

May import ``models``, ``train``, ``measure`` and what these import. ``experiment`` and ``compress`` say with it, before
a training, as what the model can be exported; otherwise only ``cli`` and recipes import it.
"""
