"""Seconds of a run outside its steps: loading, measuring before and after, saving, proving."""

from __future__ import annotations

import math
from dataclasses import replace

from graftlm.models.sprout import SPROUT
from graftlm.planning.setting import Setting, load_of
from graftlm.planning.step_work import ATTENTION, PASSES, Load, forward_work, head_work
from graftlm.planning.work import Work, device_seconds, host_seconds

MOST_ANSWERS, SHORT_ANSWER = 256, 64
"""How many held-out prompts are answered, and up to which length of an answer (`tasks.measurement`)."""
ENCODE_TOKENS = 4e5
"""Tokens of text that are read, checked and encoded per second."""
BUILD_SECONDS = 2.0
"""Making a plan, a model's modules, its tokenizer, its adapter and the batches, whatever their size."""
QUANTISE_VALUES = 8e7
"""Values packed per second and core."""
HELD_OUT_ROWS, WRITING_ROWS, SAMPLED_ROWS = 16, 16, 32
"""Rows side by side when the loss is measured, when answers are written, and when the base writes."""
HELD_OUT_TOKENS = 8192
"""Tokens side by side when the loss is measured, at most."""
KNOWN_ROWS, KNOWN_TOKENS = 64, 128
"""What the base writes, to measure what is forgotten (`evaluation.known_text`)."""
SPROUT_ROWS, SPROUT_TOKENS = 200, 63
"""Text that lies beside the embedded base for that."""
WRITING_OPERATIONS, WRITING_START = 90.0, 150.0
"""Small operations for one more token: of one block, and besides."""
WRITING_READS = 2.8
"""Times that a weight moves for one more token of few texts: it is put in order anew for each product."""
SAMPLED_BYTES = 550.0
"""Per logit that a token is drawn from."""
PLAIN_PASSES, PLAIN_ATTENTION_FORWARD = 5.0, 3.0
"""Of a model in its own code, without the faster parts of training: times the passes and the attention of
those."""
LOSS_BYTES = 30.0
"""Per logit of a row with a label, when the loss is measured: logits are formed, and widened to 32 bits."""
PLAIN_NARROW_BYTES = 6.0
"""Likewise of an adapter: per value on the wide sides of its products."""
PROBES, PROBE_PASSES, PROBE_TOKENS = 8, 5, 256
"""Texts of the proof at the end, how often each is read, and their length at most."""
SAVE_SECONDS = 0.15
"""Of one checkpoint, until the disk has it."""
REPORT_SECONDS = 0.6
WRITE_RATE = 3e8
"""Bytes per second to disk."""


def outside_steps(setting: Setting) -> dict[str, float]:
    """By part: load, evaluate, save, verify."""
    return {
        "load": load_seconds(setting),
        "evaluate": base_seconds(setting) + later_seconds(setting),
        "save": save_seconds(setting),
        "verify": verify_seconds(setting),
    }


def load_seconds(setting: Setting) -> float:
    """Until the base stands in memory and the rows are tokens."""
    facts, machine, workload = setting.facts, setting.machine, setting.workload
    read = facts.stored_bytes / machine.rates.disk_read + 2 * facts.stored_bytes / machine.rates.bandwidth
    packed = facts.quantisable if setting.is_quantised and not facts.stored_quantised else 0
    cores = max(1, machine.cores) if machine.device == "cpu" else 100
    tokens = workload.train_tokens + workload.held_out_tokens
    prepared = packed / (QUANTISE_VALUES * cores) + tokens / ENCODE_TOKENS
    return machine.start_seconds + BUILD_SECONDS + read + prepared


def base_seconds(setting: Setting) -> float:
    """Of measuring the base before the first step, and of what it writes to measure forgetting."""
    recipe = setting.recipe
    found = state_seconds(setting) if recipe.eval.before_after else 0.0
    if keeps_known_text(setting) and recipe.model.name != SPROUT and recipe.eval.known_path is None:
        batches = math.ceil(KNOWN_ROWS / SAMPLED_ROWS)
        found += batches * writing_seconds(setting, SAMPLED_ROWS, KNOWN_TOKENS, is_drawn=True)
    return found


def later_seconds(setting: Setting) -> float:
    """Of measuring held-out rows between steps, and the adapter at the end."""
    workload = setting.workload
    between = math.ceil(workload.steps / workload.eval_steps) if workload.eval_steps else 1
    tokens, share = workload.held_out_tokens, workload.target_share
    rows = reading_seconds(setting, workload.held_out_rows, tokens, share, is_plain=False)
    return between * rows + state_seconds(setting) + _adapter_seconds(setting)


def _adapter_seconds(setting: Setting) -> float:
    """What the adapter adds to its own measurement."""
    tokens = setting.workload.held_out_tokens
    tokens += KNOWN_ROWS * KNOWN_TOKENS if keeps_known_text(setting) else 0
    moved = PLAIN_NARROW_BYTES * tokens * (setting.sites.narrow + setting.sites.scaled)
    return _seconds(setting, Work(flops=2.0 * tokens * setting.sites.products, bytes=moved))


