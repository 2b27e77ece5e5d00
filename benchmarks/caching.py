"""How fast a token cache is made: `python -m benchmarks.caching [--megabytes=32] [--size=8000] [--repeats=5]`.

In one run, in turns, over the same texts in the same SentencePiece vocabulary, tokens in a second of CPU time of all threads, so
that they are those of one core:
  tokenizer   alone: `SentencePieceProcessor.encode` of each document, all of them in memory
  seqio       the task's own pipeline in TensorFlow, from JSON lines to the tokens of every document
  caching     `tasks.cache` with one process, from JSON lines to the finished cache: reading, the tokenizer, writing, checksums
The texts are those of the embedded corpora, as often as it takes; the vocabulary is trained on them before the clock starts.
Writes benchmarks/results/caching.json.
"""

import argparse
import itertools
import json
import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Sequence

from benchmarks import report, timing
from tasks import cache, embedded_corpus, train_vocabulary

FILES = 2


def texts(num_bytes: int) -> list[str]:
    """Documents of all domains of the embedded corpora, one after the other, until they have so many bytes."""
    domains = [embedded_corpus.documents(domain, "train") for domain in embedded_corpus.DOMAINS]
    every = [text for row in itertools.zip_longest(*domains) for text in row if text]
    found, left = [], num_bytes
    for text in itertools.cycle(every):
        found.append(text.decode("utf-8"))
        left -= len(text)
        if left <= 0:
            return found


def write_corpus(folder: pathlib.Path, documents: Sequence[str]) -> None:
    """JSON lines in `FILES` files, and one document to be held out."""
    for name, part in [(f"{i}.jsonl", documents[i::FILES]) for i in range(FILES)] + [("validation/0.jsonl", ["none"])]:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in part), encoding="utf-8")


def tokenized(processor, documents: Sequence[str]) -> int:
    """Tokens of the tokenizer alone, an end of each document included."""
    return sum(len(processor.encode(text)) + 1 for text in documents)


def piped() -> int:
    """Tokens of the task's pipeline."""
    dataset = cache.registered("texts").get_dataset(
        sequence_length=None, split="train", shuffle=False, trim_output_features=False, try_in_mem_cache=False
    )
    return sum(example[cache.FEATURE].size for example in dataset.as_numpy_iterator())


def cached() -> int:
    """Tokens of a cache of its own."""
    with tempfile.TemporaryDirectory() as folder:
        return sum(manifest["tokens"] for manifest, _ in cache.manifests(cache.build("texts", folder)))


def speed(work: Callable[[], int]) -> float:
    """What `work` counts in a second of CPU time."""
    began = time.process_time()
    count = work()
    return count / (time.process_time() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=32, help="of text")
    parser.add_argument("--size", type=int, default=8000, help="of the vocabulary")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    documents = texts(options.megabytes * 10**6)
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        model = train_vocabulary.train(iter(documents), size=options.size, num_bytes=4 * 10**6)
        (root / "pieces.model").write_bytes(model)
        write_corpus(root / "corpus", documents)
        os.environ |= {"T5X_SSM_TEXTS": str(root / "corpus"), "T5X_SSM_VOCABULARY": str(root / "pieces.model")}
        import sentencepiece

        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        work = {"tokenizer": lambda: tokenized(processor, documents), "seqio": piped, "caching": cached}
        work["caching"]()  # Loads TensorFlow.
        speeds: dict[str, list[float]] = {name: [] for name in work}
        for _ in range(options.repeats):
            for name, function in work.items():
                speeds[name].append(speed(function))
    report.write(
        "caching",
        {
            "megabytes": options.megabytes,
            "documents": len(documents),
            "vocabulary": options.size,
            "tokens_per_cpu_second": {name: report.spread(values) for name, values in speeds.items()},
            "caching_over_tokenizer": timing.ratios(speeds["caching"], speeds["tokenizer"]),
        },
    )


if __name__ == "__main__":
    main()
