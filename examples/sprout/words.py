"""Words, names and numbers that the sprout texts are built from.

Names, towns and codes come from spaces far too large to memorise, so a model that must repeat them has to
learn to copy from its input instead of recalling what it saw in training.
"""

from random import Random

_FIRST = [
    "Ada", "Alma", "Amir", "Anna", "Anton", "Bela", "Ben", "Carla", "Cora", "Dana", "David", "Dora",
    "Elena", "Elias", "Emil", "Emma", "Erik", "Eva", "Farid", "Felix", "Fiona", "Gita", "Greta", "Hana",
    "Hugo", "Ida", "Ines", "Ivan", "Jana", "Jonas", "Julia", "Kamal", "Karin", "Kofi", "Lara", "Lena",
    "Leo", "Liam", "Lina", "Luca", "Maja", "Mara", "Marco", "Maria", "Mia", "Mila", "Nadia", "Nils",
    "Nina", "Noah", "Nora", "Olga", "Oscar", "Otto", "Paul", "Petra", "Rafael", "Rana", "Rita", "Rosa",
    "Ruth", "Samir", "Sara", "Selma", "Sofia", "Stefan", "Tara", "Theo", "Tom", "Uma", "Vera", "Victor",
    "Wanda", "Yara", "Yusuf", "Zoe",
]  # fmt: skip
_ONSET = [
    "b", "br", "c", "d", "dr", "f", "g", "gr", "h", "j", "k", "kl", "l", "m", "n", "p", "pr", "r", "s",
    "st", "t", "tr", "v", "w", "z",
]  # fmt: skip
_VOWEL = ["a", "e", "i", "o", "u", "a", "e", "i", "o", "ai", "ea", "ie", "ou"]
_CODA = ["n", "l", "r", "s", "t", "nd", "rk", "ld", "m", "nt"]
_GIRL_BOY_END = ["a", "o", "i", "en", "in", "is", "ana", "ela", "ino", "ia", "us", "el"]
_SURNAME_END = [
    "er", "man", "sen", "ski", "berg", "son", "ton", "ley", "field", "well", "ova", "ez", "ini", "ard",
    "stein", "feld", "wood", "land", "ström",
]  # fmt: skip
_PLACE_END = [
    "ville", "ton", "burg", "ford", "field", "dorf", "mouth", "bridge", "haven", "stad", "port", "dale",
]  # fmt: skip

ITEMS = [
    "lamp", "kettle", "chair", "desk", "jacket", "coat", "scarf", "blender", "toaster", "camera", "phone",
    "tablet", "printer", "keyboard", "headset", "watch", "backpack", "suitcase", "tent", "bicycle",
    "helmet", "rug", "mirror", "pillow", "blanket", "mug", "teapot", "vase", "clock", "radio", "speaker",
    "drill", "ladder", "umbrella", "sweater", "shirt", "dress", "belt", "wallet", "ring", "necklace",
    "puzzle", "doll", "kite", "ball", "guitar", "violin", "book", "notebook", "pen",
]  # fmt: skip
COLORS = [
    "red", "blue", "green", "yellow", "black", "white", "brown", "grey", "pink", "purple", "orange",
    "silver",
]  # fmt: skip
ANIMALS = [
    "cat", "dog", "horse", "cow", "sheep", "goat", "duck", "hen", "fox", "wolf", "bear", "owl", "frog",
    "fish", "mouse", "rabbit", "crow", "bee",
]  # fmt: skip
FOODS = [
    "bread", "cheese", "soup", "rice", "apple", "pear", "plum", "cake", "honey", "salad", "pasta", "egg",
    "potato", "carrot", "bean", "melon",
]  # fmt: skip
PLACES = [
    "garden", "forest", "market", "school", "library", "kitchen", "harbour", "museum", "park", "station",
    "farm", "castle", "river", "beach",
]  # fmt: skip
JOBS = [
    "teacher", "baker", "doctor", "farmer", "painter", "driver", "nurse", "singer", "pilot", "cook",
    "sailor", "writer", "gardener", "builder",
]  # fmt: skip
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = [
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October",
    "November", "December",
]  # fmt: skip
ADJECTIVES = [
    "old", "new", "small", "big", "round", "heavy", "light", "bright", "soft", "pretty", "plain",
    "useful", "broken", "cheap", "fine", "warm",
]  # fmt: skip


def syllable(rng: Random) -> str:
    """One consonant-vowel syllable."""
    return rng.choice(_ONSET) + rng.choice(_VOWEL)


def first_name(rng: Random) -> str:
    """A given name: from the list of common ones, or built from syllables."""
    if rng.random() < 0.5:
        return rng.choice(_FIRST)
    middle = rng.choice(_CODA)[0] if rng.random() < 0.5 else ""
    return (syllable(rng) + middle + rng.choice(_ONSET)[0] + rng.choice(_GIRL_BOY_END)).capitalize()


def surname(rng: Random) -> str:
    """A family name built from syllables."""
    stem = syllable(rng) + (syllable(rng) if rng.random() < 0.4 else "")
    end = rng.choice(_SURNAME_END) if rng.random() < 0.6 else ""
    return (stem + rng.choice(_CODA) + end).capitalize()


def full_name(rng: Random) -> str:
    """Given name and family name."""
    return f"{first_name(rng)} {surname(rng)}"


def town(rng: Random) -> str:
    """An invented town."""
    return (syllable(rng) + rng.choice(_CODA) + rng.choice(_PLACE_END)).capitalize()


def digits(rng: Random, length: int) -> str:
    """A number of exactly this many digits, the first one not zero."""
    return str(rng.randrange(10 ** (length - 1), 10**length))


def code(rng: Random) -> str:
    """A reference such as 48213, K7302 or RT-905."""
    kind = rng.random()
    if kind < 0.6:
        return digits(rng, rng.choice([4, 5, 5, 5, 6]))
    letters = "".join(rng.choice("ABCDEFGHJKLMNPRSTUVWXYZ") for _ in range(rng.choice([1, 2])))
    return letters + rng.choice(["", "-"]) + digits(rng, rng.choice([3, 4]))


def nonsense(rng: Random) -> str:
    """An invented lower-case word."""
    return "".join(syllable(rng) for _ in range(rng.choice([2, 2, 3]))) + rng.choice(
        ["", "", rng.choice(_CODA)]
    )


def an(noun: str) -> str:
    """The noun phrase with its indefinite article."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def listed(things: list[str]) -> str:
    """Joins things as in a sentence: a, b and c."""
    return things[0] if len(things) == 1 else ", ".join(things[:-1]) + " and " + things[-1]
