"""Sharding: how arrays are spread over devices.

``mesh``: which devices there are, under which axis names. ``rules``: which dimension goes to which axis. ``layout``:
the sharding of a whole state.
"""
