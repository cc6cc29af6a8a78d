"""Parts that the peers share: the clock, and the heads of peers whose networks the user defines."""

import time

from torch import nn

clock = time.process_time
"""CPU seconds, which depend less on other load on the machine. Every peer runs in one thread of one process."""

HEAD = (64, 64)
"""Widths of the actor's and the critic's hidden layers, SB3's default."""


def make_head(width: int, outputs: int) -> nn.Sequential:
    """:return: SB3's default head for a core of ``width``: two layers with tanh, and a linear one."""
    first, second = HEAD
    return nn.Sequential(nn.Linear(width, first), nn.Tanh(), nn.Linear(first, second), nn.Tanh(), nn.Linear(second, outputs))