def state_seconds(setting: Setting) -> float:
    """Of one state of the model: held-out rows, their answers, known text."""
    workload = setting.workload
    found = reading_seconds(setting, workload.held_out_rows, workload.held_out_tokens, workload.target_share)
    found += answers_seconds(setting)
    if keeps_known_text(setting):
        is_sprout = setting.recipe.model.name == SPROUT
        rows, tokens = (SPROUT_ROWS, SPROUT_TOKENS) if is_sprout else (KNOWN_ROWS, KNOWN_TOKENS)
        found += reading_seconds(setting, rows, rows * tokens, 1.0)
    return found


def keeps_known_text(setting: Setting) -> bool:
    """Whether the loss on text that the base knew is measured: of what goes on writing text."""
    return setting.recipe.task.type in ("auto", "sft") and setting.is_native


def answers_seconds(setting: Setting) -> float:
    """Of the answers to held-out prompts, where answers are short, or their text is to be judged."""
    workload, recipe = setting.workload, setting.recipe
    length = workload.target_share * workload.mean_row_tokens
    is_asked = recipe.eval.metrics != "auto" and set(recipe.eval.metrics) != {"loss"}
    if not is_asked and (length > SHORT_ANSWER or workload.target_share > 0.95):
        return 0.0
    count = workload.held_out_rows if is_asked else min(MOST_ANSWERS, workload.held_out_rows)
    # Each batch goes on until its longest answer ends: about twice the mean.
    return math.ceil(count / WRITING_ROWS) * writing_seconds(setting, WRITING_ROWS, 2 * length)


def reading_seconds(
    setting: Setting, rows: float, tokens: float, target_share: float, *, is_plain: bool = True
) -> float:
    """Of measuring the loss on rows with so many tokens in all, forward only; `is_plain`: in the model's own
    code."""
    if tokens <= 0:
        return 0.0
    batches = max(1.0, rows / HELD_OUT_ROWS, tokens / HELD_OUT_TOKENS)
    load = replace(load_of(setting), tokens=tokens / batches, targets=target_share * tokens / batches)
    load = replace(load, document=min(load.document, 2 * tokens / max(1.0, rows)))
    logits = Work(bytes=LOSS_BYTES * target_share * tokens * setting.facts.vocabulary)
    return batches * _forward_seconds(setting, load, is_plain=is_plain) + _seconds(setting, logits)


def writing_seconds(setting: Setting, rows: int, tokens: float, *, is_drawn: bool = False) -> float:
    """Of `rows` texts side by side, one token after the other; `is_drawn`: at random, not the likeliest."""
    facts, shape = setting.facts, setting.shape
    load = Load(rows, rows, 64.0, load_of(setting).size)
    work = _forward(setting, load, is_plain=False)
    drawn = SAMPLED_BYTES * rows * facts.vocabulary if is_drawn else 0.0
    work += Work(bytes=(WRITING_READS - 1) * load.size * shape.linear + drawn)
    work = replace(work, operations=WRITING_OPERATIONS * facts.layers + WRITING_START)
    return tokens * _seconds(setting, work)


def save_seconds(setting: Setting) -> float:
    """Of checkpoints with the optimizer's state, of the adapter and of the report."""
    workload, size = setting.workload, 4.0 * setting.sites.trainable
    checkpoints = 1 + (workload.steps // workload.save_steps if workload.save_steps else 0)
    return checkpoints * (SAVE_SECONDS + 3 * size / WRITE_RATE) + size / WRITE_RATE + REPORT_SECONDS


def verify_seconds(setting: Setting) -> float:
    """Of reading probes with the adapter, its file, its merge and the base alone."""
    facts = setting.facts
    length = min(PROBE_TOKENS, max(8.0, setting.workload.mean_row_tokens))
    load = Load(length, length, length, load_of(setting).size)
    probes = PROBES * PROBE_PASSES * _forward_seconds(setting, load, is_plain=True)
    merged = setting.shape.linear if setting.sites.products else 0
    weights = Work(flops=2.0 * setting.sites.normed, bytes=6.0 * 4 * merged)
    return probes + _seconds(setting, weights) + facts.layers * 0.002


def _forward_seconds(setting: Setting, load: Load, *, is_plain: bool) -> float:
    return _seconds(setting, _forward(setting, load, is_plain=is_plain))


def _forward(setting: Setting, load: Load, *, is_plain: bool) -> Work:
    """Base and head."""
    facts, shape = setting.facts, setting.shape
    parts = forward_work(facts, shape, load, is_native=setting.is_native)
    head = head_work(shape, facts.vocabulary, load.targets, load.size, passes=1)
    if is_plain:
        parts[PASSES] *= PLAIN_PASSES
        parts[ATTENTION] *= PLAIN_ATTENTION_FORWARD if setting.is_native else 1.0
    return sum(parts.values(), head)


def _seconds(setting: Setting, work: Work) -> float:
    device = device_seconds(work, setting.machine, setting.dtype)
    host = host_seconds(work, setting.machine)
    return max(device, host) if setting.machine.device == "cuda" else device + host
