"""D28: learning from rewards that has nothing to learn from, or that eats itself up."""

from __future__ import annotations

from statistics import fmean, stdev

from graftlm.diagnosis.confidence import confidence
from graftlm.diagnosis.evidence import Evidence
from graftlm.diagnosis.finding import Finding, Plot
from graftlm.diagnosis.rule import Rule
from graftlm.diagnosis.series import early, late
from graftlm.diagnosis.symptoms import Symptom, finding_of, learning_rate

TASKS = ("grpo", "rloo", "ppo")
EVEN, CUT, EMPTY = 0.8, 0.3, 0.5
"""Share of the groups whose answers all have one reward; of answers that were cut off; that are empty."""
ENTROPY = 0.1
"""Of what it was at the start."""
KL, KL_GROWTH = 1.0, 10.0
"""Nats per token from the base, and in multiples of what it was early."""
FEWEST = 5
"""Steps before which nothing is judged."""
AGAIN = "graft tune RUN/recipe.yaml {} --out RUN-2"


def check(evidence: Evidence) -> Finding | None:
    """The surest of the symptoms; the others are told with it."""
    if evidence.task not in TASKS or len(evidence.series("step", "loss")) < FEWEST:
        return None
    looks = (_even_groups, _cut_answers, _empty_answers, _no_entropy, _far, _held_out_is_flat)
    return finding_of(RULE.id, RULE.title, looks, evidence)


def _even_groups(evidence: Evidence) -> Symptom | None:
    """Groups whose answers are all worth the same teach nothing."""
    shares = evidence.series("step", "metrics.frac_reward_zero_std")
    if len(shares) < FEWEST or (now := late(shares)) <= EVEN:
        return None
    reward = late(evidence.series("step", "metrics.reward"))
    is_hard = reward < 0.9 and now - early(shares) < 0.2  # it was so from the start, and not for being right
    return Symptom(
        "error" if now >= 0.99 else "warning",
        confidence(now, EVEN, 1.0),
        f"In {100 * now:.0f} % of the groups all answers have the same reward (mean {reward:.2f}).",
        "Advantages are differences within a group: where all answers are equally good, nothing is learnt. "
        + ("The prompts are too hard for this policy." if is_hard else "The prompts are too easy by now."),
        "A reward that tells half-right from wrong, easier prompts, more answers to each."
        if is_hard
        else "Harder prompts, or stop here.",
        AGAIN.format("--set task.num_generations=16 --set task.rewards=REWARD")
        if is_hard
        else AGAIN.format("--set data.path=HARDER"),
        {"even_groups": now, "reward": reward, "threshold": EVEN},
        Plot("Groups without a difference", "step", "share", {"groups": shares}, threshold=EVEN),
    )


def _cut_answers(evidence: Evidence) -> Symptom | None:
    """Answers that reach the longest length are judged without their end."""
    shares = evidence.series("step", "metrics.completions/clipped_ratio")
    if len(shares) < FEWEST or (now := late(shares)) <= CUT:
        return None
    longest = _task(evidence).get("max_completion_length")
    longer = 4 * longest if isinstance(longest, int) else "TOKENS"
    return Symptom(
        "warning",
        confidence(now, CUT, 1.0),
        f"{100 * now:.0f} % of the answers are cut off at {longest} tokens.",
        "What is cut off is judged without its end, and ending is not learnt.",
        "Longer answers (and data.max_length with room for them), or a penalty for what does not end.",
        AGAIN.format(f"--set task.max_completion_length={longer}"),
        {"cut_answers": now, "cut_threshold": CUT},
        Plot("Answers cut off", "step", "share", {"answers": shares}, threshold=CUT),
    )


def _empty_answers(evidence: Evidence) -> Symptom | None:
    """A policy that ends at once."""
    shares = evidence.series("step", "metrics.completions/empty_ratio")
    if len(shares) < FEWEST or (now := late(shares)) <= EMPTY:
        return None
    return Symptom(
        "error",
        confidence(now, EMPTY, 1.0),
        f"{100 * now:.0f} % of the answers are empty.",
        "To write nothing is worth more than to write: the reward takes more for mistakes than it gives.",
        "A reward that gives an empty answer the least, and a KL term that holds the policy to its base.",
        AGAIN.format(
            f"--set task.{_kl_field(evidence)}=0.1 --set train.learning_rate={learning_rate(evidence, 1 / 3)}"
        ),
        {"empty_answers": now, "empty_threshold": EMPTY},
        Plot("Empty answers", "step", "share", {"answers": shares}, threshold=EMPTY),
    )


