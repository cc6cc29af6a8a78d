"""
The command line ``sb3-cyborg``: train, eval, enjoy, plot, inspect, export, hub, envs, info, zoo.

It needs ``pip install "sb3-cyborg[train]"``. Errors and warnings are one line. The exit code is 2 for bad input, 1 for a
failure while running, and 130 for Ctrl-C.
"""

import contextlib
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, NoReturn

import gymnasium as gym

if TYPE_CHECKING:
    from sb3_cyborg.trainers.trainer_v7 import TrainerV7

try:
    import typer
    from typer.core import TyperCommand, TyperGroup

    from sb3_cyborg.memory_ppo.ranks import RankError, Ranks
    from sb3_cyborg.trainers.checkpoints import trust_flag
    from sb3_cyborg.trainers.config import RESUME_KEYS, TrainerConfig
    from sb3_cyborg.trainers.config_file import parse_yaml, read_yaml
    from sb3_cyborg.trainers.config_flags import as_flag, as_flags, read_flags, with_config_flags
    from sb3_cyborg.trainers.environments import envs_of_rank
    from sb3_cyborg.trainers.launch import WorkerError, is_restarted, is_worker, launch, report_error
    from sb3_cyborg.trainers.vocabulary import canonical, merge
except ModuleNotFoundError as error:
    sys.exit(f'sb3-cyborg: error: {error.name} is missing: pip install "sb3-cyborg[train]"')

TRACEBACK_VARIABLE = "SB3_CYBORG_TRACEBACK"
BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130

TRAIN_HELP = """
Train an agent, or resume a run.

Settings come from --config, a YAML file, and from flags; a flag overrides the file. Each key of a config has a flag. All
settings of a run are saved in its folder, beside the checkpoints.

\b
Examples:
  sb3-cyborg train --env CartPole-v1 --total-timesteps 50_000
  sb3-cyborg train --env CartPoleNoVel-v1 --encoder gru --memory none --n-envs 8
  sb3-cyborg train --env sb3_cyborg/MemoryChain-v0 --env-kwargs '{memory_length: 30}' --memory '{type: ring, num_slots: 64}'
  sb3-cyborg train --config configs/memory_ppo_v7.yaml --wandb
  sb3-cyborg train --resume runs/CartPole-v1_1
  sb3-cyborg train --resume runs/CartPole-v1_1 --total-timesteps 100_000
  sb3-cyborg train --resume runs/CartPole-v1_1 --restart
  sb3-cyborg train --env CartPole-v1 --seeds 0-4 --jobs 2
  sb3-cyborg train --env CartPoleNoVel-v1 --n-envs 16 --workers 2
"""

CONTEXT: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": 120}


def fail(message: object, code: int) -> NoReturn:
    """
    Print an error and exit.

    :param message: The error, printed as one line on the standard error.
    :param code: The exit code.
    """
    line = " ".join(str(message).split())
    if not report_error(line, isinstance(message, RankError)):
        print(f"sb3-cyborg: error: {line}", file=sys.stderr)
    raise typer.Exit(code)


@contextlib.contextmanager
def errors_as_lines(value_error: int = BAD_INPUT) -> Iterator[None]:
    """
    Print errors as one line and exit. With ``SB3_CYBORG_TRACEBACK=1`` they are raised instead.

    :param value_error: Exit code for a ``ValueError``: before training its cause is the input, during training the run.
    """
    try:
        yield
    except (typer.Exit, typer.Abort, BrokenPipeError):
        raise
    except RankError as error:
        fail(error, FAILED)
    except WorkerError as error:
        _end(error, str(error), error.exit_code)
    except (ValueError, AssertionError) as error:  # SB3 checks input with assertions
        _end(error, str(error), value_error)
    except (ImportError, RuntimeError, OSError, gym.error.Error) as error:
        # The first line: that of a worker process is followed by its traceback.
        _end(error, next(iter(str(error).strip().splitlines()), ""), FAILED)
    except Exception as error:  # of environments and libraries; the type tells more than the text, which may be a mere key
        _end(error, f"{type(error).__name__}: {error} ({TRACEBACK_VARIABLE}=1 shows where)", FAILED)


def _end(error: Exception, text: str, code: int) -> NoReturn:
    if os.environ.get(TRACEBACK_VARIABLE):
        raise error
    fail(text.strip() or type(error).__name__, code)


