"""``TrainerV7``: a config in, a trained agent and its files out."""

import contextlib
import datetime
import platform
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch as th
import yaml
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, ConvertCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.type_aliases import MaybeCallback
from stable_baselines3.common.vec_env import VecEnv, VecFrameStack, VecNormalize, sync_envs_normalization

from sb3_cyborg.checks import check_positive, unknown_name
from sb3_cyborg.envs import make_memory_vec_env
from sb3_cyborg.memory_ppo.memory_ppo import MemoryPPO
from sb3_cyborg.trainers import callbacks, checkpoints
from sb3_cyborg.trainers.config import RESUME_KEYS, TrainerConfig

SelfTrainerV7 = TypeVar("SelfTrainerV7", bound="TrainerV7")

EVAL_SEED_OFFSET = 10_000
"""Evaluation episodes have seeds of their own, the same ones in each evaluation."""

SESSIONS_FILE = "sessions.yaml"
PACKAGES = (
    "sb3-cyborg",
    "stable-baselines3",
    "sb3-contrib",
    "torch",
    "gymnasium",
    "numpy",
    "popgym",
    "minigrid",
    "crafter",
    "minerl",
)


class TrainerV7:
    """
    Train a :class:`~sb3_cyborg.memory_ppo.memory_ppo.MemoryPPO` from a config, and keep its files.

    Config → environments → ``MemoryPPO`` → callbacks → files; there is no maths here::

        trainer = TrainerV7({"env": "CartPole-v1", "encoder": "mamba", "memory": {"type": "pmm", "num_slots": 16}})
        trainer.train(total_timesteps=100_000)
        trainer.evaluate(n_episodes=20)
        trainer.save("model.pt")

    A run has a folder, made when training begins:

    ======================== ==========================================================================================
    ``config.yaml``          all settings, also those that were not given, with the seed: ``TrainerV7("…/config.yaml")``
                             repeats the run
    ``sessions.yaml``        when the run was started and resumed, at which step, with which versions of what
    ``checkpoints/``         ``step_….zip``, the last few of them
    ``best_model.zip``       the checkpoint with the best evaluation
    ``final_model.zip``      the checkpoint at the end
    ``monitor.csv``          a row for each training episode, as SB3's ``Monitor`` writes it
    ``evaluations.npz``      the evaluations, as SB3's ``EvalCallback`` writes them
    ``tensorboard/``         scalars and histograms
    ``wandb/``, ``wandb_id`` of Weights & Biases
    ======================== ==========================================================================================

    A checkpoint is one file, which ``MemoryPPO.load`` reads, too. It holds weights, optimizer, counters, the statistics of
    ``VecNormalize`` and the random states of Python, NumPy and PyTorch. Files are written aside, flushed to the disk and then
    renamed: a run that is killed at any moment leaves whole files only, and loses at most one ``checkpoint_interval``.

    *Resuming* (:meth:`resume`) restores all of that; schedules go on towards the same total. It does not restore what goes on
    inside of the environments: episodes begin anew, from seeds that depend on the run's seed and the step. So a resumed run
    can be repeated, but is identical to one that was never interrupted only where episodes end with the rollout and have no
    randomness of their own.

    :param config: Settings by name, the path of a YAML file, or a :class:`~sb3_cyborg.trainers.config.TrainerConfig`, which
        describes them all.
    :raises ValueError: with a line for each setting that is unknown or cannot work.
    :raises ImportError: for an environment whose package is missing, with the command that installs it.
    """

    model: MemoryPPO
    """The agent."""
    env: VecEnv
    """The training environments."""

    def __init__(self, config: TrainerConfig | Mapping[str, Any] | str | Path) -> None:
        self._prepare(TrainerConfig.parse(config))
        self.env = self._make_env()
        self.model = MemoryPPO(self._policy(), self.env, **self.config.model_arguments())

    @classmethod
    def load(cls: type[SelfTrainerV7], path: str | Path, which: str = "best", **changes: Any) -> SelfTrainerV7:
        """
        Load what :meth:`save` or a run wrote, for evaluation or for further training.

        :param path: A file, or the folder of a run.
        :param which: Of a run: ``"best"`` by evaluation, ``"last"``, or the number of steps of a checkpoint.
        :param changes: Settings to change: only those that say how a run is carried out, ``device`` for one.
        :return: The trainer. If it trains, it does so as a new run; :meth:`resume` goes on with one.
        :raises ValueError: if there is no such file, if it is damaged, or was not written by a trainer.
        """
        checkpoint = checkpoints.read_checkpoint(checkpoints.find_checkpoint(path, which))
        _check_changes(changes, (*RESUME_KEYS, "log_dir", "run_name"))
        return cls._restore(checkpoint, {"run_name": None, **changes})

    @classmethod
    def resume(cls: type[SelfTrainerV7], run: str | Path, **changes: Any) -> SelfTrainerV7:
        """
        Go on with a run from its newest checkpoint, in its folder. One that has none yet starts anew, with the same seed.

        :param run: Folder of the run.
        :param changes: Settings to change: only those that say how a run is carried out, ``total_timesteps`` for one.
        :return: The trainer; :meth:`train` goes on.
        :raises ValueError: if there is no such run, or a setting cannot change.
        """
        run = Path(run)
        if not (run / checkpoints.CONFIG_FILE).is_file():
            raise ValueError(f"{str(run)!r} is no run: it has no {checkpoints.CONFIG_FILE}.")
        _check_changes(changes, RESUME_KEYS)
        checkpoints.remove_leftovers(run)
        checkpoint = checkpoints.newest_checkpoint(run)
        if checkpoint is None:
            trainer = cls(TrainerConfig.parse(run / checkpoints.CONFIG_FILE).changed(**changes))
        else:
            trainer = cls._restore(checkpoint, changes)
        trainer.run = run
        return trainer

    @classmethod
    def _restore(cls: type[SelfTrainerV7], checkpoint: checkpoints.Checkpoint, changes: Mapping[str, Any]) -> SelfTrainerV7:
        config = TrainerConfig.parse(checkpoint.config | dict(changes))
        trainer = cls.__new__(cls)
        trainer._prepare(config)
        trainer.env = trainer._make_env(checkpoint.normalize)
        trainer.model = MemoryPPO.load(checkpoint.path, env=trainer.env, device=config.device)
        trainer.model.verbose = config.verbose
        trainer._begin_episodes(checkpoint.progress["num_timesteps"])
        checkpoints.set_random_state(checkpoint.random)
        return trainer

    def _prepare(self, config: TrainerConfig) -> None:
        """What comes before the environments are made."""
        if config.seed is None:
            config = config.changed(seed=int(np.random.SeedSequence().generate_state(1)[0] % 2**31))
        self.config = config
        self.run: Path | None = None
        self._eval_env: VecEnv | None = None
        self._evaluation: callbacks.Evaluation | None = None
        if config.torch_threads is not None:
            th.set_num_threads(config.torch_threads)

    # --- environments

    def _make_env(self, normalize: VecNormalize | None = None) -> VecEnv:
        """:return: The training environments; ``normalize`` brings statistics of a checkpoint."""
        config = self.config
        env = self._plain_env(config.num_envs, config.seed)
        if normalize is not None:
            normalize.set_venv(env)
            return normalize
        if (arguments := config.normalize_arguments()) is not None:
            env = self._normalized(env, arguments)
        return env

    def _plain_env(self, num_envs: int, seed: int | None, render_mode: str | None = None) -> VecEnv:
        config = self.config
        # Native environments do not render in a window.
        kwargs = config.env_kwargs if render_mode is None else {**config.env_kwargs, "render_mode": render_mode}
        vec_env = config.vec_env if render_mode is None else "dummy"
        env = make_memory_vec_env(config.env, num_envs, seed=seed, env_kwargs=kwargs, vec_env=vec_env)
        space = env.observation_space
        if config.frame_stack > 1:
            parts = space.spaces.values() if isinstance(space, spaces.Dict) else [space]
            if not all(isinstance(part, spaces.Box) for part in parts):
                raise ValueError(f"`frame_stack`={config.frame_stack} needs Box observations, but {config.env!r} has {space}.")
            env = VecFrameStack(env, config.frame_stack)
        return env

    def _normalized(self, env: VecEnv, arguments: dict[str, Any]) -> VecNormalize:
        space = env.observation_space
        parts = space.spaces if isinstance(space, spaces.Dict) else {"": space}
        keys = arguments.get("norm_obs_keys") or parts
        if arguments.get("norm_obs", True):
            if images := [key for key in keys if key in parts and is_image_space(parts[key])]:
                raise ValueError(
                    f"`normalize` would normalize images{' ' + repr(images[0]) if images[0] else ''}, which the policy "
                    "divides by 255 already: use {norm_obs: false}, or name the other observations in `norm_obs_keys`."
                )
            if isinstance(space, spaces.Dict) and (unknown := [key for key in keys if key not in parts]):
                raise unknown_name("key in `norm_obs_keys`", unknown[0], parts)
        try:
            return VecNormalize(env, **arguments)
        except (TypeError, ValueError) as error:
            raise ValueError(f"`normalize` cannot be used for {self.config.env!r}: {error}") from error

    def _begin_episodes(self, num_timesteps: int) -> None:
        """Begin episodes for a model that was loaded: seeded by the step, and without a trace in the normalization."""
        assert self.config.seed is not None
        self.env.seed(int(np.random.SeedSequence([self.config.seed, num_timesteps]).generate_state(1)[0] % 2**31))
        normalize = self.model.get_vec_normalize_env()
        if normalize is not None:
            normalize.training = False
        obs: Any = self.model.get_env().reset()  # type: ignore[union-attr]  # it was loaded with one
        if normalize is not None:
            normalize.training = True
        self.model._last_obs = obs
        self.model._last_episode_starts = np.ones(self.env.num_envs, dtype=bool)

    def _policy(self) -> str:
        policy, space = self.config.policy, self.env.observation_space
        if policy.startswith("Cnn") and not is_image_space(space):
            raise ValueError(f"`policy`={policy!r} needs images, but {self.config.env!r} has {space}; 'auto' picks what fits.")
        if policy != "auto":
            return policy
        if isinstance(space, spaces.Dict):
            return "MultiInputPolicy"
        return "CnnPolicy" if is_image_space(space) else "MlpPolicy"

    # --- what users call

    def train(self: SelfTrainerV7, total_timesteps: int | None = None, callback: MaybeCallback = None) -> SelfTrainerV7:
        """
        Train up to ``total_timesteps`` environment steps in all, those of a run that is resumed included.

        Ctrl-C, and any error, saves a checkpoint and says where, and is raised.

        :param total_timesteps: ``None`` takes the config's.
        :param callback: SB3 callbacks of your own.
        :return: The trainer.
        :raises ValueError: if the run has made that many steps already; for observations that are not finite.
        :raises KeyboardInterrupt: on Ctrl-C, and SIGTERM, after saving.
        """
        if total_timesteps is not None:
            check_positive(total_timesteps=total_timesteps)
            self.config = self.config.changed(total_timesteps=int(total_timesteps))
        run = self.open_run()
        self._describe_run(run)
        total, done = self.config.total_timesteps, self.model.num_timesteps
        with contextlib.ExitStack() as stack:
            mark = callbacks.RolloutMark()
            mark.num_timesteps_kept = done
            parts = [mark, *self._callbacks(run, stack), *_as_list(callback)]
            stack.enter_context(_stop_on_signals(mark))
            try:
                self.model.learn(total - done, callback=CallbackList(parts), reset_num_timesteps=False)
            except BaseException as error:
                self.model.num_timesteps = mark.num_timesteps_kept
                self._rescue(run, error)
                if mark.stop and isinstance(error, Exception):  # Ctrl-C ends processes of environments, too
                    raise KeyboardInterrupt(f"saved in {run}") from error
                raise
            self.model.num_timesteps = mark.num_timesteps_kept
            if mark.stop:
                self._rescue(run, KeyboardInterrupt())
                raise KeyboardInterrupt(f"saved in {run}")
            self._finish(run)
        return self

    def evaluate(self, n_episodes: int = 10, deterministic: bool = True) -> tuple[float, float]:
        """
        Play episodes with the agent as it is, in an environment of its own and always with the same seeds.

        :param n_episodes: How many.
        :param deterministic: Take the mode of the policy instead of a sample.
        :return: Mean and standard deviation of the returns (not normalized).
        """
        returns, _ = self.evaluate_episodes(n_episodes, deterministic)
        return float(np.mean(returns)), float(np.std(returns))

    def evaluate_episodes(self, n_episodes: int = 10, deterministic: bool = True) -> tuple[list[float], list[int]]:
        """
        :param n_episodes: How many.
        :param deterministic: Take the mode of the policy instead of a sample.
        :return: Return and length of each episode.
        """
        check_positive(n_episodes=n_episodes)
        if self._eval_env is None:
            self._eval_env = self.make_eval_env()
        self._sync_statistics(self._eval_env)
        assert self.config.seed is not None
        self._eval_env.seed((self.config.seed + EVAL_SEED_OFFSET) % 2**31)
        result: Any = evaluate_policy(self.model, self._eval_env, n_episodes, deterministic, return_episode_rewards=True)
        return [float(value) for value in result[0]], [int(length) for length in result[1]]

    def make_eval_env(self, render_mode: str | None = None) -> VecEnv:
        """
        :param render_mode: Gymnasium's; ``None`` leaves it to the environment.
        :return: One environment as in training, with the statistics of the moment, which it does not change.
        """
        env = self._plain_env(1, self.config.seed, render_mode)
        if (arguments := self.config.normalize_arguments()) is not None:
            env = VecNormalize(env, **{**arguments, "norm_reward": False}, training=False)
        env = MemoryPPO._wrap_env(env, verbose=0, monitor_wrapper=False)
        self._sync_statistics(env)
        return env

    def _sync_statistics(self, env: VecEnv) -> None:
        if self.model.get_vec_normalize_env() is not None:
            sync_envs_normalization(self.model.get_env(), env)  # type: ignore[arg-type]  # it has one

    def save(self, path: str | Path) -> None:
        """
        Write the agent, with all that goes with it, into one file of exactly this name, which ``MemoryPPO.load`` reads, too.

        :param path: The file; its folder is made if it is missing.
        :raises ValueError: for weights that are not finite.
        """
        checkpoints.save_checkpoint(path, self.model, self.config)

    def close(self) -> None:
        """Close the environments."""
        self.env.close()
        if self._eval_env is not None:
            self._eval_env.close()

    # --- a run

    def open_run(self) -> Path:
        """
        :return: The folder of the run, which is made if there is none yet; :meth:`train` does it by itself.
        :raises ValueError: if the run has come to its end, or if there is another one of its name.
        """
        config, done = self.config, self.model.num_timesteps
        if done >= config.total_timesteps:
            raise ValueError(
                f"The run has made {done:,} steps already; `total_timesteps`={config.total_timesteps:,} must be more to go on."
            )
        if self.run is None:
            self.run = _new_run(Path(config.log_dir), config.run_name, config.env)
        return self.run

    def _describe_run(self, run: Path) -> None:
        checkpoints.write_text(run / checkpoints.CONFIG_FILE, self.config.to_yaml())
        sessions = run / SESSIONS_FILE
        before = sessions.read_text(encoding="utf-8") if sessions.is_file() else ""
        checkpoints.write_text(sessions, before + yaml.safe_dump([_session(self.model)], sort_keys=False))

    def _callbacks(self, run: Path, stack: contextlib.ExitStack) -> list[BaseCallback]:
        config = self.config
        wandb = callbacks.start_wandb(run, config.wandb_project, config.model_dump()) if config.wandb else None
        board = run / "tensorboard" if config.tensorboard else None
        logger = callbacks.make_logger(board, config.verbose, self.model.num_timesteps, wandb)
        stack.callback(logger.close)
        self.model.set_logger(logger)
        self._evaluation = None
        parts: list[BaseCallback] = [monitor := callbacks.MonitorLog(run, config.env)]
        stack.callback(monitor.close)
        if config.histograms and (config.tensorboard or config.wandb):
            parts.append(callbacks.WriteGates())
        if config.eval_interval:
            best = run / checkpoints.BEST
            before = checkpoints.read_checkpoint(best).progress["mean_return"] if best.is_file() else -np.inf
            self._evaluation = callbacks.Evaluation(
                run,
                config.eval_interval,
                lambda: self.evaluate_episodes(config.eval_episodes),
                lambda mean: checkpoints.save_checkpoint(best, self.model, self.config, mean_return=mean),
                before,
            )
            parts.append(self._evaluation)
        if config.checkpoint_interval:
            parts.append(callbacks.Checkpoints(config.checkpoint_interval, lambda: self._save_checkpoint(run)))
        if config.progress_bar:
            parts.append(progress := callbacks.ProgressDisplay())
            stack.callback(progress.close)
        return parts

    def _save_checkpoint(self, run: Path) -> Path:
        path = checkpoints.checkpoint_path(run, self.model.num_timesteps)
        checkpoints.save_checkpoint(path, self.model, self.config)
        for old in checkpoints.list_checkpoints(run)[: -self.config.keep_checkpoints]:
            old.unlink()
        return path

    def _finish(self, run: Path) -> None:
        if self._evaluation is not None:
            self._evaluation.run_now()
        self._save_checkpoint(run)
        checkpoints.save_checkpoint(run / checkpoints.FINAL, self.model, self.config)

    def _rescue(self, run: Path, error: BaseException) -> None:
        """Save what there is, and say where; nothing here may hide the error."""
        path = checkpoints.checkpoint_path(run, self.model.num_timesteps)
        try:
            # One that is there is from the start of the rollout that broke off, so it can be gone on with exactly.
            where = f"saved {path if path.exists() else self._save_checkpoint(run)}"
        except Exception as failure:
            where = f"nothing could be saved ({failure})"
        print(f"Stopped by {type(error).__name__} after {self.model.num_timesteps:,} steps: {where}.", file=sys.stderr)
        print(f"Go on with: sb3-cyborg train --resume {run}", file=sys.stderr)


