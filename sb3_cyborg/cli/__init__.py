"""
The command line ``sb3-cyborg``: train, eval, enjoy, plot, inspect, export, hub, envs, info, zoo.

It needs ``pip install "sb3-cyborg[train]"``. Errors and warnings are one line. The exit code is 2 for bad input, 1 for a
failure while running, and 130 for Ctrl-C. PyTorch and Stable-Baselines3 are imported by the commands that need them, so
that ``--help``, ``--version`` and ``envs`` answer at once.
"""

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, NamedTuple

for package in ("typer", "pydantic", "yaml"):
    if find_spec(package) is None:  # not an import, which would take longer
        sys.exit(f'sb3-cyborg: error: {package} is missing: pip install "sb3-cyborg[train]"')

import typer  # noqa: E402  # after the check

from sb3_cyborg import __version__  # noqa: E402
from sb3_cyborg.cli.base import CONTEXT, Command, Group, Trust, errors_as_lines  # noqa: E402

app = typer.Typer(
    name="sb3-cyborg",
    cls=Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings=CONTEXT,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"sb3-cyborg {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Agents with memory, for Stable-Baselines3. Each command has its own --help, with examples."""


# --- train ------------------------------------------------------------------------------------------------------------


class TrainCommand(Command):
    """The command ``train``. Its flags are the keys of the config, which need PyTorch, so they are made when it is used."""

    def make_context(self, *args: Any, **options: Any) -> Any:
        """
        :param args: As in typer.
        :param options: As in typer.
        :return: The context of the command with its flags.
        """
        from sb3_cyborg.cli.train_command import make_command

        return make_command().make_context(*args, **options)


@app.command(cls=TrainCommand)
def train() -> None:
    """Train an agent, or resume a run."""


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
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="A .png, .pdf or .svg file. [default: memory.png, without --html]", show_default=False
        ),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option("--html", help="A .html file: one page with frames, a slider and all charts.", show_default=False),
    ] = None,
    max_steps: Annotated[int, typer.Option("--max-steps", help="Steps after which to stop if the episode is longer.")] = 500,
    heads: Annotated[
        str, typer.Option("--heads", help="Reduction over the heads in the picture: mean, max, or the number of one head.")
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
      sb3-cyborg inspect runs/sb3_cyborg-MemoryChain-v0_1 --html memory.html
      sb3-cyborg inspect runs/sb3_cyborg-TMaze-v0_1 --output maze.png --heads max
    """
    with errors_as_lines():
        from sb3_cyborg.viewers.runs import inspect_run

        if output is None and html is None:
            output = Path("memory.png")
        episode = inspect_run(
            run,
            output,
            html=html,
            which=which,
            device=device,
            trust=trust,
            heads=int(heads) if heads.isdigit() else heads,
            deterministic=not stochastic,
            max_steps=max_steps,
            seed=seed,
        )
        files = " and ".join(str(file) for file in (output, html) if file is not None)
        print(f"{files}: {episode.steps} steps of {episode.name}, return {episode.rewards.sum():.3f}")


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
        from sb3_cyborg.trainers.checkpoints import trust_flag
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
    from sb3_cyborg.cli.train_command import make_command

    make_command()()


def main() -> None:
    """Entry point of ``sb3-cyborg``."""
    app()
