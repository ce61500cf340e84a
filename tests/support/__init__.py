"""What tests of several folders share, and nothing that one folder needs alone."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAMS = Path(__file__).parent / "programs"
"""Run in processes of their own: theirs is a folder without names such as `local` to import by mistake."""
