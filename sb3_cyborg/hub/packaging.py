"""Makes the files of an agent for the Hub from a run, without a network."""

import datetime
import inspect
import json
import platform
import zipfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from sb3_cyborg.checks import check_positive
from sb3_cyborg.envs.vec_env import make_env_by_id
from sb3_cyborg.export import export_onnx
from sb3_cyborg.files import write_atomically, write_text
from sb3_cyborg.hub import files
from sb3_cyborg.hub.model_card import Agent, SeedResult, model_card
from sb3_cyborg.packages import package_versions
from sb3_cyborg.trainers.acting import ActingLoop, EpisodeResult
from sb3_cyborg.trainers.checkpoints import BEST, CONFIG, CONFIG_FILE, FINAL, find_checkpoint
from sb3_cyborg.trainers.config import TrainerConfig
from sb3_cyborg.trainers.config_file import read_yaml
from sb3_cyborg.trainers.trainer_v7 import TrainerV7
from sb3_cyborg.trainers.vocabulary import canonical
from sb3_cyborg.viewers.plotting import plot_learning_curves, same_settings
from sb3_cyborg.viewers.recording import enjoy
from sb3_cyborg.viewers.runs import rendered_env

VIDEO_EPISODES = 5
"""Episodes of the video, at most."""
VIDEO_STEPS = 500
"""Steps of the video, at most."""

SEED_OFFSET = 20_000
"""Distance from the seed of a run to that of its evaluation here; the evaluations during training have another one."""

OF_THE_MACHINE = ("log_dir", "run_name", "device", "wandb", "wandb_project", "progress_bar", "verbose")
"""Settings that are published with their defaults: they concern the machine or the person that trained the agent."""


