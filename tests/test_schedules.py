"""Schedules as text, and the default learning rate over one or several calls of ``learn``."""

from typing import Any

import pytest
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import HParam

from sb3_cyborg import MemoryPPO
from sb3_cyborg.memory_ppo.schedules import as_schedule, learning_rate_schedule, parse_schedule
from tests.helpers import toy_model, toy_vec_env


@pytest.mark.parametrize(
    ("value", "start", "middle", "end"),
    [
        (3e-4, 3e-4, 3e-4, 3e-4),
        ("lin_3e-4", 3e-4, 1.5e-4, 0.0),
        ("lin_0.4_0.2", 0.4, 0.3, 0.2),
        (lambda p: p**2, 1.0, 0.25, 0.0),
    ],
)
def test_forms(value: Any, start: float, middle: float, end: float) -> None:
    schedule = as_schedule(value)
    assert [schedule(progress) for progress in (1.0, 0.5, 0.0)] == pytest.approx([start, middle, end])


@pytest.mark.parametrize(
    "text",
    ["", "lin", "lin_", "lin_x", "lin_-1", "lin_0", "lin_1_2_3", "lin_nan", "lin_inf", "lin_1_-1", "cos_1", "1:30", "3e-4"],
)
def test_text_that_is_no_schedule_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a schedule"):
        parse_schedule(text)


def rates_of(model: MemoryPPO, calls: list[tuple[int, bool]]) -> list[list[float]]:
    """:return: The learning rate of each update of each call of ``learn``, before it is scaled by the advantages."""
    rates: list[list[float]] = []
    train = model.train

    def recorded() -> None:
        train()
        rates[-1].append(float(model.logger.name_to_value["train/learning_rate"]))

    setattr(model, "train", recorded)  # noqa: B010  # mypy takes no assignment to a method
    for rollouts, reset in calls:
        rates.append([])
        model.learn(rollouts * 36, reset_num_timesteps=reset)
    return rates


def test_the_default_rate_falls_to_a_tenth_over_one_call() -> None:
    (rates,) = rates_of(toy_model(), [(9, True)])
    assert rates[0] == pytest.approx(7e-4 - 6.3e-4 / 9)
    assert rates[-1] == pytest.approx(7e-5)
    assert rates == sorted(rates, reverse=True)


def test_the_default_rate_stays_at_its_middle_in_continued_calls() -> None:
    calls = rates_of(toy_model(), [(1, False)] * 5)
    assert [rate for rates in calls for rate in rates] == pytest.approx([3.85e-4] * 5)
    calls = rates_of(toy_model(), [(4, True), (4, False)])
    assert calls[0][-1] == pytest.approx(7e-5)
    assert min(calls[1]) == pytest.approx(3.85e-4)


def test_an_explicit_schedule_behaves_as_in_sb3() -> None:
    """Its progress is the share of the steps of all calls in the new total."""
    calls = rates_of(toy_model(learning_rate="lin_1e-3"), [(2, True), (2, False)])
    assert calls[0] == pytest.approx([5e-4, 0.0])
    assert calls[1] == pytest.approx([2.5e-4, 0.0])
    assert learning_rate_schedule("lin_1e-3", continued=True)(0.0) == 0.0


@pytest.mark.parametrize(
    "settings",
    [{"learning_rate": "fast"}, {"clip_range": "lin_-1"}, {"clip_range_vf": "lin_1_2_3"}, {"learning_rate": "lin_0"}],
)
def test_the_algorithm_refuses_text_that_is_no_schedule(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="is not a schedule"):
        toy_model(**settings)


class HParamCallback(BaseCallback):
    """The callback of SB3's documentation, section "Logging Hyperparameters", unchanged."""

    def _on_training_start(self) -> None:
        hparam_dict = {
            "algorithm": self.model.__class__.__name__,
            "learning rate": self.model.learning_rate,
            "gamma": self.model.gamma,  # type: ignore[attr-defined]
        }
        metric_dict: dict[str, float] = {
            "rollout/ep_len_mean": 0,
            "train/value_loss": 0.0,
        }
        self.logger.record("hparams", HParam(hparam_dict, metric_dict), exclude=("stdout", "log", "json", "csv"))

    def _on_step(self) -> bool:
        return True


@pytest.mark.parametrize("settings", [{}, {"learning_rate": 1e-3}, {"learning_rate": "lin_1e-3"}])
def test_the_callback_of_sb3s_documentation_logs_hyperparameters(settings: dict[str, Any], tmp_path: Any) -> None:
    model = toy_model(toy_vec_env(), tensorboard_log=str(tmp_path), **settings)
    model.learn(72, callback=HParamCallback())
    assert list(tmp_path.rglob("events.out.tfevents*"))
