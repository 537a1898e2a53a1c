"""Sources of documents, one file a format; each is cut into pieces that workers share out.

It may import ``data.documents``.
"""
