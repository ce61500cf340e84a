"""How fast the library is, against the bare calls and against what one would write instead.

``python -m benchmarks`` in the repository's root, or ``make bench``. See docs/benchmarks.md.
"""
