"""Depth policies: layers that only some tokens pass, their routers, and early exits.

It may import the decoder and its blocks; decoding imports it.
"""
