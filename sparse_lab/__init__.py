"""sparse_lab: experiments on networks that are almost entirely zeros. Imports nothing heavy."""

__version__ = "0.1.0"