@contextlib.contextmanager
def output_as_lines() -> Iterator[None]:
    """Print warnings, and errors of threads, as one line each. Characters that the output cannot show are escaped."""

    def show_warning(message: object, *_: Any, **__: Any) -> None:
        print(f"sb3-cyborg: warning: {' '.join(str(message).split())}", file=sys.stderr)

    def show_error(error: threading.ExceptHookArgs) -> None:
        # TensorBoard's thread, for example. The error is raised again where training writes next.
        print(f"sb3-cyborg: warning: a thread has failed: {' '.join(str(error.exc_value).split())}", file=sys.stderr)

    if (reconfigure := getattr(sys.stdout, "reconfigure", None)) is not None:
        reconfigure(errors="backslashreplace")
    before = warnings.showwarning, threading.excepthook
    if not os.environ.get(TRACEBACK_VARIABLE):
        warnings.showwarning, threading.excepthook = show_warning, show_error
    try:
        yield
    finally:
        warnings.showwarning, threading.excepthook = before


class OneLineErrors:
    """A mixin for commands of typer: wrong usage is one line as well, and a closed pipe is silent."""

    def main(self, *args: Any, standalone_mode: bool = True, **options: Any) -> Any:
        """
        Run the command, and exit.

        :param args: As in typer.
        :param standalone_mode: Whether to exit; otherwise errors are raised, as in typer.
        :param options: As in typer.
        """
        run: Any = super()
        if not standalone_mode:
            return run.main(*args, standalone_mode=False, **options)
        with output_as_lines():
            try:
                code = run.main(*args, standalone_mode=False, **options)
                sys.stdout.flush()
            except BrokenPipeError:
                # Python flushes the output once more at its end, which would print the error.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                code = FAILED
            except OSError as error:
                print(f"sb3-cyborg: error: {error}", file=sys.stderr)
                code = FAILED
            except Exception as error:
                if not hasattr(error, "format_message"):  # of typer: wrong usage
                    raise
                code = _show_usage_error(error)
        sys.exit(code or 0)


def _show_usage_error(error: Any) -> int:
    """:return: The exit code of an error of typer, which is printed."""
    if "\n" in error.format_message() and type(error).__name__ == "NoArgsIsHelpError":
        error.show()  # the help
    else:
        command = f" See `{error.ctx.command_path} --help`." if getattr(error, "ctx", None) else ""
        print(f"sb3-cyborg: error: {' '.join(error.format_message().split())}{command}", file=sys.stderr)
    return int(error.exit_code)


class Group(OneLineErrors, TyperGroup):
    """The command ``sb3-cyborg``."""


class Command(OneLineErrors, TyperCommand):
    """A command that is run on its own."""


app = typer.Typer(
    name="sb3-cyborg",
    cls=Group,
    help="Agents with memory, for Stable-Baselines3. Each command has its own --help, with examples.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings=CONTEXT,
)


TRUST_HELP = "Also load pickled objects of the file and import the modules it names: that can run any code."
Trust = Annotated[bool, typer.Option("--trust", help=TRUST_HELP)]


# --- train ------------------------------------------------------------------------------------------------------------


