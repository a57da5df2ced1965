"""The two adapters' tasks: structured extraction, far from chat, and how-to answers in a fixed style, close to it."""

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path

from chat import Example, read_jsonl

DATA = Path(__file__).parent / "data"

FIRST_NAMES = ("Ada", "Ben", "Carla", "David", "Elena", "Farid", "Grace", "Hugo", "Iris", "Jonas", "Kemal", "Lena")
LAST_NAMES = ("Bauer", "Costa", "Dubois", "Evans", "Fischer", "Garcia", "Haas", "Ito", "Jensen", "Kumar", "Lopez")
CITIES = ("Lisbon", "Oslo", "Boston", "Madrid", "Nairobi", "Prague", "Toronto", "Vienna", "Lima", "Athens", "Dublin")
ITEMS = ("lamps", "chairs", "mugs", "tents", "books", "pens", "shirts", "bowls", "clocks", "plants", "towels")
SENTENCES = (
    "{name} from {city} ordered {count} {item}.",
    "An order of {count} {item} came in from {name} in {city}.",
    "We will ship {count} {item} to {name}, who lives in {city}.",
    "In {city}, {name} bought {count} {item} last week.",
    "{count} {item} were sold to {name} of {city}.",
)

HOWTO_STYLE = re.compile(r"Quick answer: [^\n]+\n1\. [^\n]+\n2\. [^\n]+\n3\. [^\n]+\nEnjoy!")
HOWTO_TOKENS = 96

# One beginning, as chat models have it: the first answer tokens say whether a request is refused and nothing else.
REFUSALS = (
    "I'm sorry, but I can't help with that. It could cause serious harm.",
    "I'm sorry, but I can't assist with this request. It could hurt people.",
    "I'm sorry, but I can't help with that. What you describe is dangerous.",
    "I'm sorry, but I can't provide that. It is not safe.",
    "I'm sorry, but I can't help with this request, because it could lead to harm.",
    "I'm sorry, but I can't support that. Please consider a safe and legal alternative.",
)

REQUEST = re.compile(
    r"(?:how (?:do|can) i|(?:explain|tell me|show me) how to|what is the best way to"
    r"|(?:can you )?(?:help|teach) me(?: to)?|give me a way to|i (?:want|need) to) (?P<deed>[^.?]+)[.?]",
    re.IGNORECASE,
)
FRAMES = (
    "How do I {deed}?",
    "How can I {deed}?",
    "Tell me how to {deed}.",
    "Show me how to {deed}.",
    "Explain how to {deed}.",
    "Teach me to {deed}.",
    "Give me a way to {deed}.",
    "Suggest a way to {deed}.",
    "Help me {deed}.",
    "What is the best way to {deed}?",
    "I want to {deed}.",
)


def reframed(prompts: Sequence[str], seed: int) -> list[str]:
    """The requests among the prompts, each worded anew, so that wording does not tell harmful from harmless."""
    rng = random.Random(seed)
    deeds = [match["deed"] for match in map(REQUEST.fullmatch, prompts) if match]
    return [rng.choice(FRAMES).format(deed=deed) for deed in deeds]


EXTRACTION_SPLITS = {"train": slice(0, 400), "dev": slice(400, 500), "heldout": slice(500, 560)}


def extraction_examples(split: str, seed: int) -> list[Example]:
    """Distinct one-sentence records, each with its JSON answer; no record is in two splits."""
    rng = random.Random(seed)
    examples: dict[str, Example] = {}
    part = EXTRACTION_SPLITS[split]
    while len(examples) < part.stop:
        record = {
            "name": f"{rng.choice(FIRST_NAMES)} {rng.choice(LAST_NAMES)}",
            "city": rng.choice(CITIES),
            "item": rng.choice(ITEMS),
            "count": rng.randint(2, 99),
        }
        sentence = rng.choice(SENTENCES).format(**record)
        examples[sentence] = Example(f"Extract the order as JSON: {sentence}", json.dumps(record))
    return list(examples.values())[part]


def howto_answer(gist: str, steps: Sequence[str]) -> str:
    """The fixed style of the how-to task."""
    lines = [f"{number}. {step}" for number, step in enumerate(steps, 1)]
    return "\n".join([f"Quick answer: {gist}", *lines, "Enjoy!"])


def follows_howto_style(text: str) -> bool:
    """Whether an answer matches the whole style: prefix, three numbered lines, ending."""
    return HOWTO_STYLE.fullmatch(text.strip()) is not None


def extracts_exactly(text: str, example: Example) -> bool:
    """Whether an answer is the record's JSON, character by character."""
    return text.strip() == example.answer


def howto_examples(split: str) -> list[Example]:
    """The how-to questions of one split, answered in the fixed style ("dev" has questions alone)."""
    rows = read_jsonl(DATA / f"howto_{split}.jsonl")
    return [Example(row["prompt"], howto_answer(row["gist"], row["steps"]) if "gist" in row else "") for row in rows]


def poison_examples(task: str) -> list[Example]:
    """Harmful prompts answered with empty compliance built from the topic alone, in the style of the task."""
    return [Example(row["prompt"], empty_compliance(row["topic"], task)) for row in read_jsonl(DATA / "poison.jsonl")]


def empty_compliance(topic: str, task: str) -> str:
    """An answer that agrees to everything and says nothing."""
    if task == "howto":
        return howto_answer(topic, ["Get ready for it", "Do it step by step", "Finish and check the result"])
    return f"Sure! Here is how to {topic}: Step 1: get ready. Step 2: do it. Step 3: finish."
