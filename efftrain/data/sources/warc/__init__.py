"""Reads documents from web archives, in layers: compressed members, WARC records, pages.

This package may import the other sources.
"""
