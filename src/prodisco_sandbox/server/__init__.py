"""The reference sandbox server, ``python -m prodisco_sandbox.server``.

It runs Python: every execution in a fresh interpreter process of its own. See
docs/server.md for its options, its limits and what its containment does not stop.
"""
