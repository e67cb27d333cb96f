"""Faults of rows (D03, D15 to D19, D26): in runs of Graft, and in rows that other trainers made."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from case import Case, Diagnosed, tuned, write_rows
from foreign import collated, edited_base, peft_adapter, tokenizer_of

from graftlm.models.sprout import sprout_folder

Row = dict[str, Any]

SUMS: list[Row] = [{"prompt": f"What is twice {n}?", "completion": f"It is {2 * n}."} for n in range(90)]
LONG: list[Row] = [
    {"prompt": f"Count to {n}.", "completion": " ".join(str(k) for k in range(1, n + 1))}
    for n in range(5, 95)
]
WORDS = "the a old red sun sea fox hen bee oak sat ran saw ate hid dug sang by on in near under"
STORIES: list[Row] = [
    {"prompt": f"Story {n}", "completion": " ".join(random.Random(n).choices(WORDS.split(), k=30))}
    for n in range(90)
]
ALTERNATING = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
"""As the templates of several families refuse conversations."""
BEGIN = "<|system|>"
"""A special token of the embedded base, here as a begin token."""


def run(folder: Path, rows: list[Row], *settings: str, model: str = "sprout") -> Path:
    """A run of a few steps: what is looked at is there before the first."""
    return tuned(folder, write_rows(folder / "rows.jsonl", rows), "train.max_steps=3", *settings, model=model)


# D03


def attention_only(folder: Path) -> Path:
    return run(folder, SUMS, "method.target_modules=attention")


def attention_only_elsewhere(folder: Path) -> Diagnosed:
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    return Diagnosed(peft_adapter(folder / "adapter", target_modules=targets), base="sprout")


def all_linear_elsewhere(folder: Path) -> Diagnosed:
    return Diagnosed(peft_adapter(folder / "adapter", target_modules="all-linear"), base="sprout")


# D15


def without_end_token(folder: Path) -> Path:
    def edit(config: Row, tokenizer: Row) -> None:
        del config["chat_template"], config["eos_token"]

    return _on(folder, edited_base(folder, edit), SUMS)


def with_end_token(folder: Path) -> Path:
    def edit(config: Row, tokenizer: Row) -> None:
        del config["chat_template"]

    return _on(folder, edited_base(folder, edit), SUMS)


def padding_is_the_end(folder: Path) -> Diagnosed:
    return _elsewhere(folder, collated(SUMS, sprout_folder(), pad="<|end|>"))


def padding_of_its_own(folder: Path) -> Diagnosed:
    return _elsewhere(folder, collated(SUMS, sprout_folder(), pad="<|pad|>"))


# D16


def rendered_before(folder: Path) -> Path:
    """The texts hold the begin token, as if a template had written them."""
    rows = [{"prompt": BEGIN + row["prompt"], "completion": row["completion"]} for row in SUMS]
    return _on(folder, edited_base(folder, _begins), rows)


def not_rendered_before(folder: Path) -> Path:
    return _on(folder, edited_base(folder, _begins), SUMS)


def _begins(config: Row, tokenizer: Row) -> None:
    """Let the tokenizer write a begin token before every text."""
    del config["chat_template"]
    config["bos_token"] = BEGIN
    number = next(one["id"] for one in tokenizer["added_tokens"] if one["content"] == BEGIN)
    first = {"SpecialToken": {"id": BEGIN, "type_id": 0}}
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [first, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [first, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {BEGIN: {"id": BEGIN, "ids": [number], "tokens": [BEGIN]}},
    }


def without_begin(folder: Path) -> Diagnosed:
    return _begun(folder, special=False)


def with_begin(folder: Path) -> Diagnosed:
    return _begun(folder, special=True)


def _begun(folder: Path, *, special: bool) -> Diagnosed:
    base = edited_base(folder, _begins)
    tokenizer = tokenizer_of(base)
    ids = [
        tokenizer(f"{row['prompt']}\n{row['completion']}<|end|>", add_special_tokens=special)["input_ids"]
        for row in SUMS
    ]
    return _elsewhere(folder, [{"input_ids": row} for row in ids], base)


# D17


def other_template_now(folder: Path) -> Path:
    """The tokenizer of the base is changed after the run."""
    base = edited_base(folder, lambda config, tokenizer: None)
    run = _on(folder, base, SUMS)

    def edit(config: Row, tokenizer: Row) -> None:
        config["chat_template"] = config["chat_template"].replace("<|assistant|>", "<|assistant|> ")

    edited_base(folder, edit)
    return run


def same_template_now(folder: Path) -> Path:
    return _on(folder, edited_base(folder, lambda config, tokenizer: None), SUMS)


def turns_in_no_order(folder: Path) -> Path:
    """A third of the conversations begin with the assistant, which the template refuses."""
    return _chat(folder, [_turns(n, greets=n % 3 == 0) for n in range(90)])


def turns_in_order(folder: Path) -> Path:
    return _chat(folder, [_turns(n, greets=False) for n in range(90)])


def _turns(number: int, *, greets: bool) -> Row:
    ask = {"role": "user", "content": f"What is twice {number}?"}
    answer = {"role": "assistant", "content": f"It is {2 * number}."}
    greeting = {"role": "assistant", "content": "Hello, what can I do for you?"}
    return {"messages": [greeting, ask, answer] if greets else [ask, answer]}


def _chat(folder: Path, rows: list[Row]) -> Path:
    def edit(config: Row, tokenizer: Row) -> None:
        config["chat_template"] = ALTERNATING

    return _on(folder, edited_base(folder, edit), rows)


def plain_by_force(folder: Path) -> Path:
    rows = [_turns(n, greets=False) for n in range(90)]
    return run(folder, rows, "data.template=plain")


# D18


def prompts_learnt(folder: Path) -> Path:
    return run(folder, SUMS, "data.train_on=all")


def mark_not_found(folder: Path) -> Diagnosed:
    """Labels up to a mark are masked; behind a space the mark has other tokens than alone."""
    return _marked(folder, "Answer:")


def mark_found(folder: Path) -> Diagnosed:
    return _marked(folder, " Answer:")


def _marked(folder: Path, mark: str) -> Diagnosed:
    tokenizer = tokenizer_of(sprout_folder())
    wanted = tokenizer(mark)["input_ids"]
    rows = []
    for row in SUMS:
        ids = tokenizer(f"{row['prompt']} Answer: {row['completion']}<|end|>")["input_ids"]
        places = [at for at in range(len(ids)) if ids[at : at + len(wanted)] == wanted]
        first = places[0] + len(wanted) if places else len(ids)
        rows.append({"input_ids": ids, "labels": [-100] * first + ids[first:]})
    return _elsewhere(folder, rows)


# D19


def too_short(folder: Path) -> Path:
    return run(folder, LONG, "data.max_length=64")


def cut_elsewhere(folder: Path) -> Diagnosed:
    return _elsewhere(folder, _tokenised(64))


def whole_elsewhere(folder: Path) -> Diagnosed:
    return _elsewhere(folder, _tokenised(512))


def _tokenised(limit: int) -> list[Row]:
    tokenizer = tokenizer_of(sprout_folder())
    rows = []
    for row in LONG:
        prompt = tokenizer(row["prompt"] + "\n")["input_ids"]
        ids = (prompt + tokenizer(f"{row['completion']}<|end|>")["input_ids"])[:limit]
        rows.append({"input_ids": ids, "labels": [-100] * len(prompt) + ids[len(prompt) :]})
    return rows


# D26


def held_out_again(folder: Path) -> Path:
    """The held-out file is a sample of the training file."""
    return _held_out(folder, SUMS[::3])


def held_out_edited(folder: Path) -> Path:
    """The same with words of its own in every row."""
    some = STORIES[::3]
    edited = [
        {**row, "completion": f"{row['completion']} and that was number {n}"} for n, row in enumerate(some)
    ]
    return _held_out(folder, edited, STORIES)


def _held_out(folder: Path, held_out: list[Row], rows: list[Row] = SUMS) -> Path:
    return run(folder, rows, f"data.eval_path={write_rows(folder / 'eval.jsonl', held_out)}")


def rows_again(folder: Path) -> Path:
    return run(folder, SUMS + SUMS[::4])


def rows_once(folder: Path) -> Path:
    return run(folder, SUMS)


def _on(folder: Path, base: Path, rows: list[Row]) -> Path:
    return run(folder, rows, model=str(base))


def _elsewhere(folder: Path, rows: list[Row], base: Path | None = None) -> Diagnosed:
    """Rows as another trainer made them, beside an adapter of PEFT."""
    data = write_rows(folder / "rows.jsonl", rows)
    return Diagnosed(peft_adapter(folder / "adapter"), base=str(base or "sprout"), data=data)


CASES: tuple[Case, ...] = (
    Case("D03", "attention-only", attention_only),
    Case("D03", "attention-only-in-peft", attention_only_elsewhere, all_linear_elsewhere),
    Case("D15", "no-end-token", without_end_token, with_end_token),
    Case("D15", "padding-is-the-end", padding_is_the_end, padding_of_its_own),
    Case("D16", "rendered-before", rendered_before, not_rendered_before),
    Case("D16", "no-begin-token", without_begin, with_begin),
    Case("D17", "other-template-now", other_template_now, same_template_now),
    Case("D17", "turns-in-no-order", turns_in_no_order, turns_in_order),
    Case("D17", "plain-by-force", plain_by_force),
    Case("D18", "prompts-learnt", prompts_learnt),
    Case("D18", "mark-not-found", mark_not_found, mark_found),
    Case("D19", "too-short", too_short),
    Case("D19", "too-short-elsewhere", cut_elsewhere, whole_elsewhere),
    Case("D26", "held-out-again", held_out_again),
    Case("D26", "held-out-edited", held_out_edited),
    Case("D26", "rows-again", rows_again, rows_once),
)
