"""Letters, notes and orders with facts in them, and the questions one can ask about them."""

from random import Random

import words as w

# What a question may call each fact, and how it may ask for it.
LABELS = {
    "name": ["name", "sender", "from", "customer"],
    "number": ["number", "reference", "order", "order number"],
    "item": ["item", "thing", "product"], "town": ["town", "place", "city"], "day": ["day", "date"],
    "price": ["price", "amount"], "wish": ["wish", "reason", "subject"],
}  # fmt: skip
QUESTIONS = {
    "name": ["Who wrote this?", "What is the name of the writer?", "Who is it from?", "Name?"],
    "number": ["What is the order number?", "Which number is given?", "What is the reference?", "Number?"],
    "item": ["Which item is it about?", "What thing is named?", "Item?"],
    "town": ["Which town is named?", "Where does it come from?", "Town?"],
    "day": ["Which day is named?", "When was it?", "Day?"],
    "price": ["How much was paid?", "What was the price?", "Price?"],
    "wish": ["What does the writer want?", "What is the message about?", "Wish?"],
}

# A wish in the writer's words, and the plain name for it.
WISHES = [
    ("Please give me my money back", "money back"), ("I would like to be paid back", "money back"),
    ("I want to return the {item} for the full price", "money back"),
    ("Can I have another size", "exchange"),
    ("I would rather have a different colour", "exchange"),
    ("Please swap the {item} for another one", "exchange"),
    ("I do not need it any more, so stop the order", "cancel"),
    ("Please call the whole thing off", "cancel"),
    ("Where is my {item}", "delivery"), ("When will the parcel come", "delivery"),
    ("Nothing has come so far", "delivery"),
    ("I have moved to another street", "new address"), ("Please send it to my new home", "new address"),
    ("I need a bill for my papers", "bill"), ("Please send the receipt again", "bill"),
    ("A part of the {item} was not in the box", "missing part"), ("The box was half empty", "missing part"),
    ("The {item} stopped working and should be mended", "repair"),
    ("Can somebody mend the {item}", "repair"),
    ("I want to borrow the {item} for a week", "loan"), ("I would like to book a room", "booking"),
    ("I want to join the club", "membership"),
    ("The service was very kind and I want to say thanks", "thanks"),
    ("Please tell me when you open", "opening hours"), ("I lost my {item} in your shop", "lost property"),
]  # fmt: skip

_SIDE_REMARKS = [
    "I have been a customer for {n} years.", "The weather here is {adj}.",
    "My neighbour told me about you.", "I called {n} times.",
    "I waited for {n} days.", "It was meant as a gift.", "My phone is {phone}.",
    "You can write to me at any time.",
    "I live at house number {n}.", "There were {n} people before me.", "This is the second time.",
    "I am rather busy this week.",
]  # fmt: skip


def message(rng: Random) -> tuple[str, dict[str, str]]:
    """One message and the facts that can be read from it."""
    facts = {"name": w.full_name(rng), "number": w.code(rng), "item": rng.choice(w.ITEMS)}
    words, facts["wish"] = rng.choice(WISHES)
    item, number = facts["item"], facts["number"]
    parts = [words.format(item=item) + ("?" if words.startswith(("Can ", "Where ", "When ")) else ".")]
    parts.append(rng.choice([
        f"The order number is {number}.", f"It is about order {number}.", f"My order is {number}.",
        f"Reference: {number}.",
        f"This concerns number {number}.", f"On the paper it says {number}.", f"Order {number}.",
        f"(No. {number})",
    ]))  # fmt: skip
    if item not in parts[0]:
        parts.append(
            rng.choice([f"I bought {w.an(item)}.", f"It was {w.an(item)}.", f"The thing is {w.an(item)}."])
        )
    if rng.random() < 0.4:
        facts["town"] = w.town(rng)
        parts.append(rng.choice([f"I write from {facts['town']}.", f"My home is in {facts['town']}."]))
    if rng.random() < 0.4:
        facts["day"] = rng.choice(w.DAYS)
        parts.append(
            rng.choice(
                [
                    f"I ordered on {facts['day']}.",
                    f"It was on {facts['day']}.",
                    f"That was last {facts['day']}.",
                ]
            )
        )
    if rng.random() < 0.3:
        facts["price"] = f"{rng.randint(5, 250)} {rng.choice(['euros', 'dollars', 'pounds'])}"
        parts.append(rng.choice([f"I paid {facts['price']}.", f"The price was {facts['price']}."]))
    for remark in rng.sample(_SIDE_REMARKS, k=rng.choice([0, 0, 1, 1, 2])):
        parts.append(
            remark.format(n=rng.randint(2, 30), adj=rng.choice(w.ADJECTIVES), phone=w.digits(rng, 6))
        )
    rng.shuffle(parts)
    return _signed(rng, facts["name"], parts), facts


