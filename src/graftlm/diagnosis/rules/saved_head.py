"""D21: the embedding or the output head is saved whole, although no token is new."""

from __future__ import annotations

from graftlm.diagnosis.confidence import confidence
from graftlm.diagnosis.evidence import Evidence
from graftlm.diagnosis.finding import Finding
from graftlm.diagnosis.rule import WHOLE, Rule
from graftlm.diagnosis.shown import again, bars

TIMES, MANY = 3.0, 30.0
"""Size of the file, in sizes of the adapter alone."""
MEGABYTE = 1e6


def check(evidence: Evidence) -> Finding | None:
    """New tokens need their rows, a model that labels needs its head, and who trains all weights saves them
    all: none of these counts."""
    found = evidence.structure
    if evidence.method == WHOLE:
        return None
    if found is None or found.files is None or not found.files.copied_ends or found.labels:
        return None
    files = found.files
    if found.base is not None and files.rows > found.base.vocabulary:
        return None
    copied = sum(files.copied[path] for path in files.copied_ends)
    times = (files.adapter_bytes + copied) / max(1, files.adapter_bytes)
    if times <= TIMES:
        return None
    sizes = {"adapter": files.adapter_bytes / MEGABYTE, "copies": copied / MEGABYTE}
    return Finding(
        RULE.id,
        RULE.title,
        "warning",
        confidence(times, TIMES, MANY) if found.base is not None else 0.5,
        f"The adapter is {files.adapter_bytes / MEGABYTE:.1f} MB; copies of "
        f"{' and '.join(files.copied_ends)} beside it are {copied / MEGABYTE:.1f} MB: {times:.0f} times as "
        "much in all.",
        "They are saved whole because they are trained or targeted, or because a tool took the vocabulary "
        "for resized. They cost memory in training, and most servers refuse them.",
        "Leave them out of modules_to_save and target_modules; for new tokens train their rows alone "
        "(trainable_token_indices). From PEFT, save with save_embedding_layers=False where they are not "
        "trained.",
        again(evidence, "slim", method__modules_to_save="null") if evidence.recipe else "",
        {"times": times, "threshold": TIMES},
        bars("What the file holds", "MB", sizes),
    )


RULE = Rule(
    "D21", "Embedding or output head saved whole", check, "peft#551, #1070, #2220; threshold ours: 3 times"
)
