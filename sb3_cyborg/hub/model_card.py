"""The model card of an agent: the page of its repository, with the metadata that the Hub reads."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from gymnasium import spaces

from sb3_cyborg.hub import files
from sb3_cyborg.trainers.checkpoints import trust_flag
from sb3_cyborg.trainers.config import TrainerConfig
from sb3_cyborg.trainers.config_file import dump_yaml

LIBRARY = "stable-baselines3"
"""
``library_name`` of the metadata. It is SB3's, as in RL Zoo: the Hub counts downloads of ``.zip`` files and has a filter for
names that it knows only. The tags name this package.
"""

DESCRIPTIONS = {
    files.MODEL: "the model with its config, for `MemoryPPO.load` and `TrainerV7.load`; no pickled objects",
    files.ONNX: "one step of the agent as a graph, for onnxruntime: no PyTorch is needed",
    files.CONFIG: "all settings of the run",
    files.RESULTS: "return and length of each episode of the evaluation",
    files.CURVE: "the learning curve",
    files.VIDEO: "episodes of the agent",
}


@dataclass(frozen=True)
class SeedResult:
    """
    The evaluation of one seed, over E episodes.

    :param seed: Seed of the training.
    :param num_timesteps: Environment steps of training.
    :param returns: Return of each episode, not normalized.
    :param lengths: Number of steps of each episode.
    """

    seed: int
    num_timesteps: int
    returns: list[float]
    lengths: list[int]

    @property
    def mean(self) -> float:
        """Mean of the returns."""
        return float(np.mean(self.returns))

    @property
    def std(self) -> float:
        """Standard deviation of the returns."""
        return float(np.std(self.returns))

    def __str__(self) -> str:
        return f"return {self.mean:.3f} +/- {self.std:.3f} (std of {len(self.returns)} episodes)"


@dataclass(frozen=True)
class Agent:
    """
    The facts of a model card.

    :param repo_id: Repository, as ``"<user or organization>/<name>"``.
    :param algorithm: Name of the algorithm's class.
    :param config: Settings of the run, as they are published.
    :param observation_space: Space of the observations.
    :param action_space: Space of the actions.
    :param task: A sentence about the environment, or an empty string.
    :param checkpoint: Description of the checkpoint, e.g. "the last model of the run".
    :param deterministic: Whether the evaluation took the mode of the policy.
    :param results: The evaluation of this agent, then those of the other seeds.
    :param versions: Versions of the packages, by name.
    :param files: Names of the files of the repository, the model card apart.
    """

    repo_id: str
    algorithm: str
    config: TrainerConfig
    observation_space: spaces.Space[Any]
    action_space: spaces.Space[Any]
    task: str
    checkpoint: str
    deterministic: bool
    results: list[SeedResult]
    versions: dict[str, str]
    files: list[str]

    @property
    def env_id(self) -> str:
        """Id of the environment, without the module that registers it."""
        return self.config.env.rpartition(":")[2]

    @property
    def env_module(self) -> str:
        """The module that registers the environment, if the config names one, or an empty string."""
        return self.config.env.rpartition(":")[0]


def model_card(agent: Agent) -> str:
    """
    :param agent: The facts.
    :return: The model card: metadata as YAML, then Markdown.
    :raises ImportError: if huggingface_hub is missing, with the command that installs it.
    """
    sections = [_introduction, _task, _returns, _use, _reproduction, _settings, _files]
    text = "\n\n".join("\n".join(section(agent)) for section in sections)
    return f"---\n{_metadata(agent)}\n---\n\n{text}\n"


def _metadata(agent: Agent) -> str:
    try:
        from huggingface_hub import EvalResult, ModelCardData
    except ImportError as error:
        raise ImportError('The Hub needs huggingface_hub: pip install "sb3-cyborg[hub]"') from error
    own = agent.results[0]
    tags = [
        agent.env_id,
        "deep-reinforcement-learning",
        "reinforcement-learning",
        "stable-baselines3",
        "sb3-cyborg",
        "memory",
        "partially-observable",
        *(["onnx"] if files.ONNX in agent.files else []),
    ]
    result = EvalResult(
        task_type="reinforcement-learning",
        task_name="reinforcement-learning",
        dataset_type=agent.env_id,
        dataset_name=agent.env_id,
        metric_type="mean_reward",
        metric_name="mean_reward",
        metric_value=f"{own.mean:.2f} +/- {own.std:.2f}",  # the form of huggingface_sb3
    )
    data = ModelCardData(
        library_name=LIBRARY,
        pipeline_tag="reinforcement-learning",
        tags=tags,
        model_name=agent.algorithm,
        eval_results=[result],
    )
    return data.to_yaml()


def _introduction(agent: Agent) -> Iterator[str]:
    config = agent.config
    yield f"# {agent.algorithm} for {agent.env_id}\n"
    yield (
        f"An agent with memory, trained on `{agent.env_id}`: `{agent.algorithm}` of `sb3_cyborg`, for "
        f"Stable-Baselines3, with the encoder `{config.encoder}` and the memory `{config.memory}`."
    )
    if files.VIDEO in agent.files:
        yield f"\n![episodes of the agent]({files.VIDEO})"


def _task(agent: Agent) -> Iterator[str]:
    yield "## Task\n"
    if agent.task:
        yield f"{agent.task}\n"
    rows = {"environment": agent.env_id, "observations": agent.observation_space, "actions": agent.action_space}
    if agent.config.env_kwargs:
        rows["arguments"] = agent.config.env_kwargs
    yield "| | |\n|---|---|"
    for name, value in rows.items():
        yield f"| {name} | `{_one_line(value)}` |"


def _returns(agent: Agent) -> Iterator[str]:
    own, several = agent.results[0], len(agent.results) > 1
    kind = "deterministic actions" if agent.deterministic else "sampled actions"
    yield "## Return\n"
    yield f"Mean and standard deviation of {len(own.returns)} episodes with {kind}. The model is {agent.checkpoint}; none of"
    yield "these episodes was used to choose it.\n"
    yield "| seed | steps of training | return | lowest | highest | length |\n|---:|---:|---:|---:|---:|---:|"
    for number, result in enumerate(agent.results):
        mark = " (this model)" if several and number == 0 else ""
        yield (
            f"| {result.seed}{mark} | {result.num_timesteps:,} | {result.mean:.3f} ± {result.std:.3f} "
            f"| {min(result.returns):.3f} | {max(result.returns):.3f} | {np.mean(result.lengths):.1f} |"
        )
    if several:
        means = [result.mean for result in agent.results]
        yield f"\nOver {len(means)} seeds: {np.mean(means):.3f} ± {np.std(means):.3f} (standard deviation of their means)."
    if files.CURVE in agent.files:
        yield f"\n![learning curve]({files.CURVE})"


def _use(agent: Agent) -> Iterator[str]:
    yield "## How to use\n\nWith Stable-Baselines3:\n"
    yield '```sh\npip install ".[train,hub]"  # in a checkout of sb3_cyborg\n```\n'
    yield "\n".join(["```python", *_sb3_code(agent), "```"])
    if files.ONNX in agent.files:
        yield "\nWithout PyTorch, through onnxruntime. Raw observations go in, actions of the environment come out:\n"
        yield "```sh\npip install ./runtime huggingface_hub  # in a checkout of sb3_cyborg\n```\n"
        yield "\n".join(["```python", *_onnx_code(agent), "```"])
    folder = agent.repo_id.rpartition("/")[2]
    yield "\nOn the command line:\n"
    yield f"```sh\nsb3-cyborg hub load {agent.repo_id} --output {folder}"
    yield f"sb3-cyborg eval {folder}/{files.MODEL}{trust_flag(agent.config)}\n```"


def _sb3_code(agent: Agent) -> Iterator[str]:
    if agent.env_module:
        yield f"import {agent.env_module}  # registers the environment"
    yield f"from sb3_cyborg import {agent.algorithm}, TrainerV7"
    yield "from sb3_cyborg.hub import load_from_hub\n"
    yield f'path = load_from_hub("{agent.repo_id}")'
    masks = ", action_masks=masks" if agent.config.use_masking else ""
    yield f"model = {agent.algorithm}.load(path)  # the agent: model.predict(observation, state, episode_start{masks})\n"
    yield "trainer = TrainerV7.load(path)  # the agent with its environment"
    yield "mean, std = trainer.evaluate(n_episodes=10)"


def _onnx_code(agent: Agent) -> Iterator[str]:
    yield "from huggingface_hub import hf_hub_download"
    yield "from sb3_cyborg_runtime import OnnxAgent\n"
    yield f'agent = OnnxAgent(hf_hub_download("{agent.repo_id}", "{files.ONNX}"))'
    yield "state = None  # at the start; later the state that `predict` has returned"
    if agent.config.use_masking:
        yield "action, state = agent.predict(observation, state, action_masks=masks)  # masks: True for legal actions"
    else:
        yield "action, state = agent.predict(observation, state)"


def _reproduction(agent: Agent) -> Iterator[str]:
    folder = agent.repo_id.rpartition("/")[2]
    yield "## Reproduce\n"
    yield f"```sh\nsb3-cyborg hub load {agent.repo_id} --output {folder}"
    yield f"sb3-cyborg train --config {folder}/{files.CONFIG}"
    for result in agent.results[1:]:
        yield f"sb3-cyborg train --config {folder}/{files.CONFIG} --seed {result.seed}"
    yield "```\n"
    yield f"Versions: {', '.join(f'{name} {version}' for name, version in agent.versions.items())}."


def _settings(agent: Agent) -> Iterator[str]:
    fields = TrainerConfig.model_fields
    changed = {key: value for key, value in agent.config.model_dump().items() if value != fields[key].default}
    yield f"## Config\n\nThe settings that differ from the defaults; `{files.CONFIG}` has all.\n"
    yield f"```yaml\n{dump_yaml(changed).strip()}\n```"


def _files(agent: Agent) -> Iterator[str]:
    yield "## Files\n\n| file | content |\n|---|---|"
    for name in (*agent.files, files.RESULTS):
        if name in DESCRIPTIONS:
            yield f"| `{name}` | {DESCRIPTIONS[name]} |"


def _one_line(value: Any) -> str:
    """:return: A value as text for a cell of a table."""
    return " ".join(str(value).split()).replace("|", "\\|")