def _no_entropy(evidence: Evidence) -> Symptom | None:
    """A policy that always writes the same explores nothing any more."""
    values = evidence.series("step", "metrics.entropy")
    if len(values) < FEWEST:
        return None
    start, now = early(values), late(values)
    if start <= 0 or now >= ENTROPY * start:
        return None
    return Symptom(
        "error",
        confidence(now / start, ENTROPY, 0.0),
        f"The entropy fell from {start:.2f} to {now:.3f} nats per token.",
        "The policy writes one answer to each prompt: it explores nothing any more, and learns nothing.",
        "A third of the learning rate, and a KL term that holds the policy to its base.",
        AGAIN.format(
            f"--set train.learning_rate={learning_rate(evidence, 1 / 3)} --set task.{_kl_field(evidence)}=0.1"
        ),
        {"entropy": now, "entropy_at_start": start, "entropy_threshold": ENTROPY * start},
        Plot("Entropy", "step", "nats per token", {"entropy": values}, threshold=ENTROPY * start),
    )


def _far(evidence: Evidence) -> Symptom | None:
    """A policy that runs away from its base."""
    values = evidence.series("step", "metrics.kl")
    if len(values) < FEWEST:
        return None
    start, now = early(values[1:]), late(values)  # before the first step it is 0
    if now <= KL or now <= KL_GROWTH * start:
        return None
    return Symptom(
        "error",
        confidence(now, KL, 3 * KL),
        f"The policy is {now:.1f} nats per token from its base, after {start:.2g} early on.",
        "It left the texts that its base can write; rewards that were meant for those judge something else.",
        "A third of the learning rate, a larger KL term, rewards that look at the text as well.",
        AGAIN.format(
            f"--set train.learning_rate={learning_rate(evidence, 1 / 3)} --set task.{_kl_field(evidence)}=0.1"
        ),
        {"kl": now, "kl_early": start, "kl_threshold": KL},
        Plot("Distance from the base", "step", "nats per token", {"KL": values}, threshold=KL),
    )


def _held_out_is_flat(evidence: Evidence) -> Symptom | None:
    """Rewards that rise on the prompts of training alone."""
    told, held = evidence.series("step", "metrics.reward"), evidence.series("evaluate", "metrics.reward")
    if not evidence.is_over or len(told) < 4 * FEWEST or len(held) < 3:
        return None
    quarter = len(told) // 4
    first, last = [value for _, value in told[:quarter]], [value for _, value in told[-quarter:]]
    rise = fmean(last) - fmean(first)
    noise = (stdev(first) + stdev(last)) / quarter**0.5
    gained = held[-1][1] - held[0][1]
    if noise <= 0 or rise <= 3 * noise or gained > 0.1 * rise:
        return None
    return Symptom(
        "warning",
        confidence(rise, 3 * noise, 9 * noise),
        f"The reward of training rose by {rise:.2f}, that of held-out prompts by {gained:.2f}.",
        "The policy learns these prompts, not the task.",
        "More prompts, fewer epochs.",
        AGAIN.format("--set train.num_train_epochs=1"),
        {"rise": rise, "held_out_rise": gained},
        Plot("Reward", "step", "reward", {"training": told, "held out": held}),
    )


def _task(evidence: Evidence) -> dict[str, object]:
    found = evidence.recipe.get("task")
    return found if isinstance(found, dict) else {}


def _kl_field(evidence: Evidence) -> str:
    return "kl_coef" if evidence.task == "ppo" else "beta"


RULE = Rule(
    "D28",
    "Learning from rewards degenerates",
    check,
    "The figures that TRL logs (zero-std groups, clipped completions, entropy, KL); thresholds on runs of "
    "ours.",
    is_live=True,
)
