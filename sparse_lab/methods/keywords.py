"""What components say in the command's words, said in the library's."""

from __future__ import annotations

import re

# what the command calls a thing -> what the library does
WORDS = (
    (r"method\.(\w+)=null", r"\1=None"),
    (r"method\.(\w+)=\{\}", r"\1={}"),
    (r"which is null", "which is None"),
    (r"set one of them to null", "set one of them to None"),
    (r"sparsity\.(?=layers|exclude|include)", ""),
    (r"sparsity\.target", "sparsity"),
    (r"\b(?:method|schedule)\.(?=\w)", ""),
    (r": use (?:model=resnet34|another model or method|a network with ReLU), or (\w+=None)", r": leave it out by \1"),
)


def in_keywords(line: str) -> str:
    """Return a line that names keys of the command with the keywords of `sparse_lab.sparsify` in their place."""
    for command, library in WORDS:
        line = re.sub(command, library, line)
    return line
