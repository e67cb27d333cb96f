"""The demo task: a message to customer support in, one compact line of JSON out.

The phrases are this file's own; sprout's pre-training text has other ones and no JSON, so that the base
cannot do the task and an adapter must learn it. Every row has a name and an order number drawn from very
large spaces.
"""

import json
from random import Random

import words as w

# What customers write for each intent. {item} is replaced by a product.
INTENTS = {
    "refund": [
        "I want my money back.", "Please refund the full amount.", "I would like a refund for the {item}.",
        "Kindly return the payment to my card.", "How do I get reimbursed for this {item}?",
        "I expect a refund.",
        "The {item} arrived broken, so please give me my money back.",
        "I am not happy with the {item} and want a refund.",
    ],
    "exchange": [
        "Could I swap the {item} for a larger one?", "I would like to exchange the {item}.",
        "The {item} is too small, can I get a bigger one?",
        "Please exchange it for the same {item} in {color}.",
        "I got the wrong colour and would like {color} instead.",
        "Can you replace the {item} with a different model?", "It does not fit, I need another size.",
    ],
    "cancel": [
        "Please cancel my order.", "I changed my mind, do not ship it.",
        "I would like to cancel before it goes out.",
        "Is it still possible to cancel the {item}?", "I ordered the {item} by mistake, please cancel.",
        "I do not want the {item} anymore, stop the shipment.", "Cancel this purchase, please.",
    ],
    "tracking": [
        "Where is my parcel?", "When will the {item} be delivered?", "The {item} has not arrived yet.",
        "Could you tell me the delivery status?", "The tracking page shows nothing.",
        "I am still waiting for the {item}.",
        "Has the {item} been shipped already?", "How long until my package gets here?",
    ],
    "address": [
        "I moved, please update the delivery address.", "Please ship it to my new address in {town}.",
        "I entered the wrong street, can you change it?", "My address has changed to {town}.",
        "Can the {item} go to my office in {town} instead?",
        "The house number on the label must be corrected.",
    ],
    "invoice": [
        "I need an invoice for the {item}.", "Please send me the invoice as a file.",
        "Could you email the receipt?",
        "My accountant asks for the bill.", "The invoice is missing from the parcel.",
        "May I have an invoice with the tax on it?",
        "I cannot find the receipt for the {item}.",
    ],
    "missing": [
        "One part of the {item} was missing.", "The box came without the cable.",
        "The screws were not in the package.",
        "There was no {item} in the box.", "I got only half of what I ordered.",
        "The manual and the charger are missing.",
    ],
    "repair": [
        "The {item} stopped working, can it be repaired?", "Can you fix my {item}?",
        "My {item} does not switch on anymore, please repair it.",
        "I would like to have the {item} repaired under warranty.",
        "The {item} makes a strange noise and needs fixing.",
        "Where can I send the {item} for repair?",
    ],
}  # fmt: skip

_GREETINGS = ["Hi", "Hello", "Hi there", "Good morning", "Good evening", "Dear team", "Hello support", "Hey"]
_INTRODUCTIONS = [
    "this is {name}.",
    "I am {name}.",
    "my name is {name}.",
    "{name} here.",
    "it is {name} again.",
    "{name} writing.",
]
_ORDERS = [
    "My order is {order}.", "Order number {order}.", "It is about order {order}.",
    "The order number is {order}.", "Order: {order}.",
    "I am writing about my order {order}.", "You will find it under {order}.",
    "This concerns order no. {order}.",
]  # fmt: skip
_DISTRACTORS = [
    "I paid {price} euros for it.", "I ordered it on {day}.", "It was a birthday present.",
    "I have called {few} times already.",
    "I am a customer since {year}.", "The colour is {color}.", "I live in {town}.",
    "I bought {few} of them.", "Your shop is great otherwise.",
    "I waited {price} minutes on the phone.", "My neighbour has the same one.",
    "I would be glad of a quick answer.",
]  # fmt: skip
_CLOSINGS = ["", "", "Thanks!", "Thank you.", "Best regards", "Please reply soon.", "Many thanks in advance."]


def row(rng: Random) -> dict[str, str]:
    """One message and the line that belongs to it."""
    intent = rng.choice(sorted(INTENTS))
    name, order = w.full_name(rng), w.digits(rng, 5)
    fill = {
        "name": name, "order": order, "item": rng.choice(w.ITEMS), "color": rng.choice(w.COLORS),
        "town": w.town(rng),
        "day": rng.choice(w.DAYS), "price": rng.randint(5, 250), "few": rng.randint(2, 9),
        "year": rng.randint(2009, 2024),
    }  # fmt: skip
    sentences = [
        rng.choice(INTENTS[intent]),
        rng.choice(_ORDERS),
        *rng.sample(_DISTRACTORS, k=rng.choice([0, 1, 1, 2])),
    ]
    rng.shuffle(sentences)
    closing = rng.choice(_CLOSINGS)
    if rng.random() < 0.7:
        message = [rng.choice(_GREETINGS) + ", " + rng.choice(_INTRODUCTIONS), *sentences, closing]
    else:
        message = [rng.choice(_GREETINGS) + "!", *sentences, closing, "{name}"]
    prompt = " ".join(part for part in message if part).format(**fill)
    return {
        "prompt": prompt,
        "completion": json.dumps({"intent": intent, "order": order, "name": name}, ensure_ascii=False),
    }


def rows(count: int, seed: int) -> list[dict[str, str]]:
    """Distinct rows: no two share a prompt, an order number or a name."""
    rng, out = Random(seed), []
    seen: set[str] = set()
    while len(out) < count:
        candidate = row(rng)
        answer = json.loads(candidate["completion"])
        if not seen & {answer["order"], answer["name"]}:
            seen |= {answer["order"], answer["name"]}
            out.append(candidate)
    return out
