"""The criterion of collapse: the judge sees less of what was asked for, whether the reward rises or falls."""

import json

import pytest

from ddpo_pytorch.training.run_state import BestAndCollapse


def stops_at(patience: int, tolerance: float, values) -> int | None:
    """Index of the evaluation after which training stops."""
    watch = BestAndCollapse(tolerance, patience)
    for epoch, (apr, reward) in enumerate(values):
        watch.update(epoch, apr, reward)
        if watch.stop:
            return epoch
    return None


@pytest.mark.parametrize(
    ("patience", "tolerance", "values", "expected"),
    [
        (1, 0.1, [(0.5, 0.5), (0.375, 0.6)], 1),
        (1, 0.125, [(0.5, 0.5), (0.375, 0.6)], None),  # a fall by the tolerance itself is not more than it
        (1, 0.1, [(0.5, 0.5), (0.3, 0.5)], 1),
        (1, 0.1, [(0.5, 0.5), (0.3, 0.4)], 1),  # both fell
        (2, 0.05, [(0.11, 0.745), (0.05, 0.6), (0.04, 0.46)], 2),  # a learning rate that is 20 times too high
        (0, 0.1, [(0.5, 0.5)] + [(0.1, 0.9)] * 5, None),
        (2, 0.1, [(0.5, 0.5), (0.3, 0.6), (0.45, 0.7), (0.3, 0.8), (0.3, 0.9)], 4),  # in a row
        (
            2,
            0.1,
            [(0.5, 0.5), (0.3, 0.6), (0.6, 0.7), (0.45, 0.8), (0.55, 0.65), (0.4, 0.9), (0.4, 0.8)],
            6,
        ),  # new best
        (1, 0.0, [(0.5, 0.5), (0.5, 0.6), (0.4, 0.6)], 2),
    ],
)
def test_collapse_criterion(patience, tolerance, values, expected):
    assert stops_at(patience, tolerance, values) == expected


def test_a_rising_reward_tells_hacking_from_collapse():
    watch = BestAndCollapse(0.1, 1)
    watch.update(0, 0.5, 0.5)
    for reward, hacked in ((0.6, True), (0.5, False), (0.4, False)):
        watch.update(1, 0.3, reward)
        assert watch.stop and watch.hacked is hacked


def test_collapse_goes_on_counting_after_a_restart():
    values = [(0.5, 0.5), (0.3, 0.6), (0.2, 0.7)]
    first, second = BestAndCollapse(0.1, 2), BestAndCollapse(0.1, 2)
    for epoch, (apr, reward) in enumerate(values[:2]):
        first.update(epoch, apr, reward)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert not second.stop and second.best == {"epoch": 0, "apr": 0.5, "reward": 0.5}
    assert not second.update(2, *values[2]) and second.stop
