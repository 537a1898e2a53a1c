"""Web archives: members, records, pages.

It may import the other sources.
"""
