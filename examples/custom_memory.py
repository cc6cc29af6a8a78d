"""
A user-defined memory: a class, one line that registers it, and its name in `policy_kwargs`.

    python examples/custom_memory.py

It keeps running averages of all inputs with different decays (memory traces: Eberhard et al. 2025,
https://arxiv.org/abs/2503.15200). `tests/test_examples.py` verifies its contract with `sb3_cyborg.testing`; do so with yours.
"""

import argparse

import torch as th
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_cyborg import MemoryPPO, SequenceModel, State, make_memory_vec_env, register_memory


class TraceMemory(SequenceModel):
    """``num_traces`` running averages of the inputs, the i-th over about 2^i steps. The read is a linear map of them."""

    decays: th.Tensor

    def __init__(self, input_dim: int, memory_dim: int = 64, num_traces: int = 6) -> None:  # the options
        super().__init__()
        self.input_dim, self.output_dim, self.num_traces = input_dim, memory_dim, num_traces
        self.register_buffer("decays", 1 - 0.5 ** th.arange(num_traces).float())
        self.read = th.nn.Linear(num_traces * input_dim, memory_dim)

    def get_initial_state(self, batch_size: int, device: th.device | str | None = None) -> State:
        shape = (batch_size, self.num_traces, self.input_dim)  # batch first, as in every entry of a state
        return {"traces": th.zeros(shape, dtype=self.dtype, device=device or self.read.weight.device)}

    def forward_step(
        self, x: th.Tensor, state: State, mask: th.Tensor | None = None
    ) -> tuple[th.Tensor, State, dict[str, th.Tensor]]:
        if mask is not None:
            state = self.reset_states(state, mask)  # at the start of an episode, before the read
        decays = self.decays.unsqueeze(-1)
        traces = decays * state["traces"] + (1 - decays) * x.unsqueeze(1)  # a new tensor: states must not change in place
        return self.read(state["traces"].flatten(1)), {"traces": traces}, {}


register_memory("traces", TraceMemory)  # at import, so that a saved model can be loaded after it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000, help="environment steps to train for (default: %(default)s)")
    args = parser.parse_args()
    env = make_memory_vec_env("sb3_cyborg/MemoryChain-v0", n_envs=16, seed=0)
    kwargs = {"encoder": "gru", "memory": "traces", "memory_kwargs": {"num_traces": 5}}
    model = MemoryPPO("MlpPolicy", env, n_steps=128, learning_rate=1e-3, ent_coef=0.01, seed=0, policy_kwargs=kwargs)
    model.learn(args.steps)
    mean, _ = evaluate_policy(model, env, n_eval_episodes=50)
    print(f"Return {mean:.2f} after {model.num_timesteps:,} steps; at random 0, at most 1.")


if __name__ == "__main__":
    main()
