"""The time of an episode as an input: what a policy that reads the clock sees."""

import torch as th

TIME_WAVES = 10
"""Waves; each is twice as long as the one before."""


def encode_time(steps: th.Tensor) -> th.Tensor:
    """
    Make a number of steps readable for a network: sines and cosines of waves from 2.1 to 1072 steps long.

    Of all that a linear layer can make of them, the most useful is another time: "as long before the end as this is after the
    start". (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, whose waves grow faster and begin at 6.3 steps.)

    :param steps: Whole numbers, (...).
    :return: (..., 2 * TIME_WAVES), each in [-1, 1].
    """
    # Three radians a step: were it a whole share of a turn, waves would repeat after a few steps.
    speeds = 3.0 / 2.0 ** th.arange(TIME_WAVES, device=steps.device)
    angles = steps.unsqueeze(-1) * speeds
    return th.cat([angles.sin(), angles.cos()], dim=-1)
