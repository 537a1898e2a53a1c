"""The machinery of a build in stages: items, engines, the documents between two stages, what each removed.

It may import ``data.storage`` and ``data.documents``; it knows no particular stage.
"""

from efftrain.moved import old_names

__getattr__ = old_names(__name__)
