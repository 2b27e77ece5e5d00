"""Tasks of an input text and a target text, and questions whose answers are ranked. Importing them reads no disk and no network.

    summarization   documents and summaries: `summarization`, `cnn_dailymail`, `xsum`
    glue            GLUE as text to text: `glue_sst2`, `glue_mnli`, …
    superglue       SuperGLUE by the likelihood of its answers: `superglue_rte`, `superglue_rte_few_shot`, …

Where the data lies is asked when it is read, as for `tasks.corpora`: a folder, or `tfds:NAME:VERSION` for a TFDS data set.
"""
