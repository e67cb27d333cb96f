"""Which reward functions a run began with: a run that goes on must be rewarded by the same ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from graftlm.core.errors import CheckpointError
from graftlm.core.files import json_text, write_atomic
from graftlm.tasks.rewards.rewards import Reward

FILE = "rewards.json"


def require_same(rewards: Sequence[Reward], folder: Path) -> None:
    """Note the digests of the rewards in a run's folder of rollouts; when it goes on, compare them.

    Raises:
        CheckpointError: names the functions whose file has changed since.
    """
    now = {reward.name: reward.digest for reward in rewards if reward.digest}
    path = folder / FILE
    if not path.is_file():
        write_atomic(path, json_text(now))
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    changed = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    if changed:
        raise CheckpointError(
            f"{', '.join(changed)} changed since this run began.",
            meaning="The run would go on by other rewards than it began with.",
            fix="Put the file back as it was, or start in a new folder (--out).",
        )
