"""The build of a corpus: the order of its stages, the first (reading) and the last (writing).

It may import every other folder of ``data`` but ``loading`` and ``tasks``.
"""