@with_config_flags
def train(
    config: Annotated[Path | None, typer.Option("--config", "-c", help="YAML file with settings.", show_default=False)] = None,
    resume: Annotated[
        Path | None, typer.Option("--resume", "-r", help="Folder of a run to resume.", show_default=False)
    ] = None,
    trust: Trust = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="With --resume: start the run anew; its files are moved into old_<number>.")
    ] = False,
    seeds: Annotated[
        str | None,
        typer.Option("--seeds", help="Seeds 0-4 or 0,3,7-9: a run for each, one plot, one table.", show_default=False),
    ] = None,
    jobs: Annotated[
        int | None, typer.Option("--jobs", help="With --seeds: runs at a time. [default: 1]", show_default=False)
    ] = None,
    cluster: Annotated[
        str | None, typer.Option("--cluster", help="With --seeds: 'slurm' or 'local', through submitit.", show_default=False)
    ] = None,
    cluster_options: Annotated[
        str | None,
        typer.Option("--cluster-options", help="Options of submitit, e.g. '{slurm_partition: cpu}'.", show_default=False),
    ] = None,
    workers: Annotated[
        int, typer.Option("--workers", min=1, help="Processes that train together; they divide `n_envs` and each minibatch.")
    ] = 1,
    max_restarts: Annotated[
        int, typer.Option("--max-restarts", min=0, help="With --workers: how often all start again if one fails.")
    ] = 0,
    **given: Any,
) -> None:
    """Train an agent, or resume a run."""
    if seeds is not None:
        with errors_as_lines():
            if resume is not None or restart:
                raise ValueError(
                    "`--seeds` resumes by itself: give the settings from before, without `--resume`, `--restart`."
                )
            values = canonical(read_flags(given))
            if "seed" in values:
                raise ValueError("`--seed` and `--seeds`: leave one out.")
            if workers > 1 or max_restarts:
                raise ValueError("`--workers` and `--seeds`: leave one out; `--jobs` trains several seeds at a time.")
            settings = _settings_of_new_run(config, restart=False, trust=False, values=values)
            code = _train_seeds(settings, seeds, 1 if jobs is None else jobs, cluster, cluster_options, trust)
        raise typer.Exit(code)
    with errors_as_lines():
        values = canonical(read_flags(given))
        for flag, value in {"--jobs": jobs, "--cluster": cluster, "--cluster-options": cluster_options}.items():
            if value is not None:
                raise ValueError(f"`{flag}` is for `--seeds`: a single run is one job.")
        if workers > 1:
            _train_in_workers(workers, max_restarts, config, resume, restart, trust, given)
            return
        if max_restarts:
            raise ValueError("`--max-restarts` is for several processes: give `--workers`.")
        trainer = _trainer_for(config, resume, restart, trust, values)
        trainer.open_run()
    _train(trainer)


def _trainer_for(config: Path | None, resume: Path | None, restart: bool, trust: bool, values: dict[str, Any]) -> "TrainerV7":
    """:return: The trainer of a run: one that is resumed, a new one, or that which the launcher has begun before a failure."""
    from sb3_cyborg.trainers.runs import run_of_launch
    from sb3_cyborg.trainers.trainer_v7 import TrainerV7

    if resume is not None:
        _check_resume(config, values)
        return TrainerV7.resume(resume, restart=restart and not is_restarted(), trust=trust, **values)
    settings = _settings_of_new_run(config, restart, trust, values)
    if is_restarted() and (begun := run_of_launch(Path(TrainerConfig.parse(settings).log_dir))) is not None:
        return TrainerV7.resume(begun, trust=True)  # the same command has written it
    return TrainerV7(settings)


def _settings_of_new_run(config: Path | None, restart: bool, trust: bool, values: dict[str, Any]) -> dict[str, Any]:
    """
    :return: The settings of the file and of the flags.
    :raises ValueError: for flags that are for a run that exists, and without an environment.
    """
    if trust:
        raise ValueError("`--trust` is for `--resume`: leave it out, a new run loads no file of a model.")
    if restart:
        raise ValueError("`--restart` is for a run that exists: give its folder with `--resume`.")
    settings = merge({} if config is None else read_yaml(config), values)
    if "env" not in settings:
        raise ValueError("No environment: give `--env`, or a `--config` with `env`; `sb3-cyborg envs` lists our own.")
    return settings


def _train_in_workers(
    workers: int,
    max_restarts: int,
    config: Path | None,
    resume: Path | None,
    restart: bool,
    trust: bool,
    given: dict[str, Any],
) -> None:
    """Start the command in several processes, and wait for their end. What can be wrong is checked before."""
    if is_worker():
        raise ValueError("`--workers` starts processes, but torchrun has started this one: leave it out.")
    values = canonical(read_flags(given))
    if resume is None:
        settings = TrainerConfig.parse(_settings_of_new_run(config, restart, trust, values))
        envs_of_rank(settings, Ranks(size=workers))
    else:
        _check_resume(config, values)
    paths = {"--config": config, "--resume": resume}
    arguments = [text for flag, path in paths.items() if path is not None for text in (flag, str(path))]
    arguments += [flag for flag, wanted in {"--restart": restart, "--trust": trust}.items() if wanted]
    try:
        launch([*arguments, *as_flags(given)], workers, max_restarts)
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None


