"""``TrainerV7``: trains an agent from a config and writes its files."""

import contextlib
import copy
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, ConvertCallback
from stable_baselines3.common.type_aliases import MaybeCallback
from stable_baselines3.common.vec_env import VecEnv, VecNormalize, unwrap_vec_normalize

from sb3_cyborg.checks import check_positive, unknown_name
from sb3_cyborg.memory_ppo.maskable import MaskableMemoryPPO
from sb3_cyborg.memory_ppo.memory_ppo import MemoryPPO
from sb3_cyborg.trainers import callbacks, checkpoints, logs, runs
from sb3_cyborg.trainers.acting import ActingLoop, EpisodeResult
from sb3_cyborg.trainers.config import RESUME_KEYS, TrainerConfig
from sb3_cyborg.trainers.config_file import read_yaml
from sb3_cyborg.trainers.environments import make_evaluation_env, make_training_env, policy_for, uses_masks
from sb3_cyborg.trainers.monitor import MonitorLog
from sb3_cyborg.trainers.run_lock import RunLock
from sb3_cyborg.trainers.vocabulary import canonical, merge

SelfTrainerV7 = TypeVar("SelfTrainerV7", bound="TrainerV7")

EVAL_SEED_OFFSET = 10_000
"""Added to the seed of the run for its evaluations, all of which use the same seeds."""


