"""The version, importable without torch so that setup.py can read it."""

__version__ = "0.1.0"
