"""The version, for what is written to files and must not import the whole package."""

__version__ = "0.1.0"