def _check_resume(config: Path | None, values: dict[str, Any]) -> None:
    """:raises ValueError: for flags that cannot change in a run that is resumed."""
    if config is not None:
        raise ValueError("`--resume` uses the config of the run: leave `--config` out, or start a new run.")
    for key in values:
        if key not in RESUME_KEYS:
            raise ValueError(
                f"`{as_flag(key)}` cannot change in a run that is resumed: leave it out, or start a new run. "
                f"These flags can: {', '.join(map(as_flag, RESUME_KEYS))}."
            )


def _train(trainer: "TrainerV7") -> None:
    if trainer.ranks.is_first:
        print(f"Run: {trainer.run}", flush=True)
    try:
        with errors_as_lines(value_error=FAILED):
            try:
                trainer.train()
            finally:
                trainer.close()
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    if not trainer.ranks.is_first:
        return
    print(f"Finished after {trainer.model.num_timesteps:,} steps. Next:")
    print(f"  sb3-cyborg eval {trainer.run}{trust_flag(trainer.config)}\n  sb3-cyborg plot {trainer.run} --output curve.png")


def _train_seeds(
    settings: dict[str, Any], seeds: str, jobs: int, cluster: str | None, cluster_options: str | None, trust: bool
) -> int:
    """:return: The exit code: 0 if all runs have finished."""
    from sb3_cyborg.seeds.cluster import ClusterJobs
    from sb3_cyborg.seeds.jobs import FAILED as RUN_FAILED
    from sb3_cyborg.seeds.jobs import FINISHED, LocalJob
    from sb3_cyborg.seeds.seed_runs import group_folder, parse_seeds
    from sb3_cyborg.seeds.train_seeds import train_seeds
    from sb3_cyborg.trainers.config import TrainerConfig

    numbers = parse_seeds(seeds)
    parsed = TrainerConfig.parse(settings)
    if cluster is None and cluster_options is not None:
        raise ValueError("`--cluster-options` is for `--cluster`.")
    options = {} if cluster_options is None else parse_yaml(cluster_options, f"`--cluster-options` {cluster_options!r}")
    start = LocalJob if cluster is None else ClusterJobs(cluster, options, group_folder(parsed))
    result = train_seeds(parsed, numbers, jobs, trust=trust, start=start, tell=lambda line: print(line, flush=True))
    print(f"\n{result.table}")
    states = {outcome.state for outcome in result.outcomes}
    for outcome in result.outcomes:
        if outcome.state == RUN_FAILED:
            print(f"sb3-cyborg: error: seed {outcome.run.seed} has failed: {outcome.reason}", file=sys.stderr)
    if states != {FINISHED}:
        hint = "" if trust or not trust_flag(parsed) else ", with `--trust`"
        print(f"The same command goes on with the runs that are not finished{hint}.", file=sys.stderr)
    return 0 if states == {FINISHED} else FAILED if RUN_FAILED in states else INTERRUPTED


app.command("train", help=TRAIN_HELP)(train)


# --- commands for a run -----------------------------------------------------------------------------------------------

Run = Annotated[Path, typer.Argument(help="Folder of a run, or a file that a trainer saved.", show_default=False)]
Which = Annotated[
    str, typer.Option("--which", help="Checkpoint of a run: 'best' by evaluation, 'last', or its number of steps.")
]
Stochastic = Annotated[bool, typer.Option("--stochastic", help="Sample actions instead of taking the mode of the policy.")]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, ...; auto takes a GPU if there is one.")]


@app.command("eval")
def evaluate(
    run: Run,
    episodes: Annotated[int, typer.Option("--episodes", help="Number of episodes.")] = 20,
    which: Which = "best",
    stochastic: Stochastic = False,
    device: Device = "auto",
    trust: Trust = False,
) -> None:
    """
    Play episodes with a trained agent, and print their returns and lengths.

    \b
    Examples:
      sb3-cyborg eval runs/CartPole-v1_1
      sb3-cyborg eval runs/CartPole-v1_1 --which last --episodes 100
      sb3-cyborg eval checkpoints/model.pt
    """
    with errors_as_lines():
        import numpy as np

        from sb3_cyborg.trainers.checkpoints import find_checkpoint
        from sb3_cyborg.trainers.trainer_v7 import TrainerV7

        path = find_checkpoint(run, which)
        trainer = TrainerV7.load(path, device=device, trust=trust)
        print(f"{path}: {trainer.config.env}, {trainer.model.num_timesteps:,} steps of training", flush=True)
        returns, lengths = trainer.evaluate_episodes(episodes, deterministic=not stochastic)
        trainer.close()
        print(f"return {np.mean(returns):.3f} +/- {np.std(returns):.3f} (std of {episodes} episodes), ", end="")
        print(f"from {min(returns):.3f} to {max(returns):.3f}; length {np.mean(lengths):.1f}")


