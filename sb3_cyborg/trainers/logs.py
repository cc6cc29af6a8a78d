"""Outputs of SB3's logger: TensorBoard and Weights & Biases for runs that may be resumed."""

import re
import sys
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.logger import HumanOutputFormat, KVWriter, Logger, TensorBoardOutputFormat

from sb3_cyborg.trainers.checkpoints import write_text
from sb3_cyborg.trainers.side_files import move_aside


class WandbOutput(KVWriter):
    """
    Send the logged values to a run of Weights & Biases. Steps are a metric, so a resumed run may go back to its checkpoint.

    :param run: The result of ``wandb.init``.
    """

    def __init__(self, run: Any) -> None:
        self.run = run
        run.define_metric("timesteps")
        run.define_metric("*", step_metric="timesteps")

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        import wandb

        values = {
            key: wandb.Histogram(value.tolist()) if isinstance(value, th.Tensor) else value
            for key, value in key_values.items()
            if isinstance(value, (int, float, np.number, th.Tensor))
        }
        self.run.log(values | {"timesteps": step})

    def close(self) -> None:
        self.run.finish()


def make_logger(folder: Path | None, verbose: int, num_timesteps: int, extra: KVWriter | None = None) -> Logger:
    """
    :param folder: Folder of TensorBoard, or ``None``.
    :param verbose: 0, or larger to print SB3's tables.
    :param num_timesteps: Step at which the run starts or resumes: TensorBoard hides entries of later steps.
    :param extra: A further output, or ``None``.
    :return: SB3's logger.
    """
    outputs: list[KVWriter] = [] if extra is None else [extra]
    if verbose:
        outputs.append(HumanOutputFormat(sys.stdout))
    if folder is not None:
        outputs.append(TensorBoardOutput(str(folder), num_timesteps))
    return Logger(None if folder is None else str(folder), outputs)


class TensorBoardOutput(TensorBoardOutputFormat):
    """
    SB3's output for TensorBoard, which hides the values logged after the checkpoint that a run is resumed from.

    :param folder: Folder of the logs.
    :param num_timesteps: Steps of the checkpoint; 0 for a new run.
    """

    def __init__(self, folder: str, num_timesteps: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(folder, purge_step=num_timesteps + 1 if num_timesteps else None)
        self._is_closed = False


def start_wandb(run: Path, project: str, config: dict[str, Any]) -> WandbOutput:
    """
    :param run: Folder of the run. The id of the W&B run is kept in it, so that a resumed run continues the same one.
    :param project: Name of the project.
    :param config: Settings to show.
    :return: An output for SB3's logger.
    """
    import wandb

    settings: dict[str, Any] = {"project": project, "name": run.name, "config": config, "dir": str(run)}
    return WandbOutput(wandb.init(**settings, id=_wandb_id(run / "wandb_id"), resume="allow"))


def _wandb_id(path: Path) -> str:
    """:return: The id in a file. A damaged file is moved aside, and a missing one is written with a new id."""
    if path.exists():
        try:
            text = path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            text = str(error)
        if re.fullmatch(r"[A-Za-z0-9_-]{1,64}", text):
            return text
        move_aside(path, f"it holds no id: {text!r}", "A new run of Weights & Biases begins.")
    new = uuid.uuid4().hex[:8]
    write_text(path, new)
    return new
