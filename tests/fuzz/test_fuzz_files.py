"""Runs with files that are damaged at random: they go on from the newest whole file, or are refused; nothing is lost."""

import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch as th
from hypothesis import given
from hypothesis import strategies as st

from sb3_cyborg import MemoryPPO, TrainerV7
from sb3_cyborg.trainers.checkpoints import list_checkpoints, read_progress
from sb3_cyborg.trainers.run_lock import LOCK_FILE
from tests.fuzz.outcomes import cases, check_message, some, within
from tests.helpers import same, weights
from tests.trainer_helpers import ROLLOUT, tiny

Random = np.random.Generator
Damage = Callable[[Path, Random], None]


def delete(path: Path, _: Random) -> None:
    path.unlink()


def cut(path: Path, random: Random) -> None:
    path.write_bytes(path.read_bytes()[: random.integers(path.stat().st_size)])


def empty(path: Path, _: Random) -> None:
    path.write_bytes(b"")


def garbage(path: Path, random: Random) -> None:
    path.write_bytes(random.bytes(int(random.integers(1, 2000))))


def flip(path: Path, random: Random) -> None:
    content = bytearray(path.read_bytes())
    for position in random.integers(len(content), size=random.integers(1, 20)):
        content[position] ^= int(random.integers(1, 256))
    path.write_bytes(content)


def zeros(path: Path, random: Random) -> None:
    """As after a power failure: the length is there, the content is not."""
    content = path.read_bytes()
    begin = random.integers(len(content))
    path.write_bytes(content[:begin] + bytes(len(content) - begin))


def append(path: Path, random: Random) -> None:
    path.write_bytes(path.read_bytes() + random.bytes(50))


def folder(path: Path, _: Random) -> None:
    path.unlink()
    path.mkdir()


def replace(path: Path, random: Random) -> None:
    """A copy of another file of the run."""
    run = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    others = sorted(other for other in run.rglob("*") if other.is_file() and other != path)
    shutil.copy(others[random.integers(len(others))], path)


DAMAGES: list[Damage] = [delete, cut, empty, garbage, flip, zeros, append, folder, replace]
FILES = ["checkpoints/step_000000000128.zip", "checkpoints/step_000000000192.zip", "checkpoints/step_000000000256.zip"]
FILES += ["final_model.zip", "best_model.zip", "monitor.csv", "evaluations.npz", "sessions.yaml", "config.yaml"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """:return: The folder of a finished run of 256 steps."""
    trainer = tiny(tmp_path_factory.mktemp("fuzz_files"), run_name="run", eval_freq=64, n_eval_episodes=1).train()
    assert trainer.run is not None
    return trainer.run


@pytest.fixture(scope="module")
def trained(finished: Path) -> dict[int, dict[str, th.Tensor]]:
    """:return: The weights of the run by number of steps."""
    models = (MemoryPPO.load(path) for path in finished.rglob("*.zip"))
    return {model.num_timesteps: weights(model.policy) for model in models}


def contents(run: Path) -> list[bytes]:
    """:return: The contents of all files of a run but its lock."""
    return sorted(path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != LOCK_FILE)


@cases(60, 1500)
def test_damaged_runs(finished: Path, trained: dict[int, dict[str, th.Tensor]], count: int) -> None:
    outcomes = {"resumed": 0, "anew": 0, "refused": 0}
    intact = {name: (finished / name).read_bytes() for name in FILES}

    @some(count)
    @given(
        st.lists(st.tuples(st.sampled_from(FILES), st.sampled_from(DAMAGES)), max_size=6, unique_by=lambda pair: pair[0]),
        st.integers(0, 2**32 - 1),
    )
    def check(damages: list[tuple[str, Damage]], seed: int) -> None:
        random = np.random.default_rng(seed)
        with tempfile.TemporaryDirectory() as name, warnings.catch_warnings(), within(120):
            warnings.simplefilter("ignore")
            run = Path(shutil.copytree(finished, Path(name) / "run"))
            for file, damage in damages:
                damage(run / file, random)
            whole = [file for file in FILES if file.endswith(".zip") and (run / file).is_file()]
            whole = [file for file in whole if (run / file).read_bytes() in intact.values() and is_whole(run / file)]
            newest = max((read_progress(run / file)["num_timesteps"] for file in whole), default=0)
            before = contents(run)
            try:
                trainer = TrainerV7.resume(run, total_timesteps=256 + 2 * ROLLOUT, save_freq=64, eval_freq=64, wandb=False)
            except ValueError as error:
                check_message(error, len(str(error).splitlines()) if "config" in str(damages) else 1)
                assert contents(run) == before, "a refusal changes nothing but names"
                outcomes["refused"] += 1
                return
            assert contents(run) == before or (run / "old_1").is_dir(), "nothing is deleted"
            steps = trainer.model.num_timesteps
            assert steps >= newest
            if steps:
                assert same(weights(trainer.model.policy), trained[steps]), "weights that were not those of the run"
            outcomes["resumed" if steps else "anew"] += 1
            trainer.train()
            assert trainer.model.num_timesteps == 256 + 2 * ROLLOUT
            assert read_progress(list_checkpoints(run)[-1])["num_timesteps"] == 256 + 2 * ROLLOUT
            # In the order of the file: `load_results` sorts by time, of which a changed digit cannot be found.
            episodes = (run / "monitor.csv").read_text().splitlines()[2:]
            ends = [int(episode.split(",")[-1]) for episode in episodes]
            assert ends == sorted(ends)
            with np.load(run / "evaluations.npz") as file:
                assert file["timesteps"][-1] == 256 + 2 * ROLLOUT
            trainer.close()

    check()
    assert outcomes["resumed"] > count // 10, outcomes
    assert outcomes["refused"], outcomes


def is_whole(path: Path) -> bool:
    """:return: Whether a file is a checkpoint, and complete."""
    try:
        read_progress(path)
    except ValueError:
        return False
    return True
