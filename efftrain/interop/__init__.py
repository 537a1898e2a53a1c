"""Models of other projects: import and export of Hugging Face folders and GGUF files, their tokenizers and formats.

May import ``models``, ``train``, ``measure`` and what these import; only ``cli`` and recipes import it.
"""
