"""Lines about a run for the command line: its sizes before training, and the next commands after it."""

from sb3_cyborg import kernels
from sb3_cyborg.trainers.checkpoints import trust_flag
from sb3_cyborg.trainers.trainer_v7 import TrainerV7


def rollout_size(trainer: TrainerV7) -> int:
    """:return: Transitions of a rollout, of all environments of all processes."""
    return trainer.model.n_steps * trainer.model.total_envs


def describe_sizes(trainer: TrainerV7) -> str:
    """
    :param trainer: A trainer that is about to train.
    :return: The sizes that its config leads to, in lines of a name and values. The words are those of the config.
    """
    model, config, rollout = trainer.model, trainer.config, rollout_size(trainer)
    assert model.seq_len is not None
    sequences = model.batch_size // model.seq_len
    processes = f" in {trainer.ranks.size} processes" if trainer.ranks.size > 1 else ""
    parameters = sum(parameter.numel() for parameter in model.policy.parameters() if parameter.requires_grad)
    rows = {
        "rollout": f"n_envs {model.total_envs}{processes} x n_steps {model.n_steps} = {rollout:,} transitions",
        "minibatch": f"batch_size {model.batch_size:,} transitions = {sequences} x seq_len {model.seq_len}",
        "update": f"n_epochs {model.n_epochs} x {-(-rollout // model.batch_size)} minibatches, burn_in {model.burn_in}",
        "agent": f"encoder {config.encoder}, memory {config.memory}, {parameters:,} parameters",
        "device": f"{model.device}, {kernels.describe()}" if model.device.type == "cpu" else str(model.device),
    }
    return "\n".join(f"  {name:<9} {text}" for name, text in rows.items())


def short_run_note(trainer: TrainerV7) -> str:
    """
    :param trainer: A trainer that is about to train.
    :return: A sentence if fewer steps are left than a rollout has, otherwise an empty string.
    """
    left, rollout = trainer.config.total_timesteps - trainer.model.num_timesteps, rollout_size(trainer)
    if left >= rollout:
        return ""
    total = trainer.config.total_timesteps
    return (
        f"`total_timesteps`={total:,} leaves {left:,} steps, less than a rollout of {rollout:,}: a whole rollout is trained. "
        "A smaller `n_steps` makes rollouts shorter."
    )


def next_commands(trainer: TrainerV7, inspectable: bool, has_pictures: bool) -> list[str]:
    """
    :param trainer: A trainer whose run is complete.
    :param inspectable: Whether the agent has a memory or attention to look at.
    :param has_pictures: Whether the environment renders pictures.
    :return: Commands that show, evaluate and export the run.
    """
    run, trust = trainer.run, trust_flag(trainer.config)
    return [
        f"sb3-cyborg eval {run}{trust}",
        f"sb3-cyborg plot {run} --output curve.png",
        *([f"sb3-cyborg inspect {run}{trust} --html memory.html"] if inspectable else []),
        *([f"sb3-cyborg enjoy {run}{trust} --video agent.gif"] if has_pictures else []),
        f"sb3-cyborg export {run}{trust} --output agent.onnx",
    ]
