"""Names of the published files. The official README and configuration disagree on two of them; both are accepted."""

import logging
from pathlib import Path

logger = logging.getLogger(__name__)

SPELLINGS = (
    ("rl4med-checkpoint50", "rl4med-checkpoint_50"),
    ("artifact_classifier_train_H4", "artifact_classifier_test_H4"),
)


def resolve(path: str | Path) -> Path:
    """`path`, or, where nothing is there, the same under the other published spelling if that exists."""
    path = Path(path).expanduser()
    for pair in SPELLINGS:
        for ours, other in (pair, pair[::-1]):
            alternative = Path(str(path).replace(ours, other))
            if not path.exists() and alternative.exists():
                logger.info("%s is not there; taking %s", path, alternative)
                return alternative
    return path
