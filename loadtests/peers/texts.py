"""What is asked: texts of known length, drawn from a seed, so that every system is asked the same.

A word of the list is about one token of most vocabularies, and so is a full stop.
"""

import random

__all__ = ("Message", "Texts", "assistant", "system", "user")

Message = dict[str, str]
"""A message of a chat: role and content."""

# fmt: off
WORDS = (
    "apple", "boat", "candle", "desk", "earth", "fence", "gold", "horse", "iron", "jar", "king",
    "lamp", "moon", "night", "oil", "pearl", "queen", "road", "snow", "tree", "umbrella", "vase",
    "wall", "year", "zoo", "ash", "bread", "cloud", "door", "egg", "farm", "grass", "hill", "ice",
    "jam", "knife", "lake", "milk", "nest", "oak", "path", "quilt", "rain", "sand", "tower",
    "uniform", "voice", "wheel", "yard", "zone", "artist", "baker", "clerk", "dancer", "editor",
    "farmer", "guard", "hunter", "judge", "lawyer", "miner", "nurse", "painter", "sailor",
    "tailor", "writer",
)
# fmt: on
TASKS = (
    "Write a long report on {}.",
    "Explain to a child how {} belong together.",
    "Tell a story in which {} all matter.",
    "List reasons why {} may change a town.",
    "Describe a day of a person who works with {}.",
    "Compare {} and say what each is good for.",
    "Write a letter to a friend about {}.",
    "Plan a lesson on {} for a school.",
)
_SENTENCE = 12


def system(content: str) -> Message:
    """A system message."""
    return {"role": "system", "content": content}


def user(content: str) -> Message:
    """A user's message."""
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    """An answer."""
    return {"role": "assistant", "content": content}


class Texts:
    """Texts of one run; none begins as another does, so that nothing is shared by chance."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def filler(self, tokens: int) -> str:
        """About so many tokens of sentences without sense; at least one sentence."""
        sentences = max(1, round(tokens / (_SENTENCE + 1)))
        return " ".join(
            f"{' '.join(self._random.choices(WORDS, k=_SENTENCE))}." for _ in range(sentences)
        )

    def task(self) -> str:
        """A wish that is answered at length; about 20 tokens."""
        things = self._random.sample(WORDS, 4)
        named = f"{', '.join(things[:-1])} and {things[-1]}"
        return self._random.choice(TASKS).format(named)

    def _case(self) -> str:
        return f"Case {self._random.randrange(10**6):06d}."

    def short(self) -> list[Message]:
        """A conversation's begin of about 64 tokens with the template's own."""
        return [system(f"{self._case()} {self.filler(13)}"), user(self.task())]

    def document(self, tokens: int) -> Message:
        """A system message of about so many tokens."""
        return system(f"{self._case()} This is the handbook. {self.filler(tokens - 20)}")

    def question(self, number: int) -> Message:
        """A short question about a document; those of different numbers differ early."""
        thing = WORDS[(number * 7) % len(WORDS)]
        return user(f"Question {number}: what does the handbook say about the {thing}?")
