"""The text sprout is pre-trained on: short documents made from templates, the same for the same seed.

Most documents put a small *context* (a message, a list, a table of records, a story) before questions
about it, in one of several layouts, nearly half of them in the chat format. They exercise copying,
looking up, sorting, counting and arithmetic.
"""

from collections.abc import Callable, Iterator
from random import Random

import messages
import words as w

USER, ASSISTANT, SYSTEM, END = "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"
QA = tuple[str, str]  # a question and its answer

SYSTEM_PROMPTS = [
    "You are a helpful assistant.", "Answer briefly.", "You are sprout, a very small language model.",
    "You read messages and answer questions about them.", "Keep to the text.",
    "Answer in one short sentence.",
]  # fmt: skip


def chat(rng: Random, turns: list[QA]) -> str:
    """A conversation in the chat format, sometimes with a system message."""
    head = f"{SYSTEM}\n{rng.choice(SYSTEM_PROMPTS)}{END}\n" if rng.random() < 0.3 else ""
    return head + "".join(f"{USER}\n{user}{END}\n{ASSISTANT}\n{reply}{END}\n" for user, reply in turns)


def ask(rng: Random, context: str, pairs: list[QA]) -> str:
    """Lays a context and questions about it out as one document."""
    layout = rng.random()
    gap = "\n" if context else ""
    if layout < 0.45:
        (question, answer), *more = pairs
        first = f"{question}{gap}{context}" if rng.random() < 0.5 else f"{context}{gap}{question}"
        return chat(rng, [(first, answer), *more])
    if layout < 0.65:
        return context + gap + "\n".join(f"Question: {q}\nAnswer: {a}" for q, a in pairs)
    if layout < 0.85:
        return context + gap + "\n".join(f"Q: {q} A: {a}" for q, a in pairs)
    return context + gap + " ".join(f"{q} {a}." if a[-1] not in ".!?" else f"{q} {a}" for q, a in pairs)


def message_reading(rng: Random) -> str:
    """A message and questions about who wrote it, its numbers and what it is about."""
    text, facts = messages.message(rng)
    keys = rng.sample(sorted(facts), k=min(len(facts), rng.randint(1, 4)))
    style = rng.random()
    if style < 0.5:
        return ask(rng, text, [(rng.choice(messages.QUESTIONS[key]), facts[key]) for key in keys])
    names = [rng.choice(messages.LABELS[key]) for key in keys]
    values = [facts[key] for key in keys]
    fields = list(zip(names, values, strict=True))
    if style < 0.65:
        form = "\n".join(f"{name}: {value}" for name, value in fields)
        return ask(rng, text, [("Fill in: " + ", ".join(names), form)])
    if style < 0.75:
        return ask(rng, text, [(f"Write the {w.listed(names)}, with bars between.", " | ".join(values))])
    if style < 0.85:
        return ask(rng, text, [("Make notes.", "; ".join(f"{name} = {value}" for name, value in fields))])
    if style < 0.92:
        return ask(rng, text, [(f"Quote the {names[0]}.", f'The {names[0]} is "{values[0]}".')])
    return chat(
        rng, [(text, messages.notes(rng, facts) if rng.random() < 0.8 else messages.reply(rng, facts))]
    )


def records(rng: Random) -> str:
    """A small table of people or things with their codes, and look-ups in both directions."""
    use_names = rng.random() < 0.6
    size = rng.randint(2, 6)
    left = [
        w.full_name(rng) if use_names else f"{rng.choice(w.COLORS)} {rng.choice(w.ITEMS)}"
        for _ in range(size)
    ]
    rows = dict(zip(left, (w.code(rng) for _ in range(size)), strict=True))
    noun = rng.choice(["code", "number", "room", "ticket", "order"])
    mark = rng.choice([": ", " = ", " - ", f" has {noun} ", " | "])
    context = rng.choice(["\n", "\n", ". ", "; "]).join(f"{k}{mark}{v}" for k, v in rows.items())
    pairs = []
    for key in rng.sample(sorted(rows), k=rng.randint(1, len(rows))):
        forward = rng.choice(
            [f"What is the {noun} of {key}?", f"Which {noun} belongs to {key}?", f"{noun} of {key}?"]
        )
        back = rng.choice([f"Who has {noun} {rows[key]}?" if use_names else f"What has {noun} {rows[key]}?",
                           f"{noun.capitalize()} {rows[key]} belongs to"])  # fmt: skip
        pairs.append((forward, rows[key]) if rng.random() < 0.6 else (back, key))
    return ask(rng, context, pairs)