@app.command()
def enjoy(
    run: Run,
    video: Annotated[
        Path | None, typer.Option("--video", help="Write a .gif or .mp4 file instead of opening a window.")
    ] = None,
    episodes: Annotated[int, typer.Option("--episodes", help="Number of episodes.")] = 3,
    max_steps: Annotated[int | None, typer.Option("--max-steps", help="Steps after which to stop in any case.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Seed of the episodes; the default is that of the run.")] = None,
    which: Which = "best",
    stochastic: Stochastic = False,
    device: Device = "auto",
    trust: Trust = False,
) -> None:
    """
    Watch a trained agent, in a window or a video.

    \b
    Examples:
      sb3-cyborg enjoy runs/CartPole-v1_1
      sb3-cyborg enjoy runs/CartPole-v1_1 --video agent.gif --episodes 1
    """
    with errors_as_lines():
        from sb3_cyborg.viewers.runs import enjoy_run

        enjoy_run(
            run,
            video=video,
            which=which,
            device=device,
            trust=trust,
            seed=seed,
            n_episodes=episodes,
            max_steps=max_steps,
            deterministic=not stochastic,
        )


@app.command()
def plot(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs, or folders of these.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="A .png, .pdf or .svg file.")] = Path("learning_curves.png"),
    x: Annotated[str, typer.Option("--x", help="steps, episodes or time.")] = "steps",
    y: Annotated[str, typer.Option("--y", help="return, length, success or another column of monitor.csv.")] = "return",
    window: Annotated[int | None, typer.Option("--window", help="Episodes that each point averages.")] = None,
    max_steps: Annotated[int | None, typer.Option("--max-steps", help="Leave out episodes that ended later.")] = None,
    each: Annotated[
        bool, typer.Option("--each", help="Draw a curve for each run instead of one for all seeds of a config.")
    ] = False,
) -> None:
    """
    Draw learning curves with a confidence band.

    \b
    Examples:
      sb3-cyborg plot runs/CartPole-v1_1
      sb3-cyborg plot runs/gru_* runs/mamba_* --output compare.png
      sb3-cyborg plot logs/memory_ppo --output zoo.png
    """
    with errors_as_lines():
        from sb3_cyborg.viewers.plotting import plot_learning_curves

        curves = plot_learning_curves(runs, output, x_axis=x, y_axis=y, window=window, max_steps=max_steps, group=not each)
        print(f"{output}: {', '.join(curve.label for curve in curves)}")


@app.command("inspect")
def inspect_memory(
    run: Run,
    output: Annotated[Path, typer.Option("--output", "-o", help="A .png, .pdf or .svg file.")] = Path("memory.png"),
    max_steps: Annotated[int, typer.Option("--max-steps", help="Steps after which to stop if the episode is longer.")] = 500,
    heads: Annotated[
        str, typer.Option("--heads", help="Reduction over the heads: mean, max, or the number of one head.")
    ] = "mean",
    seed: Annotated[int | None, typer.Option("--seed", help="Seed of the episode; the default is that of the run.")] = None,
    which: Which = "best",
    stochastic: Stochastic = False,
    device: Device = "auto",
    trust: Trust = False,
) -> None:
    """
    Draw the memory of an agent along an episode: attention over past steps, write gates, slots.

    \b
    Examples:
      sb3-cyborg inspect runs/sb3_cyborg-MemoryChain-v0_1
      sb3-cyborg inspect runs/sb3_cyborg-TMaze-v0_1 --output maze.png --heads max
    """
    with errors_as_lines():
        from sb3_cyborg.viewers.runs import inspect_run

        episode = inspect_run(
            run,
            output,
            which=which,
            device=device,
            trust=trust,
            heads=int(heads) if heads.isdigit() else heads,
            deterministic=not stochastic,
            max_steps=max_steps,
            seed=seed,
        )
        print(f"{output}: {episode.steps} steps of {episode.name}, return {episode.rewards.sum():.3f}")


