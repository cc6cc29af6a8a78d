"""Sinusoidal encoding of the time step of an episode, as an input of the policy."""

import torch as th

TIME_WAVES = 10
"""Number of frequencies; each is half the previous one."""


def encode_time(steps: th.Tensor) -> th.Tensor:
    """
    Sinusoidal encoding (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762) with wavelengths from 2.1 to 1072 steps.

    A linear layer can compute the encoding of a shifted or mirrored time from it. In the paper, wavelengths begin at 6.3 steps
    and grow faster.

    :param steps: Steps since the start of the episode, integers, (...).
    :return: Sines, then cosines, (..., 2 * TIME_WAVES), in [-1, 1].
    """
    # 3 radians per step are no rational part of a turn, so no wave is periodic in a small number of steps.
    speeds = 3.0 / 2.0 ** th.arange(TIME_WAVES, device=steps.device)
    angles = steps.unsqueeze(-1) * speeds
    return th.cat([angles.sin(), angles.cos()], dim=-1)
