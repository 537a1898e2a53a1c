"""Sources of documents, one file a format; each is cut into pieces that workers share out.

It may import ``data.documents``.
"""

from efftrain.moved import old_names

__getattr__ = old_names(__name__)
