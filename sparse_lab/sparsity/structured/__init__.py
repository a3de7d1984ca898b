"""Whole filters: channels that go together, and scores of filters."""
