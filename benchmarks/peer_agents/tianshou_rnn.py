"""
tianshou's ``PPO`` (Weng et al. 2022, JMLR 23(267), MIT licence, https://github.com/thu-ml/tianshou) with its ``Recurrent``.

Its computation differs from that of the other peers. While acting, the LSTM's state is carried on. The update does not use
this state ("all Recurrent* training use 0 state initialization", https://github.com/thu-ml/tianshou/issues/793): each
transition is a window of its last observations (``stack_num`` of the buffer), which runs from a zero state for one output. A
window of 64 therefore costs up to 64 times the steps of a sequence of 64, in which every step is trained. A window of 4, as in
tianshou's own example, covers four observations. Windows that reach beyond the start of their episode or rollout repeat its
first observation.

Its networks are fixed: a linear layer before and after the LSTM, and heads with ReLU.
"""

import argparse

import gymnasium as gym
import torch as th
from tianshou.algorithm.modelfree.ppo import PPO
from tianshou.algorithm.modelfree.reinforce import DiscreteActorPolicy
from tianshou.algorithm.optim import AdamOptimizerFactory
from tianshou.data import Collector, VectorReplayBuffer
from tianshou.env import DummyVectorEnv
from tianshou.utils.net.common import ActorCritic, Recurrent
from tianshou.utils.net.discrete import DiscreteActor, DiscreteCritic
from tianshou.utils.torch_utils import policy_within_training_step

from benchmarks.peer_agents.common import HEAD, clock


class TianshouPeer:
    """
    Calls ``Collector`` and ``PPO.update`` as tianshou's on-policy trainer does.

    :param env_id: Environment with vector observations and discrete actions.
    :param args: ``n_envs``, ``n_steps``, ``batch_size``, ``n_epochs``, ``width`` and ``learning_rate``.
    :param window: Number of observations in the window of a transition.
    """

    def __init__(self, env_id: str, args: argparse.Namespace, window: int) -> None:
        self.batch_size, self.n_epochs = args.batch_size, args.n_epochs
        self.steps = args.n_envs * args.n_steps
        th.manual_seed(0)
        env = gym.make(env_id)  # for the spaces, as DummyVectorEnv has those of the unwrapped environments
        space, actions = env.observation_space, env.action_space
        assert isinstance(actions, gym.spaces.Discrete)
        envs = DummyVectorEnv([lambda: gym.make(env_id)] * args.n_envs)
        envs.seed(0)
        core = Recurrent(layer_num=1, state_shape=space.shape, action_shape=args.width, hidden_layer_size=args.width)
        actor = DiscreteActor(preprocess_net=core, action_shape=actions.n, hidden_sizes=HEAD, softmax_output=False)
        critic = DiscreteCritic(preprocess_net=core, hidden_sizes=HEAD)
        self.parameters = sum(parameter.numel() for parameter in ActorCritic(actor, critic).parameters())
        self.policy = DiscreteActorPolicy(actor=actor, action_space=actions, observation_space=space)
        optimizer = AdamOptimizerFactory(lr=args.learning_rate)
        self.algorithm = PPO(
            policy=self.policy, critic=critic, optim=optimizer, max_grad_norm=0.5, max_batchsize=args.batch_size
        )
        buffer = VectorReplayBuffer(self.steps, args.n_envs, stack_num=window)
        self.collector = Collector(self.algorithm, envs, buffer)
        self.collector.reset()

    def run_iteration(self) -> dict[str, float]:
        """:return: The CPU seconds of one rollout and one update."""
        start = clock()
        with policy_within_training_step(self.policy):
            self.collector.collect(n_step=self.steps)
            collected = clock()
            self.algorithm.update(buffer=self.collector.buffer, batch_size=self.batch_size, repeat=self.n_epochs)
            self.collector.reset_buffer(keep_statistics=True)
        end = clock()
        return {"collect": collected - start, "update": end - collected, "overall": end - start}
