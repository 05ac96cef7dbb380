"""The version of this package. A server and its sites must have the same."""

__version__ = "0.1.0"