def package_run(
    run: str | Path,
    folder: str | Path,
    repo_id: str,
    *,
    which: str = "best",
    n_eval_episodes: int = 20,
    deterministic: bool = True,
    seeds: bool = True,
    video: bool = True,
    device: str = "auto",
    trust: bool = False,
    report: Callable[[str], None] = print,
) -> list[Path]:
    """
    Write the files that :func:`~sb3_cyborg.hub.push_to_hub` uploads.

    The agent is evaluated. So are the agents of finished runs beside it whose settings differ in the seed alone, so that the
    model card shows all seeds, and not the best one. Paths, the name of the run and the project of W&B are not published.

    :param run: Folder of a run of ``TrainerV7``, or a file that it saved.
    :param folder: Folder for the files, a new or empty one.
    :param repo_id: Repository, as ``"<user or organization>/<name>"``; the model card names it.
    :param which: Which checkpoint of a run: ``"best"``, ``"last"``, or its number of steps.
    :param n_eval_episodes: Number of episodes of each evaluation, at least 1.
    :param deterministic: Take the mode of the policy instead of a sample.
    :param seeds: Evaluate the runs of other seeds, too.
    :param video: Record a GIF, if the environment renders pictures.
    :param device: Device of the agent.
    :param trust: As for :meth:`TrainerV7.load <sb3_cyborg.trainers.trainer_v7.TrainerV7.load>`. A model with pickled objects
        is refused in any case.
    :param report: Called with a line for each step, and for each part that is left out, with the reason.
    :return: The files.
    :raises ValueError: for a run that cannot be loaded, for a model with pickled objects, and for a folder with files.
    :raises ImportError: if a package is missing, with the command that installs it.
    """
    check_positive(n_eval_episodes=n_eval_episodes)
    run, folder = Path(run), Path(folder)
    checkpoint = find_checkpoint(run, which)
    files.check_is_empty(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with closing(TrainerV7.load(checkpoint, device=device, trust=trust)) as trainer:
        config = published(trainer.config)
        copy_model(checkpoint, folder / files.MODEL, config)
        _check_has_no_pickle(type(trainer.model), folder / files.MODEL)
        write_text(folder / files.CONFIG, config.to_yaml())
        results = [_evaluate(trainer, n_eval_episodes, deterministic)]
        report(f"seed {results[0].seed}: {results[0]}")
        others = other_seeds(run) if seeds and run.is_dir() else []
        for other in others:
            with closing(TrainerV7.load(other, which, device=device, trust=trust)) as trained:
                results.append(_evaluate(trained, n_eval_episodes, deterministic))
            report(f"seed {results[-1].seed}: {results[-1]}, {other}")
        _export(trainer, folder / files.ONNX, report)
        _draw_curve([run, *others], folder / files.CURVE, report)
        if video:
            _record(trainer, deterministic, folder / files.VIDEO, report)
        agent = Agent(
            repo_id=repo_id,
            algorithm=type(trainer.model).__name__,
            config=config,
            observation_space=trainer.model.observation_space,
            action_space=trainer.model.action_space,
            task=_describe_task(config),
            checkpoint=checkpoint_name(checkpoint),
            deterministic=deterministic,
            results=results,
            versions={"python": platform.python_version(), **package_versions()},
            files=[name for name in files.FILES if (folder / name).is_file()],
        )
    write_text(folder / files.RESULTS, json.dumps(_results(agent), indent=2))
    write_text(folder / files.CARD, model_card(agent))
    report(f"model card: {folder / files.CARD}")
    return [folder / name for name in files.FILES if (folder / name).is_file()]


def published(config: TrainerConfig) -> TrainerConfig:
    """
    :param config: Settings of a run.
    :return: The same, with defaults for the settings that concern the machine or the person.
    """
    return config.changed(**{key: TrainerConfig.model_fields[key].default for key in OF_THE_MACHINE})


def copy_model(source: Path, target: Path, config: TrainerConfig) -> None:
    """
    Copy a checkpoint, with another config in it.

    :param source: The checkpoint.
    :param target: The copy.
    :param config: The settings to write.
    """

    def write(file: Any) -> None:
        with zipfile.ZipFile(source) as before, zipfile.ZipFile(file, "w") as after:
            for entry in before.infolist():
                after.writestr(entry, config.to_yaml() if entry.filename == CONFIG else before.read(entry))

    write_atomically(target, write)


def _check_has_no_pickle(algorithm: Any, path: Path) -> None:
    """:raises ValueError: for a model that loads with ``trust=True`` only."""
    try:
        algorithm.load(path, device="cpu")
    except ValueError as error:
        path.unlink()
        raise ValueError(f"This model cannot be published, as nobody should load it without knowing you: {error}") from error


def checkpoint_name(checkpoint: Path) -> str:
    """
    :param checkpoint: File of a checkpoint.
    :return: A description of it for the model card.
    """
    known = {BEST: "the best model of the run by evaluation", FINAL: "the last model of the run"}
    return known.get(checkpoint.name, f"the checkpoint `{checkpoint.name}` of the run")


def _evaluate(trainer: TrainerV7, n_episodes: int, deterministic: bool) -> SeedResult:
    """:return: The evaluation of an agent, on other episodes than those which have chosen the best model of its run."""
    seed = trainer.config.seed
    assert seed is not None
    finished: list[EpisodeResult] = []
    with rendered_env(trainer) as env:
        loop = ActingLoop(trainer.model, env, deterministic=deterministic, seed=(seed + SEED_OFFSET) % 2**31)
        while len(finished) < n_episodes:
            finished += loop.step().finished
    returns, lengths = [result.total for result in finished], [result.length for result in finished]
    return SeedResult(seed, trainer.model.num_timesteps, returns, lengths)


def other_seeds(run: Path) -> list[Path]:
    """
    :param run: Folder of a run.
    :return: The finished runs beside it that were trained as long, with settings that differ in the seed alone.
    """
    if not (run / CONFIG_FILE).is_file():
        return []
    settings, steps = same_settings(run), _total_timesteps(run)
    folders = [path.parent for path in sorted(run.resolve().parent.glob(f"*/{FINAL}")) if path.parent != run.resolve()]
    return [
        folder
        for folder in folders
        if (folder / CONFIG_FILE).is_file() and same_settings(folder) == settings and _total_timesteps(folder) == steps
    ]


def _total_timesteps(run: Path) -> Any:
    return canonical(read_yaml(run / CONFIG_FILE)).get("total_timesteps")


def _export(trainer: TrainerV7, path: Path, report: Callable[[str], None]) -> None:
    """Export the agent to ONNX, where the packages for it are installed and the agent can be exported."""
    try:
        export_onnx(trainer.model, path, normalize=trainer.normalize)
    except (ImportError, ValueError) as error:
        report(f"no {path.name}: {error}")


def _draw_curve(runs: list[Path], path: Path, report: Callable[[str], None]) -> None:
    """Draw the learning curve, if the run has a folder with finished episodes."""
    if not runs[0].is_dir():
        report(f"no learning curve: {runs[0]} is a file, the episodes of training are in the folder of its run")
        return
    try:
        plot_learning_curves(runs, path)
    except ValueError as error:
        report(f"no learning curve: {error}")


def _record(trainer: TrainerV7, deterministic: bool, path: Path, report: Callable[[str], None]) -> None:
    """Record a GIF, if the environment renders pictures."""
    try:
        with rendered_env(trainer, "rgb_array") as env:
            seed = trainer.config.seed
            enjoy(
                trainer.model,
                env,
                video=path,
                n_episodes=VIDEO_EPISODES,
                max_steps=VIDEO_STEPS,
                deterministic=deterministic,
                seed=seed,
                report=lambda _: None,
            )
    except ValueError as error:
        report(f"no video: {error}")


def _describe_task(config: TrainerConfig) -> str:
    """:return: The first paragraph of the docstring of the environment's class, or an empty string."""
    env = make_env_by_id(config.env, **config.env_kwargs)
    try:
        paragraph = (inspect.getdoc(type(env.unwrapped)) or "").split("\n\n")[0]
    finally:
        env.close()
    return " ".join(paragraph.split())


def _results(agent: Agent) -> dict[str, Any]:
    """:return: The content of the file of results, under the keys of huggingface_sb3, with those of all seeds."""
    own = agent.results[0]
    return {
        "mean_reward": own.mean,
        "std_reward": own.std,
        "is_deterministic": agent.deterministic,
        "n_eval_episodes": len(own.returns),
        "eval_datetime": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "seeds": [
            {
                "seed": result.seed,
                "num_timesteps": result.num_timesteps,
                "mean_reward": result.mean,
                "std_reward": result.std,
                "returns": result.returns,
                "lengths": result.lengths,
            }
            for result in agent.results
        ],
    }