def copying(rng: Random) -> str:
    """Repeat names, codes or invented words, whole or in part."""
    makers: list[Callable[[Random], str]] = [
        w.full_name,
        w.code,
        w.nonsense,
        w.town,
        lambda r: w.digits(r, 5),
    ]
    things = [rng.choice(makers)(rng) for _ in range(rng.randint(1, 5))]
    text = ", ".join(things)
    kind = rng.randrange(5)
    if kind == 0:
        return ask(rng, "", [(rng.choice(["Repeat: ", "Say this again: ", "Copy: "]) + text, text)])
    if kind == 1:
        return ask(rng, text, [("What comes first?", things[0]), ("What comes last?", things[-1])])
    if kind == 2:
        return ask(rng, text, [("Write one per line.", "\n".join(things))])
    if kind == 3:
        return ask(rng, text, [("Put each in quotes.", ", ".join(f'"{t}"' for t in things))])
    word = rng.choice(things)
    return ask(rng, "", [(f'Spell "{word}".', " ".join(word.replace(" ", "")))])


def sums(rng: Random) -> str:
    """Small arithmetic, bare or as a word problem."""
    pairs = []
    for _ in range(rng.randint(1, 4)):
        a, b = rng.randint(0, rng.choice([10, 20, 50])), rng.randint(0, rng.choice([10, 20]))
        a, b = max(a, b), min(a, b)
        who, thing = w.first_name(rng), rng.choice(w.FOODS[3:4] + w.ITEMS[:12])
        pairs.append(rng.choice([
            (f"What is {a} + {b}?", f"{a + b}"), (f"{a} plus {b}?", f"{a + b}"),
            (f"What is {a} - {b}?", f"{a - b}"),
            (f"{a} minus {b}?", f"{a - b}"), (f"Which is larger, {a} or {b}?", f"{a}"),
            (f"What comes after {a}?", f"{a + 1}"),
            (f"What is {a % 10} times {b % 10}?", f"{(a % 10) * (b % 10)}"),
            (f"{who} has {a} {thing}s and gives away {b}. How many are left?", f"{a - b}"),
            (f"{who} has {a} {thing}s and gets {b} more. How many in all?", f"{a + b}"),
        ]))  # fmt: skip
    return ask(rng, "", pairs)


def lists(rng: Random) -> str:
    """Sort, reverse, count, pick from and search a list."""
    pool = rng.choice([w.ITEMS, w.ANIMALS, w.FOODS, w.COLORS, w.PLACES, w.JOBS])
    things = rng.sample(pool, k=rng.randint(2, 6))
    if rng.random() < 0.3:
        things = [str(n) for n in rng.sample(range(1, 100), k=len(things))]
    in_order = sorted(things, key=lambda t: (int(t) if t.isdigit() else 0, t))
    probe = rng.choice([*things, rng.choice(pool)])
    pairs = [
        ("Sort the list.", ", ".join(in_order)), ("Turn the list around.", ", ".join(things[::-1])),
        ("How many are there?", str(len(things))), ("Which is first?", things[0]),
        ("Which is last?", things[-1]),
        (f"Is {probe} in the list?", "yes" if probe in things else "no"), ("Which is second?", things[1]),
        ("Write it as a sentence.", f"I see {w.listed(things)}."),
        ("Write it as a set.", "{" + ", ".join(in_order) + "}"),
        ("Write it in brackets.", "[" + ", ".join(things) + "]"),
        (f"Add {probe} to the end.", ", ".join([*things, probe])),
        (f"Leave out {things[0]}.", ", ".join(things[1:])),
        ("Write it in capitals.", ", ".join(things).upper()),
    ]  # fmt: skip
    return ask(
        rng,
        rng.choice(["List: ", "", "The list is "]) + ", ".join(things),
        rng.sample(pairs, k=rng.randint(1, 4)),
    )


def story(rng: Random) -> str:
    """A little story about two characters, now and then followed by questions."""
    a, b = w.first_name(rng), w.first_name(rng)
    animal, place, item, food = (rng.choice(p) for p in (w.ANIMALS, w.PLACES, w.ITEMS, w.FOODS))
    adjective, other = rng.choice(w.ADJECTIVES), rng.choice(w.ADJECTIVES)
    opening = rng.choice([f"Once there was {w.an(adjective)} {animal} called {a}.",
        f"{a} was {w.an(adjective)} {animal}.",
                          f"In a {place} lived {w.an(animal)} named {a}."])  # fmt: skip
    middle = rng.sample([
        f"{a} had a friend called {b}.", f"One {rng.choice(w.DAYS)}, {a} and {b} walked to the {place}.",
        f"{b} had lost {w.an(item)} and was sad.", f'"Where is my {item}?" asked {b}.',
        f'"I can help you," said {a}.',
        f"They looked under {w.an(other)} stone, but nothing was there.", f"{a} liked to eat {food}.",
        f"It rained all day, so {a} stayed at home.", f"They found {w.an(other)} {item} near the {place}.",
        f'"Thank you, {a}!" said {b}.', f"{b} gave {a} some {food}.",
        f"{a} and {b} played until the sun went down.",
    ], k=rng.randint(3, 7))  # fmt: skip
    ending = rng.choice([f"Then {a} went home and slept.", f"From that day on, {a} and {b} were friends.",
                         f"{a} was happy again.", "It had been a good day."])  # fmt: skip
    text = " ".join([opening, *middle, ending])
    if rng.random() < 0.5:
        return text
    if rng.random() < 0.3:
        return chat(
            rng,
            [
                (
                    rng.choice(["Tell me a story about ", "A story, please, about "])
                    + f"{w.an(animal)} called {a}.",
                    text,
                )
            ],
        )
    pairs = [
        (f"Who is {a}?", w.an(animal)),
        ("What is the story about?", w.an(animal)),
        ("Which animal is in the story?", animal),
    ]
    return ask(rng, text, rng.sample(pairs, k=rng.randint(1, 2)))