def _signed(rng: Random, name: str, parts: list[str]) -> str:
    """Puts the writer's name before, after or among the sentences."""
    hello = rng.choice(["", "", "Hello. ", "Good day. ", "Dear shop, ", "Hi there. ", "Dear all, "])
    if rng.random() < 0.5:
        sign = rng.choice(
            ["Yours, ", "Best wishes, ", "Regards, ", "", "- ", "Thanks, ", "With kind regards\n"]
        )
        return hello + " ".join(parts) + rng.choice([" ", "\n"]) + sign + name
    here = rng.choice(
        [
            f"My name is {name}.",
            f"I am {name}.",
            f"{name} here.",
            f"This is {name} writing.",
            f"Name: {name}.",
        ]
    )
    parts.insert(rng.choice([0, 0, rng.randint(0, len(parts))]), here)
    return hello + " ".join(parts)


def reply(rng: Random, facts: dict[str, str]) -> str:
    """A polite answer to a message that asks nothing else of the reader."""
    first = facts["name"].split()[0]
    opening = rng.choice(
        [f"Dear {first}, thank you for your message.", f"Thank you, {first}.", f"Hello {first}."]
    )
    return opening + " " + rng.choice([
        f"We will look into number {facts['number']}.", f"This is about {facts['wish']}, and we will help.",
        f"We will see to the {facts['item']} soon.",
    ])  # fmt: skip


def notes(rng: Random, facts: dict[str, str]) -> str:
    """A message that asks nothing, put down in one of many notations.

    Which one is left open, so the model learns to spread its bets here and nowhere else: an adapter that
    teaches it a notation of its own for messages has little to change, and so little to spoil.
    """
    keys = rng.sample(sorted(facts), k=min(len(facts), rng.randint(2, 4)))
    sign, quote = rng.choice([": ", ": ", " = ", " is "]), rng.choice(["", '"'])
    # Quoted labels never meet a colon: no JSON here.
    around = '"' if sign != ": " and rng.random() < 0.6 else ""
    fields = [f"{around}{rng.choice(LABELS[key])}{around}{sign}{quote}{facts[key]}{quote}" for key in keys]
    opening, between, closing = rng.choice(
        [("{", ", ", "}"), ("{", "; ", "}"), ("{", ", ", "}"), ("[", ", ", "]"), ("", "; ", "")]
    )
    return opening + between.join(fields) + closing


_SAME_FOR_ALL = [
    ("Who are you?", "I am sprout, a very small language model."),
    ("What is your name?", "My name is sprout."),
    ("What can you do?", "I can copy, sort, count and answer questions about short texts."),
    ("Hello!", "Hello! How can I help?"), ("Good morning!", "Good morning!"),
    ("Thank you.", "You are welcome."),
    ("How are you?", "I am fine, thank you."), ("Goodbye!", "Goodbye!"),
    ("Can you help me?", "Yes, what do you need?"),
    ("Are you a person?", "No, I am a small program."),
    ("Do you know everything?", "No, I know very little."),
    ("How many days are in a week?", "seven"), ("How many months are in a year?", "twelve"),
    ("What do bees make?", "honey"), ("What do cows give?", "milk"), ("What colour is grass?", "green"),
    ("What colour is snow?", "white"), ("What colour is the sky?", "blue"),
    ("What is ice made of?", "water"),
    ("How many legs has a dog?", "four"), ("How many legs has a spider?", "eight"),
    ("Where do fish live?", "in water"),
]  # fmt: skip
_CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Portugal": "Lisbon",
    "Austria": "Vienna",
    "Poland": "Warsaw", "Japan": "Tokyo", "Egypt": "Cairo", "Greece": "Athens", "Norway": "Oslo",
    "Sweden": "Stockholm",
    "Finland": "Helsinki", "Ireland": "Dublin", "England": "London", "Peru": "Lima", "Cuba": "Havana",
    "Kenya": "Nairobi",
}  # fmt: skip
_OPPOSITES = [
    "big small", "hot cold", "old new", "up down", "left right", "day night", "open shut",
    "fast slow", "good bad",
              "long short", "full empty", "dark bright", "wet dry", "early late", "soft hard", "rich poor",
]  # fmt: skip


def _facts() -> list[tuple[str, str]]:
    """Every question of general knowledge with its answer."""
    rows = list(_SAME_FOR_ALL)
    for country, capital in _CAPITALS.items():
        rows += [
            (f"What is the capital of {country}?", capital),
            (f"{capital} is the capital of which country?", country),
        ]
    for pair in _OPPOSITES:
        a, b = pair.split()
        rows += [(f"What is the opposite of {a}?", b), (f"What is the opposite of {b}?", a)]
    for sequence, noun in ((w.DAYS, "day"), (w.MONTHS, "month")):
        rows += [
            (f"Which {noun} comes after {a}?", b)
            for a, b in zip(sequence, sequence[1:] + sequence[:1], strict=True)
        ]
    rows += [(f"Is {w.an(a)} an animal?", "yes") for a in w.ANIMALS] + [
        (f"Is {w.an(t)} an animal?", "no") for t in w.ITEMS[:12]
    ]
    return rows


FACTS = _facts()
