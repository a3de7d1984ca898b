"""Algorithms for whole filters."""
