"""``efftrain VERB``, one file per verb.

A verb imports what it needs when it runs, so that ``efftrain --help`` is instant.

It may import every other room; no room imports it.
"""