def portrait(rng: Random) -> str:
    """A paragraph on an invented person and questions about it."""
    name, job, home, born = w.full_name(rng), rng.choice(w.JOBS), w.town(rng), w.town(rng)
    age, pet, color, food = (
        rng.randint(18, 80),
        rng.choice(w.ANIMALS),
        rng.choice(w.COLORS),
        rng.choice(w.FOODS),
    )
    facts = [
        (f"{name} is {w.an(job)}.", "What is the job?", job),
        (f"{name} lives in {home}.", "Where is the home?", home),
        (f"{name} was born in {born}.", "Where was the birth?", born),
        (f"{name} is {age} years old.", "What is the age?", str(age)),
        (f"The favourite colour of {name} is {color}.", "Which colour?", color),
        (f"{name} keeps {w.an(pet)}.", "Which animal?", pet),
        (f"{name} likes {food}.", "Which food?", food),
    ]  # fmt: skip
    chosen = rng.sample(facts, k=rng.randint(3, 6))
    short = name.split()[0]
    text = " ".join(
        [chosen[0][0], *(sentence.replace(name, rng.choice([name, short])) for sentence, _, _ in chosen[1:])]
    )
    if rng.random() < 0.3:
        return text
    pairs = [(question, answer) for _, question, answer in chosen] + [("Who is this about?", name)]
    return ask(rng, text, rng.sample(pairs, k=rng.randint(1, 3)))


def labels(rng: Random) -> str:
    """Say which kind a sentence is: mood, topic, language of feeling."""
    thing, food = rng.choice(w.ITEMS), rng.choice(w.FOODS)
    good = [
        f"I love my new {thing}.",
        f"The {food} was delicious.",
        f"What a lovely {thing}!",
        f"The {thing} works very well.",
    ]
    bad = [
        f"I hate this {thing}.",
        f"The {food} was cold and bland.",
        f"What a useless {thing}!",
        f"The {thing} broke at once.",
    ]
    mood = rng.random() < 0.5
    sentence = rng.choice(good if mood else bad)
    about = [(f"The {rng.choice(w.ANIMALS)} sleeps in the {rng.choice(w.PLACES)}.", "animals"),
        (f"Cook the {food} slowly.", "food"),
             (f"It will rain on {rng.choice(w.DAYS)}.", "weather"),
             (f"The {rng.choice(w.JOBS)} starts work at {rng.randint(6, 9)}.", "work")]  # fmt: skip
    topic_text, topic = rng.choice(about)
    if rng.random() < 0.5:
        return ask(
            rng, sentence, [(rng.choice(["Is this good or bad?", "Mood?"]), "good" if mood else "bad")]
        )
    return ask(
        rng,
        topic_text,
        [(rng.choice(["What is the topic?", "Topic: animals, food, weather or work?"]), topic)],
    )


def knowledge(rng: Random) -> str:
    """A few true facts about the everyday world, and sprout's few words about itself."""
    return ask(rng, "", rng.sample(messages.FACTS, k=rng.randint(1, 4)))


def settings(rng: Random) -> str:
    """Lines of settings, so that signs such as quotes, braces and equals are known."""
    lines = {w.nonsense(rng): rng.choice([w.digits(rng, rng.randint(1, 4)), f'"{rng.choice(w.COLORS)}"',
        f'"{w.town(rng)}"',
             f"[{rng.randint(0, 9)}, {rng.randint(0, 9)}]"]) for _ in range(rng.randint(2, 5))}  # fmt: skip
    block = "\n".join(f"{key} = {value};" for key, value in lines.items())
    key = rng.choice(sorted(lines))
    return ask(rng, f"{w.nonsense(rng)} {{\n{block}\n}}", [(f"What is {key}?", lines[key])])


# Kind of document and its share of the documents, in percent.
MIXTURE: list[tuple[Callable[[Random], str], int]] = [
    (message_reading, 20), (story, 19), (portrait, 15), (records, 11), (copying, 8), (lists, 8),
    (sums, 6), (knowledge, 5),
    (labels, 4), (settings, 4),
]  # fmt: skip


def documents(seed: int) -> Iterator[str]:
    """An endless stream of documents; the same seed gives the same stream."""
    rng = Random(seed)
    makers, shares = zip(*MIXTURE, strict=True)
    while True:
        (maker,) = rng.choices(makers, shares)
        yield maker(rng).strip()