def _check_changes(changes: Mapping[str, Any], allowed: tuple[str, ...]) -> None:
    for key in changes:
        if key not in TrainerConfig.model_fields:
            raise unknown_name("config key", key, TrainerConfig.model_fields)
        if key not in allowed:
            raise ValueError(
                f"`{key}` cannot change in a run that goes on, only {', '.join(allowed)} can; start a new run for it."
            )


def _new_run(log_dir: Path, name: str | None, env: str) -> Path:
    """:return: A folder that no run has yet, made."""
    if name is not None:
        run = log_dir / name
        if (run / checkpoints.CONFIG_FILE).exists():
            raise ValueError(
                f"There is a run {str(run)!r} already: give another `run_name`, or go on with it by `--resume {run}`."
            )
        run.mkdir(parents=True, exist_ok=True)
        return run
    stem, number = env.replace("/", "-").replace(":", "-"), 1
    while True:
        with contextlib.suppress(FileExistsError):  # another run may have been quicker
            (log_dir / f"{stem}_{number}").mkdir(parents=True)
            return log_dir / f"{stem}_{number}"
        number += 1


def _session(model: MemoryPPO) -> dict[str, Any]:
    """:return: What a run was started or resumed with."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {
        "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "num_timesteps": int(model.num_timesteps),
        "command": " ".join(sys.argv),
        "platform": platform.platform(),
        "device": str(model.device),
        "versions": versions,
    }


def _as_list(callback: MaybeCallback) -> list[BaseCallback]:
    if callback is None:
        return []
    if isinstance(callback, list):
        return callback
    if isinstance(callback, BaseCallback):
        return [callback]
    return [ConvertCallback(callback)]


@contextlib.contextmanager
def _stop_on_signals(mark: callbacks.RolloutMark) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end training after the step that is being made; the second one does at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, _: Any) -> None:
        if mark.stop:
            raise KeyboardInterrupt
        mark.stop = True
        name = signal.Signals(number).name
        print(f"{name}: stopping after this step, or update; press Ctrl-C to stop at once.", file=sys.stderr)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
