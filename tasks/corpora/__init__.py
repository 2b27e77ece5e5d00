"""The real corpora as seqio tasks, one module per family. Importing them reads no disk and no network.

    books         PG-19: `books`
    code          source code: `code`
    mathematics   LaTeX and JSON lines: `mathematics`
    benchmarks    LM1B, WikiText-103 and Wiki-40B: `lm1b`, `wikitext103`, `wiki40b`
    web           C4, OpenWebText and any folder of texts: `c4`, `openwebtext`, `texts`
    pile          the Pile, whole and by set: `pile`, `pile_arxiv`, …
    mixtures      `books_code_math`, `pile_sets`

Where a corpus lies is asked when its data is (`settings.location`); `formats` reads files, `places` a folder of them or a
TFDS data set, `source` makes it a seqio data source, `tasks` gives every corpus the same preprocessing.
"""
