"""
A script for SB3 with an unchanged ``MemoryPPO``, which ``torchrun`` starts: ``rank_script.py <folder> <failing rank>``.

It writes ``<folder>/<rank>.txt``: the steps that were made, or the error that has ended training. An error does not end the
process at once, so that the others are not ended by their launcher.
"""

import os
import sys
import time
from pathlib import Path

from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback, EvalCallback
from stable_baselines3.common.vec_env import VecNormalize

from sb3_cyborg.memory_ppo.ranks import running_statistics
from tests.helpers import toy_model, toy_vec_env


class FailAt(BaseCallback):
    """Fail, or stop training, on one rank after 72 steps of all ranks; count the calls on each rank."""

    def __init__(self, rank: int, stop: bool) -> None:
        super().__init__()
        self.rank, self.stop = rank, stop

    def _on_step(self) -> bool:
        if self.num_timesteps >= 72 and int(os.environ["RANK"]) == self.rank:
            if self.stop:
                return False
            raise RuntimeError("the simulator has died")
        return True


def main(folder: Path, failing: int, stop: bool) -> None:
    env = VecNormalize(toy_vec_env(2))
    model = toy_model(env, n_steps=12, batch_size=24, seq_len=4, verbose=1, tensorboard_log=str(folder / "tensorboard"))
    evaluation = EvalCallback(VecNormalize(toy_vec_env(1), training=False), eval_freq=24, log_path=str(folder / "evaluation"))
    callbacks = [CheckpointCallback(24, str(folder / "checkpoints")), evaluation, FailAt(failing, stop)]
    report = folder / f"{os.environ['RANK']}.txt"
    try:
        model.learn(240, callback=callbacks)
    except RuntimeError as error:
        report.write_text(f"{type(error).__name__}: {error}")
        time.sleep(5)
    else:
        statistics = [(float(of.mean.sum()), float(of.var.sum()), of.count) for of in running_statistics(env)]
        report.write_text(f"{model.num_timesteps} {len(model.ep_info_buffer or ())} {statistics}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "stop")
