"""SuperGLUE's records (Wang et al. 2019, arXiv:1905.00537) as prompts and possible answers, after GPT-3's (arXiv:2005.14165,
appendix G). Needs no seqio.

A continuation begins with its space, as pieces of text do in vocabularies; so a prompt never ends with one.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

Record = Mapping[str, Any]


class Question(NamedTuple):
    """A prompt, what may follow it, and what is right.

    Attributes:
      prompt: text.
      choices: possible continuations.
      right: indices of those that are right; empty where the record does not say.
    """

    prompt: str
    choices: tuple[str, ...]
    right: tuple[int, ...]


YES_NO, TRUE_FALSE = (" yes", " no"), (" True", " False")
CB_LABELS = ("entailment", "contradiction", "neutral")


def _two(prompt: str, choices: tuple[str, str], first_is_right: bool) -> Question:
    return Question(prompt, choices, (0 if first_is_right else 1,))


def boolq(record: Record) -> Iterator[Question]:
    """A passage and a question of yes or no."""
    question = record["question"].rstrip("?")
    yield _two(f"{record['passage']}\nquestion: {question}?\nanswer:", YES_NO, record["label"])


def cb(record: Record) -> Iterator[Question]:
    """Whether a hypothesis is true, false, or neither."""
    hypothesis = record["hypothesis"].removesuffix(".")
    prompt = f"{record['premise']}\nquestion: {hypothesis}. true, false, or neither?\nanswer:"
    yield Question(prompt, (" true", " false", " neither"), (CB_LABELS.index(record["label"]),))


def copa(record: Record) -> Iterator[Question]:
    """Which of two sentences is the cause or effect of another."""
    word = {"cause": "because", "effect": "therefore"}[record["question"]]
    choices = tuple(
        f" {choice[:1].lower()}{choice[1:]}" for choice in (record["choice1"].strip(), record["choice2"].strip())
    )
    yield Question(f"{record['premise'].strip().removesuffix('.')} {word}", choices, (record["label"],))


def rte(record: Record) -> Iterator[Question]:
    """Whether a hypothesis follows."""
    prompt = f"{record['premise']}\nquestion: {record['hypothesis']} True or False?\nanswer:"
    yield _two(prompt, TRUE_FALSE, record["label"] == "entailment")


def wic(record: Record) -> Iterator[Question]:
    """Whether a word means the same in two sentences."""
    prompt = (
        f"{record['sentence1']}\n{record['sentence2']}\nquestion: Is the word '{record['word']}' used in the same sense in "
        "the two sentences above?\nanswer:"
    )
    yield _two(prompt, YES_NO, record["label"])


def wsc(record: Record) -> Iterator[Question]:
    """Whether a pronoun, marked by stars, stands for a noun."""
    target = record["target"]
    words = record["text"].split(" ")
    place, pronoun = target["span2_index"], target["span2_text"]
    count = len(pronoun.split(" "))
    marked = " ".join(words[place : place + count]).replace(pronoun, f"*{pronoun}*", 1)
    text = " ".join([*words[:place], marked, *words[place + count :]])
    prompt = (
        f'Passage: {text}\nQuestion: In the passage above, does the pronoun "*{pronoun}*" refer to '
        f"{target['span1_text']}?\nAnswer:"
    )
    yield _two(prompt, YES_NO, record["label"])


def multirc(record: Record) -> Iterator[Question]:
    """Whether each answer to each question about a passage is right."""
    passage = record["passage"]
    for question in passage["questions"]:
        for answer in question["answers"]:
            prompt = (
                f"{passage['text']}\nQuestion: {question['question']}\nAnswer: {answer['text']}\n"
                "Is this answer correct?"
            )
            yield _two(prompt, YES_NO, answer["label"])


def record(record: Record) -> Iterator[Question]:
    """Which entity of a passage a sentence about it leaves out. The whole sentence is scored."""
    passage = record["passage"]
    body, *highlights = passage["text"].split("\n@highlight\n")
    prompt = "\n".join([body.strip(), "", *(f"- {highlight.strip()}" for highlight in highlights)]) + "\n-"
    # Ends are inclusive; an entity may be named more than once.
    entities = tuple(dict.fromkeys(passage["text"][e["start"] : e["end"] + 1] for e in passage["entities"]))
    for question in record["qas"]:
        right = {answer["text"] for answer in question["answers"]}
        choices = tuple(f" {question['query'].replace('@placeholder', entity)}" for entity in entities)
        yield Question(prompt, choices, tuple(i for i, entity in enumerate(entities) if entity in right))


# By task: the folder of the published archive, and the prompts of a record.
TEMPLATES: dict[str, tuple[str, Callable[[Record], Iterator[Question]]]] = {
    "boolq": ("BoolQ", boolq),
    "cb": ("CB", cb),
    "copa": ("COPA", copa),
    "multirc": ("MultiRC", multirc),
    "record": ("ReCoRD", record),
    "rte": ("RTE", rte),
    "wic": ("WiC", wic),
    "wsc": ("WSC", wsc),
}
