"""The real corpora as seqio tasks, one module per family. Importing them reads no disk and no network.

    books         PG-19: `books`
    code          source code: `code`
    mathematics   LaTeX and JSON lines: `mathematics`
    benchmarks    LM1B and WikiText-103: `lm1b`, `wikitext103`
    web           C4, OpenWebText and any folder of texts: `c4`, `openwebtext`, `texts`
    pile          the Pile, whole and by set: `pile`, `pile_arxiv`, …
    mixtures      `books_code_math`, `pile_sets`

Where a corpus lies is asked when its data is (`settings.location`); `formats` reads files, `source` makes them a seqio
data source, `tasks` gives every corpus the same preprocessing.
"""
