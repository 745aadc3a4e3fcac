"""When training should end before its last epoch: the reward stands still, or the held-out APR has fallen."""

from typing import Any


class RewardPlateau:
    """The paper's stopping criterion: mean reward changed by less than `tolerance` in `patience` successive epochs."""

    def __init__(self, tolerance: float, patience: int):
        self.tolerance, self.patience = tolerance, patience
        self.previous: float | None = None
        self.quiet_epochs = 0

    def update(self, reward: float) -> bool:
        """Take this epoch's mean reward; True when training should stop. Never with patience 0."""
        quiet = self.previous is not None and abs(reward - self.previous) < self.tolerance
        self.quiet_epochs = self.quiet_epochs + 1 if quiet else 0
        self.previous = reward
        return self.stop

    @property
    def stop(self) -> bool:
        """Whether training should stop."""
        return 0 < self.patience <= self.quiet_epochs

    def state_dict(self) -> dict:
        return {"previous": self.previous, "quiet_epochs": self.quiet_epochs}

    def load_state_dict(self, state: dict) -> None:
        self.previous, self.quiet_epochs = state["previous"], state["quiet_epochs"]


class BestAndCollapse:
    """The best of a run's held-out evaluations, and whether the policy has collapsed since.

    The best evaluation is the one of highest APR, the first of equals. A later one has *collapsed* when, on the same
    prompts and noise, its APR is lower by more than `tolerance`. Where its mean reward is higher than the best's at the
    same time, the reward is being hacked; where it is not, the policy itself has broken down.

    Args:
        tolerance: fall of APR, in [0, 1], that is put down to chance.
        patience: collapsed evaluations in a row after which training should stop; 0 never stops.

    Attributes:
        best, last: {"epoch": epochs completed, "apr", "reward"} of the best and of the last evaluation, or None.
        collapsed: collapsed evaluations in a row up to the last one.
    """

    def __init__(self, tolerance: float, patience: int):
        self.tolerance, self.patience = tolerance, patience
        self.best: dict[str, Any] | None = None
        self.last: dict[str, Any] | None = None
        self.collapsed = 0

    def update(self, epoch: int, apr: float, reward: float) -> bool:
        """Take the evaluation after `epoch` epochs; True when it is the best so far."""
        self.last = {"epoch": epoch, "apr": apr, "reward": reward}
        if self.best is None or apr > self.best["apr"]:
            self.best, self.collapsed = self.last, 0
            return True
        self.collapsed = self.collapsed + 1 if self.best["apr"] - apr > self.tolerance else 0
        return False

    @property
    def stop(self) -> bool:
        """Whether training should stop."""
        return 0 < self.patience <= self.collapsed

    @property
    def hacked(self) -> bool:
        """Whether the last evaluation has a higher reward than the best one: the reward rises while APR falls."""
        return self.best is not None and self.last["reward"] > self.best["reward"]

    def state_dict(self) -> dict:
        return {"best": self.best, "last": self.last, "collapsed": self.collapsed}

    def load_state_dict(self, state: dict) -> None:
        self.best, self.last, self.collapsed = state["best"], state["last"], state["collapsed"]
