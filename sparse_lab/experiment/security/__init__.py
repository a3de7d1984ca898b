"""What a config may start, set, write and hold, wherever it comes from. docs/security.md says why, and which test holds
each line.

Allow-lists: what is not named in `targets`, `allowed`, `flags` and `interpolations` is refused.
"""
