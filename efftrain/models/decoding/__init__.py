"""Decoding: prefill, generation of new tokens, sampling, speculation.

It may import the decoder and ``models.depth``; no other module of ``models`` imports it.
"""
