"""A method of one's own: a score, a schedule, and a rule of dropping and growing with a setting. Nothing else is edited.

sparse-lab --plugin examples/own_method/plugin.py method=wanderer dataset=digits training=digits
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import sparse_lab
from sparse_lab import algorithms
from sparse_lab.config import Config, DropAndGrowConfig, key
from sparse_lab.methods.drop_and_grow import DropAndGrow
from sparse_lab.methods.schedules import Kind
from sparse_lab.sparsity.clock import Clock
from sparse_lab.sparsity.scores import Scores, View

sparse_lab.register_choices(Path(__file__).with_name("conf"))