@app.command("export")
def export_agent(
    run: Run,
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.")] = Path("agent.onnx"),
    kind: Annotated[str, typer.Option("--format", help="onnx, or pt2 for torch.export.")] = "onnx",
    opset: Annotated[
        int | None, typer.Option("--opset", help="Version of ONNX's operator set; the default is 20.", show_default=False)
    ] = None,
    which: Which = "best",
    trust: Trust = False,
) -> None:
    """
    Export a trained agent with its memory, for onnxruntime or torch.export. It needs pip install "sb3-cyborg[export]".

    \b
    Examples:
      sb3-cyborg export runs/CartPole-v1_1 --output agent.onnx
      sb3-cyborg export runs/CartPole-v1_1 --which last --format pt2 --output agent.pt2
    """
    with errors_as_lines():
        from sb3_cyborg.export import OPSET, export_onnx, export_pt2
        from sb3_cyborg.trainers.checkpoints import find_checkpoint
        from sb3_cyborg.trainers.trainer_v7 import TrainerV7

        if kind not in ("onnx", "pt2"):
            raise ValueError(f"`--format` must be 'onnx' or 'pt2', got {kind!r}.")
        if kind == "pt2" and opset is not None:
            raise ValueError("`--opset` is for `--format onnx`: leave it out.")
        path = find_checkpoint(run, which)
        trainer = TrainerV7.load(path, device="cpu", trust=trust)
        if kind == "onnx":
            export_onnx(trainer.model, output, normalize=trainer.normalize, opset=OPSET if opset is None else opset)
        else:
            export_pt2(trainer.model, output, normalize=trainer.normalize)
        trainer.close()
        print(f"{output}: {path}, {trainer.config.env}, {trainer.model.num_timesteps:,} steps of training")


# --- the Hub ----------------------------------------------------------------------------------------------------------

hub_app = typer.Typer(cls=Group, no_args_is_help=True, rich_markup_mode=None, context_settings=CONTEXT)
app.add_typer(hub_app, name="hub", help="Upload an agent to the Hugging Face Hub, or download one.")
RepoId = Annotated[str, typer.Argument(help="Repository: <user or organization>/<name>.", show_default=False)]
Revision = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit.", show_default="main")]


@hub_app.command("push")
def hub_push(
    run: Run,
    repo_id: RepoId,
    local: Annotated[
        Path | None, typer.Option("--local", help="Write the files into this folder, and upload nothing.", show_default=False)
    ] = None,
    episodes: Annotated[int, typer.Option("--episodes", help="Number of episodes of the evaluation.")] = 20,
    seeds: Annotated[
        bool, typer.Option("--seeds/--no-seeds", help="Evaluate the runs beside it that differ in the seed alone, too.")
    ] = True,
    video: Annotated[bool, typer.Option("--video/--no-video", help="Record a GIF if the environment has pictures.")] = True,
    message: Annotated[
        str, typer.Option("--message", "-m", help="Message of the commit.")
    ] = "Upload an agent with sb3_cyborg",
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Of a new repository.", show_default="the Hub's")
    ] = None,
    revision: Revision = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request.")] = False,
    which: Which = "best",
    stochastic: Stochastic = False,
    device: Device = "auto",
    trust: Trust = False,
) -> None:
    """
    Upload the agent of a run, with a model card: task, returns of all seeds, learning curve, video, how to use it, config.

    The access token is that of HF_TOKEN or of `hf auth login`.

    \b
    Examples:
      sb3-cyborg hub push runs/CartPole-v1_1 me/memory-ppo-CartPole-v1
      sb3-cyborg hub push runs/CartPole-v1_1 me/memory-ppo-CartPole-v1 --local card
    """
    with errors_as_lines():
        from sb3_cyborg.hub import push_to_hub
        from sb3_cyborg.hub.packaging import package_run

        options: dict[str, Any] = {
            "which": which,
            "n_eval_episodes": episodes,
            "deterministic": not stochastic,
            "seeds": seeds,
            "video": video,
            "device": device,
            "trust": trust,
        }
        if local is not None:
            package_run(run, local, repo_id, **options)
            return
        url = push_to_hub(repo_id, run, message, private=private, revision=revision, create_pr=create_pr, **options)
        print(f"uploaded: {url}")


