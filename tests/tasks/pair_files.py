"""Small data of pairs in the forms that the published archives have, with the texts that have to come out in T5's format."""

import json
import pathlib


def write(path: pathlib.Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def lines(*records: dict) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


# By task: the file, its content, and (inputs, targets) of its records.
GLUE = {
    "cola": (
        "CoLA/train.tsv",
        "gj04\t1\t\tThe sailors rode the breeze.\nbc01\t0\t*\tThem talked.\n",
        [
            ("cola sentence: The sailors rode the breeze.", "acceptable"),
            ("cola sentence: Them talked.", "unacceptable"),
        ],
    ),
    "sst2": (
        "SST-2/train.tsv",
        "sentence\tlabel\na fine film \t1\ndull , slow\t0\n",
        [("sst2 sentence: a fine film ", "positive"), ("sst2 sentence: dull , slow", "negative")],
    ),
    "mrpc": (
        "MRPC/train.tsv",
        'Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\tHe "ran" home.\tHome he ran.\n',
        [('mrpc sentence1: He "ran" home. sentence2: Home he ran.', "equivalent")],
    ),
    "qqp": (
        "QQP/train.tsv",
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n0\t1\t2\tWho?\tWhat?\t0\n1\ttorn\n",
        [("qqp question1: Who? question2: What?", "not_duplicate")],
    ),
    "mnli": (
        "mnli/train.jsonl",
        lines({"premise": "It rains.", "hypothesis": "It is wet.", "label": 0, "idx": 4}),
        [("mnli hypothesis: It is wet. premise: It rains.", "entailment")],
    ),
    "qnli": (
        "QNLI/train.tsv",
        "index\tquestion\tsentence\tlabel\n0\tWho?\tAda did.\tentailment\n",
        [("qnli question: Who? sentence: Ada did.", "entailment")],
    ),
    "rte": (
        "RTE/train.tsv",
        "index\tsentence1\tsentence2\tlabel\n0\tA.\tB.\tnot_entailment\n",
        [("rte sentence1: A. sentence2: B.", "not_entailment")],
    ),
    "stsb": (
        "STS-B/train.tsv",
        "index\tgenre\tsentence1\tsentence2\tscore\n"
        + "".join(
            f"{i}\tnews\tA.\tB.\t{score}\n" for i, score in enumerate(("5.000", "3.75", "2.27", "0.09", "4.667"))
        ),
        [("stsb sentence1: A. sentence2: B.", score) for score in ("5.0", "3.8", "2.2", "0.0", "4.6")],
    ),
}

# By task: the folder, a record as published, and its prompt, choices and right ones.
SUPERGLUE = {
    "boolq": (
        "BoolQ",
        {"question": "is water wet", "passage": "Water -- wet.", "idx": 0, "label": True},
        [("Water -- wet.\nquestion: is water wet?\nanswer:", (" yes", " no"), (0,))],
    ),
    "cb": (
        "CB",
        {"premise": "He may go.", "hypothesis": "he goes", "label": "neutral", "idx": 2},
        [("He may go.\nquestion: he goes. true, false, or neither?\nanswer:", (" true", " false", " neither"), (2,))],
    ),
    "copa": (
        "COPA",
        {
            "premise": "It fell.",
            "choice1": "It broke.",
            "choice2": "It flew.",
            "question": "effect",
            "label": 0,
            "idx": 0,
        },
        [("It fell therefore", (" it broke.", " it flew."), (0,))],
    ),
    "rte": (
        "RTE",
        {"premise": "All sat.", "hypothesis": "Some stood.", "label": "not_entailment", "idx": 1},
        [("All sat.\nquestion: Some stood. True or False?\nanswer:", (" True", " False"), (1,))],
    ),
    "wic": (
        "WiC",
        {"word": "bank", "sentence1": "A river bank.", "sentence2": "Bank on it.", "label": False, "version": 1.1},
        [
            (
                "A river bank.\nBank on it.\nquestion: Is the word 'bank' used in the same sense in the two sentences above?\n"
                "answer:",
                (" yes", " no"),
                (1,),
            )
        ],
    ),
    "wsc": (
        "WSC",
        {
            "text": "Mark told Pete he lost.",
            "target": {"span1_index": 0, "span1_text": "Mark", "span2_index": 3, "span2_text": "he"},
            "label": True,
        },
        [
            (
                'Passage: Mark told Pete *he* lost.\nQuestion: In the passage above, does the pronoun "*he*" refer to Mark?\n'
                "Answer:",
                (" yes", " no"),
                (0,),
            )
        ],
    ),
    "multirc": (
        "MultiRC",
        {
            "passage": {
                "text": "Ann ate.",
                "questions": [
                    {"question": "Who ate?", "answers": [{"text": "Ann", "label": 1}, {"text": "Bob", "label": 0}]}
                ],
            }
        },
        [
            (f"Ann ate.\nQuestion: Who ate?\nAnswer: {name}\nIs this answer correct?", (" yes", " no"), (right,))
            for name, right in (("Ann", 0), ("Bob", 1))
        ],
    ),
    "record": (
        "ReCoRD",
        {
            "passage": {
                "text": "Rome fell to Goths.\n@highlight\nRome fell",
                "entities": [{"start": 0, "end": 3}, {"start": 13, "end": 17}, {"start": 31, "end": 34}],
            },
            "qas": [{"query": "The end of @placeholder.", "answers": [{"start": 0, "end": 3, "text": "Rome"}]}],
        },
        [("Rome fell to Goths.\n\n- Rome fell\n-", (" The end of Rome.", " The end of Goths."), (0,))],
    ),
}