class TrainerV7:
    """
    Train a :class:`~sb3_cyborg.memory_ppo.memory_ppo.MemoryPPO` from a config, and write its files. It is a
    :class:`~sb3_cyborg.memory_ppo.maskable.MaskableMemoryPPO` if the environment has action masks::

        trainer = TrainerV7({"env": "CartPole-v1", "encoder": "mamba", "memory": {"type": "pmm", "num_slots": 16}})
        trainer.train(total_timesteps=100_000)
        trainer.evaluate(n_episodes=20)
        trainer.save("model.pt")

    A run has a folder, which is created when training begins:

    ======================== ==========================================================================================
    ``config.yaml``          all settings, including defaults and the seed: ``TrainerV7("…/config.yaml")`` repeats the run
    ``sessions.yaml``        for each start and resumption its time, step, command and package versions
    ``checkpoints/``         ``step_….zip``, the latest ones
    ``best_model.zip``       the checkpoint with the best evaluation
    ``final_model.zip``      the checkpoint at the end
    ``monitor.csv``          a row for each training episode, in the format of SB3's ``Monitor``
    ``evaluations.npz``      the evaluations, in the format of SB3's ``EvalCallback``
    ``tensorboard/``         scalars and histograms
    ``wandb/``, ``wandb_id`` files of Weights & Biases
    ``run.lock``             the lock of the run while it is trained: one process at a time writes into the folder
    ``old_1/``, …            files of the run before it was restarted
    ======================== ==========================================================================================

    A checkpoint is one file, which ``MemoryPPO.load`` reads as well. It holds weights, optimizer, counters, the statistics of
    ``VecNormalize`` and the random states of Python, NumPy and PyTorch. Files are written under another name, flushed to the
    disk and then renamed. So all files of a run that is killed are complete, and it loses at most ``save_freq`` steps.

    :meth:`resume` restores all of that, and schedules continue towards the same total. The inner state of the environments is
    not restored: episodes begin anew, from seeds that depend on the seed of the run and the step. So a resumed run can be
    repeated. It equals an uninterrupted run only where episodes end with the rollout and have no randomness of their own.

    :param config: Settings by key or alias, the path of a YAML file, or a
        :class:`~sb3_cyborg.trainers.config.TrainerConfig`, which describes them all.
    :raises ValueError: with one line for each setting that is unknown or cannot work.
    :raises ImportError: for an environment whose package is missing, with the command that installs it.
    """

    model: MemoryPPO
    """The agent."""
    config: TrainerConfig
    """The settings. ``seed`` and ``use_masking`` are no longer ``None`` where the constructor has chosen them."""

    def __init__(self, config: TrainerConfig | Mapping[str, Any] | str | Path) -> None:
        self._prepare(TrainerConfig.parse(config))
        env = make_training_env(self.config)
        self.config = self.config.changed(use_masking=uses_masks(self.config, env))
        try:
            self.model = _algorithm(self.config)(policy_for(self.config, env), env, **self.config.model_arguments())
        except TypeError as error:  # of a class that gets the options as keywords, e.g. the optimizer
            names = ("policy_kwargs", "encoder_kwargs", "memory_kwargs")
            given = [f"`{name}`={value}" for name in names if (value := getattr(self.config, name))]
            raise ValueError(f"The agent cannot be made with {', '.join(given) or 'these settings'}: {error}.") from error

    @classmethod
    def load(
        cls: type[SelfTrainerV7], path: str | Path, which: str = "best", *, trust: bool = False, **changes: Any
    ) -> SelfTrainerV7:
        """
        Load a checkpoint of a run or a file of :meth:`save`, for evaluation or for further training.

        :param path: A file, or the folder of a run.
        :param which: Which checkpoint of a run: ``"best"`` by evaluation, ``"last"``, or its number of steps.
        :param trust: Also load pickled objects and import the modules that the file names, which can run any code. Files of
            earlier versions need it, and environments of the form ``module:id`` whose module is not imported.
        :param changes: Settings to change, by key or alias: only those that decide how a run is carried out, e.g. ``device``.
        :return: The trainer. Further training is a new run; :meth:`resume` continues an existing one.
        :raises ValueError: if there is no such file, if it is damaged, if it was not written by a trainer, if it needs
            ``trust``, or if a setting cannot change.
        """
        checkpoint = checkpoints.read_checkpoint(checkpoints.find_checkpoint(path, which))
        changes = _checked_changes(changes, (*RESUME_KEYS, "log_dir", "run_name"))
        checkpoint.unpack(trust)
        return cls._restore(checkpoint, TrainerConfig.parse(merge(checkpoint.config, {"run_name": None, **changes})), trust)

    @classmethod
    def resume(
        cls: type[SelfTrainerV7], run: str | Path, *, restart: bool = False, trust: bool = False, **changes: Any
    ) -> SelfTrainerV7:
        """
        Resume a run in its folder, from the newest complete file of it: a checkpoint, the final or the best model. The file is
        printed. Damaged files are renamed, with a warning.

        Edits of the run's ``config.yaml`` are taken, and printed, for the settings that ``changes`` may hold.

        A run that was stopped before it had written any result starts again with the same seed. A run that has results but no
        complete file is refused; ``restart`` starts it anew.

        :param run: Folder of the run.
        :param restart: Start the run anew from its ``config.yaml``. Its files are moved into a folder ``old_<number>`` in it.
        :param trust: As for :meth:`load`.
        :param changes: Settings to change, by key or alias: only those that decide how a run is carried out, e.g.
            ``total_timesteps``.
        :return: The trainer; :meth:`train` continues the run.
        :raises ValueError: if there is no such run, if it has no complete file, if its files need ``trust``, or if a setting
            cannot change.
        :raises RunInUseError: if another trainer is training the run.
        """
        run, changes = Path(run), _checked_changes(changes, RESUME_KEYS)
        runs.check_is_run(run)
        with RunLock(run):
            path = None if restart else runs.file_to_resume(run)
            if path is None:
                config = read_yaml(run / checkpoints.CONFIG_FILE)
                checkpoints.check_modules(config, run / checkpoints.CONFIG_FILE, trust)
                trainer = cls(TrainerConfig.parse(config).changed(**changes))
                runs.start_anew(run)
            else:
                checkpoint = checkpoints.read_checkpoint(path)
                checkpoint.unpack(trust)
                trainer = cls._restore(checkpoint, runs.edited_config(run, checkpoint, changes, trust), trust)
                print(f"Resuming from {path}, after {trainer.model.num_timesteps:,} steps.", file=sys.stderr)
        trainer._attach_env()
        trainer.run = run
        return trainer

    @classmethod
    def _restore(
        cls: type[SelfTrainerV7], checkpoint: checkpoints.Checkpoint, config: TrainerConfig, trust: bool
    ) -> SelfTrainerV7:
        trainer = cls.__new__(cls)
        trainer._prepare(config)
        trainer.model = _algorithm(config).load(checkpoint.path, device=config.device, trust=trust)
        trainer.model.verbose = config.verbose
        trainer._checkpoint = checkpoint
        return trainer

    def _prepare(self, config: TrainerConfig) -> None:
        """Set the attributes of a trainer without a model yet. A missing seed is drawn."""
        if config.seed is None:
            config = config.changed(seed=int(np.random.SeedSequence().generate_state(1)[0] % 2**31))
        self.config = config
        self.run: Path | None = None
        self._lock: RunLock | None = None
        self._checkpoint: checkpoints.Checkpoint | None = None
        self._eval_env: VecEnv | None = None
        self._evaluation: callbacks.Evaluation | None = None
        if config.torch_threads is not None:
            th.set_num_threads(config.torch_threads)

    @property
    def env(self) -> VecEnv:
        """The training environments. Those of a loaded trainer are created on first access."""
        self._attach_env()
        env = self.model.get_env()
        assert env is not None
        return env

    def _attach_env(self) -> None:
        """
        Create the environments of a loaded model, if it has none yet.

        Episodes begin anew, seeded by the step. The first observations are not counted by the normalization. The random states
        of the checkpoint are restored last.
        """
        checkpoint, self._checkpoint = self._checkpoint, None
        if checkpoint is None:
            return
        self.model.set_env(make_training_env(self.config, checkpoint.normalize))
        env, normalize = self.env, self.model.get_vec_normalize_env()
        assert self.config.seed is not None
        seeds = np.random.SeedSequence([self.config.seed, checkpoint.progress["num_timesteps"]])
        env.seed(int(seeds.generate_state(1)[0] % 2**31))
        if normalize is not None:
            normalize.training = False
        obs: Any = env.reset()
        if normalize is not None:
            normalize.training = True
        self.model._last_obs = obs
        self.model._last_episode_starts = np.ones(env.num_envs, dtype=bool)
        checkpoints.set_random_state(checkpoint.random)

    # --- training and evaluation

    def train(self: SelfTrainerV7, total_timesteps: int | None = None, callback: MaybeCallback = None) -> SelfTrainerV7:
        """
        Train up to ``total_timesteps`` environment steps in total, including the steps before a resumption.

        Ctrl-C and errors save a checkpoint, print its path, and are raised.

        :param total_timesteps: Environment steps; ``None`` takes those of the config.
        :param callback: Further callbacks, as for SB3's ``learn``.
        :return: The trainer.
        :raises ValueError: if the run has made that many steps already, and for observations that are not finite.
        :raises RunInUseError: if another trainer is training the run.
        :raises KeyboardInterrupt: on Ctrl-C and SIGTERM, after saving.
        """
        if total_timesteps is not None:
            check_positive(total_timesteps=total_timesteps)
            self.config = self.config.changed(total_timesteps=int(total_timesteps))
        self._attach_env()
        run = self.open_run()
        try:
            runs.describe_run(run, self.config, self.model)
            self._train(run, _as_list(callback))
        finally:
            self._unlock()
        return self

    def _train(self, run: Path, further: list[BaseCallback]) -> None:
        total, done = self.config.total_timesteps, self.model.num_timesteps
        with contextlib.ExitStack() as stack:
            mark = callbacks.RolloutMark()
            mark.num_timesteps_kept = done
            parts = [mark, *self._callbacks(run, stack), *further]
            stack.enter_context(callbacks.stop_on_signals(mark))
            try:
                self.model.learn(total - done, callback=CallbackList(parts), reset_num_timesteps=False)
            except BaseException as error:
                self.model.num_timesteps = mark.num_timesteps_kept
                # Ctrl-C also ends the processes of environments, which raises an error here.
                interrupted = mark.stop and isinstance(error, Exception)
                self._rescue(run, KeyboardInterrupt() if interrupted else error)
                if interrupted:
                    raise KeyboardInterrupt(f"saved in {run}") from error
                raise
            self.model.num_timesteps = mark.num_timesteps_kept
            if mark.stop:
                self._rescue(run, KeyboardInterrupt())
                raise KeyboardInterrupt(f"saved in {run}")
            self._finish(run)

    def evaluate(self, n_episodes: int = 10, deterministic: bool = True) -> tuple[float, float]:
        """
        Play episodes in a separate environment, with the same seeds at every call.

        :param n_episodes: Number of episodes.
        :param deterministic: Take the mode of the policy instead of a sample.
        :return: Mean and standard deviation of the returns (not normalized).
        """
        returns, _ = self.evaluate_episodes(n_episodes, deterministic)
        return float(np.mean(returns)), float(np.std(returns))

    def evaluate_episodes(self, n_episodes: int = 10, deterministic: bool = True) -> tuple[list[float], list[int]]:
        """
        Play episodes as :meth:`evaluate` does.

        :param n_episodes: Number of episodes.
        :param deterministic: Take the mode of the policy instead of a sample.
        :return: Returns and lengths of the episodes.
        """
        check_positive(n_episodes=n_episodes)
        if self._eval_env is None:
            self._eval_env = self.make_eval_env()
        self._sync_statistics(self._eval_env)
        assert self.config.seed is not None
        # Seeded here and not by the loop, which would seed PyTorch, too, and so change the training around an evaluation.
        self._eval_env.seed((self.config.seed + EVAL_SEED_OFFSET) % 2**31)
        loop, results = ActingLoop(self.model, self._eval_env, deterministic=deterministic), list[EpisodeResult]()
        while len(results) < n_episodes:
            results += loop.step().finished
        return [result.total for result in results], [result.length for result in results]

    def make_eval_env(self, render_mode: str | None = None) -> VecEnv:
        """
        :param render_mode: Render mode of gymnasium; ``None`` leaves it to the environment.
        :return: One environment as in training, with a copy of the present statistics of its normalization.
        """
        env = make_evaluation_env(self.config, render_mode)
        self._sync_statistics(env)
        return env

    def _sync_statistics(self, env: VecEnv) -> None:
        """Copy the statistics of the normalization of the training environments."""
        source, target = self.normalize, unwrap_vec_normalize(env)
        if source is not None and target is not None:
            target.ret_rms = copy.deepcopy(source.ret_rms)
            if source.norm_obs:
                target.obs_rms = copy.deepcopy(source.obs_rms)

    @property
    def normalize(self) -> VecNormalize | None:
        """``VecNormalize`` of the training environments or of the loaded checkpoint, with its statistics; ``None`` without."""
        return self.model.get_vec_normalize_env() if self._checkpoint is None else self._checkpoint.normalize

    def save(self, path: str | Path) -> None:
        """
        Write a checkpoint under exactly this name. ``MemoryPPO.load`` reads it as well.

        :param path: The file; its folder is created if it is missing.
        :raises ValueError: for weights that are not finite.
        :raises OSError: if the file cannot be written; an existing file of this name stays complete.
        """
        self._attach_env()
        self._write(Path(path))

    def _write(self, path: Path, **progress: Any) -> None:
        """Write a checkpoint with further counters. PyTorch hides an error of the disk behind one of its own: it is raised."""
        try:
            checkpoints.save_checkpoint(path, self.model, self.config, **progress)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise

    def close(self) -> None:
        """Close the environments, and release the lock of the run."""
        self._unlock()
        if self._checkpoint is None:
            self.env.close()
        if self._eval_env is not None:
            self._eval_env.close()

    # --- the run

    def open_run(self) -> Path:
        """
        Create the folder of the run, if there is none yet, and lock it. :meth:`train` calls this, and releases the lock.

        :return: The folder.
        :raises ValueError: if the run is complete, if there is another run of this name, or if another process has continued
            the run since this trainer was loaded.
        :raises RunInUseError: if another trainer is training the run.
        :raises ImportError: for logging whose package is missing, with the command that installs it.
        """
        config, done = self.config, self.model.num_timesteps
        if done >= config.total_timesteps:
            raise ValueError(
                f"The run has made {done:,} steps already; `total_timesteps`={config.total_timesteps:,} must be more to go on."
            )
        for package, wanted in {"tensorboard": config.tensorboard, "wandb": config.wandb}.items():
            if wanted and find_spec(package) is None:
                extra = "wandb" if package == "wandb" else "train"
                raise ImportError(f'`{package}` needs a package that is missing: pip install "sb3-cyborg[{extra}]"')
        if self.run is None:
            self.run, self._lock = runs.new_run(Path(config.log_dir), config.run_name, config.env)
        elif self._lock is None:
            self._lock = self._locked(self.run)
        return self.run

    def _locked(self, run: Path) -> RunLock:
        """:return: The lock of an existing run, whose files are not newer than this trainer."""
        lock = RunLock(run)
        lock.acquire()
        newest = checkpoints.newest_file(run)
        if newest.num_timesteps > self.model.num_timesteps:
            lock.release()
            raise ValueError(
                f"{newest.path} was saved after {newest.num_timesteps:,} steps, but this trainer has made "
                f"{self.model.num_timesteps:,}: another process has continued the run. Resume it again."
            )
        return lock

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _callbacks(self, run: Path, stack: contextlib.ExitStack) -> list[BaseCallback]:
        config = self.config
        wandb = logs.start_wandb(run, config.wandb_project, config.model_dump()) if config.wandb else None
        board = run / "tensorboard" if config.tensorboard else None
        logger = logs.make_logger(board, config.verbose, self.model.num_timesteps, wandb)
        self.model.set_logger(logger)
        stack.callback(setattr, self.model, "_custom_logger", False)  # so that a later `model.learn` makes a logger of its own
        stack.callback(logger.close)
        self._evaluation = None
        parts: list[BaseCallback] = [monitor := MonitorLog(run, config.env)]
        stack.callback(monitor.close)
        if config.histograms and (config.tensorboard or config.wandb):
            parts.append(callbacks.WriteGates())
        if config.eval_freq:
            self._evaluation = self._make_evaluation(run)
            parts.append(self._evaluation)
        if config.save_freq:
            parts.append(callbacks.Checkpoints(config.save_freq, lambda: self._save_checkpoint(run)))
        if config.progress_bar:
            parts.append(progress := callbacks.ProgressDisplay())
            stack.callback(progress.close)
        return parts

    def _make_evaluation(self, run: Path) -> callbacks.Evaluation:
        return callbacks.Evaluation(
            run,
            self.config.eval_freq,
            self.config.n_eval_episodes,
            lambda: self.evaluate_episodes(self.config.n_eval_episodes),
            lambda mean: self._write(run / checkpoints.BEST, mean_return=mean),
            runs.best_mean_return(run),
        )

    def _save_checkpoint(self, run: Path) -> Path:
        path = checkpoints.checkpoint_path(run, self.model.num_timesteps)
        self._write(path)
        for old in checkpoints.list_checkpoints(run)[: -self.config.keep_checkpoints]:
            if old != path:
                old.unlink()
        return path

    def _finish(self, run: Path) -> None:
        self._save_checkpoint(run)  # first: the evaluation may fail
        if self._evaluation is not None:
            self._evaluation.run_now()
        self._write(run / checkpoints.FINAL)

    def _rescue(self, run: Path, error: BaseException) -> None:
        """Save a checkpoint and print its path. A failure is printed, not raised: it would hide the error."""
        path = checkpoints.checkpoint_path(run, self.model.num_timesteps)
        try:
            # A file of this name was saved at the start of the interrupted rollout and allows an exact resumption.
            where = f"saved {path if path.exists() else self._save_checkpoint(run)}"
        except Exception as failure:
            where = f"nothing could be saved ({failure})"
        print(f"Stopped by {type(error).__name__} after {self.model.num_timesteps:,} steps: {where}.", file=sys.stderr)
        print(f"Resume with: sb3-cyborg train --resume {run}{checkpoints.trust_flag(self.config)}", file=sys.stderr)


def _algorithm(config: TrainerConfig) -> type[MemoryPPO]:
    """:return: The class of the agent. Runs of earlier versions have no key ``use_masking`` and no masks."""
    return MaskableMemoryPPO if config.use_masking else MemoryPPO


def _checked_changes(changes: Mapping[str, Any], allowed: tuple[str, ...]) -> dict[str, Any]:
    """
    :param changes: Settings to change, by key or alias.
    :param allowed: Keys that may change.
    :return: The settings by key.
    :raises ValueError: for other keys.
    """
    settings = canonical(changes)
    for key in settings:
        if key not in TrainerConfig.model_fields:
            raise unknown_name("config key", key, TrainerConfig.model_fields)
        if key not in allowed:
            raise ValueError(
                f"`{key}` cannot change in a run that is resumed, only {', '.join(allowed)} can; start a new run for it."
            )
    return settings


def _as_list(callback: MaybeCallback) -> list[BaseCallback]:
    if callback is None:
        return []
    if isinstance(callback, list):
        return callback
    if isinstance(callback, BaseCallback):
        return [callback]
    return [ConvertCallback(callback)]