@hub_app.command("load")
def hub_load(
    repo_id: RepoId,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the files.", show_default="hub/<repository>")
    ] = None,
    revision: Revision = None,
    trust: Trust = False,
) -> None:
    """
    Download an agent, and check that it loads.

    \b
    Examples:
      sb3-cyborg hub load me/memory-ppo-CartPole-v1
      sb3-cyborg hub load me/memory-ppo-CartPole-v1 --output agent --revision v2
    """
    with errors_as_lines():
        from sb3_cyborg.hub import download_from_hub
        from sb3_cyborg.trainers.trainer_v7 import TrainerV7

        path = download_from_hub(repo_id, output or Path("hub", repo_id), revision=revision)
        trainer = TrainerV7.load(path, device="cpu", trust=trust)
        trainer.close()
        print(f"{path}: {trainer.config.env}, {trainer.model.num_timesteps:,} steps of training. Next:")
        flag = trust_flag(trainer.config)
        print(f"  sb3-cyborg eval {path}{flag}\n  sb3-cyborg enjoy {path}{flag} --video agent.gif")


# --- environments, installation and RL Zoo ----------------------------------------------------------------------------


class Requirement(NamedTuple):
    """
    A package that some environments need.

    :param part: A family of environments, or part of the id of an environment.
    :param package: The package to import.
    :param how: How to install it.
    """

    part: str
    package: str
    how: str


REQUIREMENTS = (
    Requirement("POPGym", "popgym", 'pip install "sb3-cyborg[popgym]"'),
    Requirement("Labyrinth", "mazelib", 'pip install "sb3-cyborg[popgym]"'),
    Requirement("MiniGrid", "minigrid", 'pip install "sb3-cyborg[minigrid]"'),
    Requirement("Crafter", "crafter", 'pip install "sb3-cyborg[crafter]"'),
    Requirement("LunarLander", "Box2D", 'pip install "gymnasium[box2d]"'),
    Requirement("MineRL", "minerl", "see docs/minerl.md"),
)


def missing(family: str, env_id: str) -> str:
    """
    :param family: Name of a family of environments.
    :param env_id: An environment of it.
    :return: The requirement that is not installed, with how to install it, or an empty string.
    """
    for part, package, how in REQUIREMENTS:
        if (part == family or part in env_id) and find_spec(package) is None:
            return f"needs {package}: {how}"
    if family == "MineRL":
        from sb3_cyborg.envs.minerl.process import find_simulator

        try:
            find_simulator()
        except (RuntimeError, ImportError, OSError) as error:
            return str(error)
    return ""


@app.command()
def envs(
    pattern: Annotated[str, typer.Argument(help="Show only ids that contain this text.", show_default=False)] = "",
) -> None:
    """
    List the environments of this package, and the packages that are missing to run them.

    Any other environment that is registered with gymnasium can be used as well: --env CartPole-v1, --env my_module:My-v0.

    \b
    Examples:
      sb3-cyborg envs
      sb3-cyborg envs repeatprevious
    """
    with errors_as_lines():
        from sb3_cyborg.envs.registration import FAMILIES

        shown = 0
        for name, family in FAMILIES.items():
            ids = [env_id for env_id in family.kwargs if pattern.lower() in env_id.lower()]
            shown += len(ids)
            if ids:
                print(name)
            for env_id in ids:
                requirement = missing(name, env_id)
                print(f"  {env_id}  ({requirement})" if requirement else f"  {env_id}")
        if not shown:
            raise ValueError(f"No environment of this package has {pattern!r} in its id; `sb3-cyborg envs` lists all.")


@app.command()
def info() -> None:
    """
    Print versions, processor, compiled kernels and missing extras. Paste it into a bug report.

    \b
    Examples:
      sb3-cyborg info
    """
    with errors_as_lines():
        from sb3_cyborg.info import report

        print(report())


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
def zoo(context: typer.Context) -> None:
    """Run RL Zoo with MemoryPPO: sb3-cyborg zoo train --env CartPoleNoVel-v1; `sb3-cyborg zoo` lists its commands."""
    with errors_as_lines():
        from sb3_cyborg.zoo import zoo_main

        zoo_main(context.args)


def train_main() -> None:
    """Run ``sb3-cyborg train`` as a command of its own, for ``examples/train_v7.py``."""
    single = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, context_settings=CONTEXT)
    single.command("train", cls=Command, help=TRAIN_HELP)(train)
    single()


def main() -> None:
    """Entry point of ``sb3-cyborg``."""
    app()


if __name__ == "__main__":
    main()
