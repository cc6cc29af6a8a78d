"""
The command ``sb3-cyborg train``.

Its flags are the keys of the config, whose checks need PyTorch and the registries of encoders and memories. The other commands
do not need this module.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sb3_cyborg.cli.base import CONTEXT, FAILED, INTERRUPTED, Command, Trust, errors_as_lines
from sb3_cyborg.memory_ppo.ranks import Ranks
from sb3_cyborg.trainers.checkpoints import trust_flag
from sb3_cyborg.trainers.config import RESUME_KEYS, TrainerConfig
from sb3_cyborg.trainers.config_file import parse_yaml, read_yaml
from sb3_cyborg.trainers.config_flags import as_flag, as_flags, read_flags, with_config_flags
from sb3_cyborg.trainers.environments import envs_of_rank
from sb3_cyborg.trainers.launch import is_restarted, is_worker, launch
from sb3_cyborg.trainers.vocabulary import canonical, merge

if TYPE_CHECKING:
    from sb3_cyborg.trainers.trainer_v7 import TrainerV7

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


def make_command() -> Any:
    """:return: The command, for click: as a part of ``sb3-cyborg``, or run on its own."""
    single = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, context_settings=CONTEXT)
    single.command("train", cls=Command, help=TRAIN_HELP)(train)
    return typer.main.get_command(single)


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
    from sb3_cyborg.viewers.recording import has_pictures

    pictures = has_pictures(trainer.env)  # which is closed after training
    if trainer.ranks.is_first:
        _show_start(trainer)
    try:
        with errors_as_lines(value_error=FAILED):
            try:
                trainer.train()
            finally:
                trainer.close()
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    if trainer.ranks.is_first:
        _show_end(trainer, pictures)


def _show_start(trainer: "TrainerV7") -> None:
    from sb3_cyborg.trainers.summary import describe_sizes, short_run_note

    print(f"Run: {trainer.run}\n{describe_sizes(trainer)}", flush=True)
    if note := short_run_note(trainer):
        print(f"sb3-cyborg: note: {note}", file=sys.stderr)


def _show_end(trainer: "TrainerV7", pictures: bool) -> None:
    from sb3_cyborg.trainers.summary import next_commands
    from sb3_cyborg.viewers.inspection import can_be_inspected

    commands = next_commands(trainer, can_be_inspected(trainer.model), pictures)
    print(f"Finished after {trainer.model.num_timesteps:,} steps. Next:")
    print("\n".join(f"  {command}" for command in commands))


def _train_seeds(
    settings: dict[str, Any], seeds: str, jobs: int, cluster: str | None, cluster_options: str | None, trust: bool
) -> int:
    """:return: The exit code: 0 if all runs have finished."""
    from sb3_cyborg.seeds.cluster import ClusterJobs
    from sb3_cyborg.seeds.jobs import FAILED as RUN_FAILED
    from sb3_cyborg.seeds.jobs import FINISHED, LocalJob
    from sb3_cyborg.seeds.seed_runs import group_folder, parse_seeds
    from sb3_cyborg.seeds.train_seeds import train_seeds

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
