"""What keeps a run going or ends it in order: restarts, the watchdog, signals.

It imports no other module of ``train`` but ``timing``.
"""
