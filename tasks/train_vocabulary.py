"""Trains a SentencePiece vocabulary on a registered mixture.

    python -m tasks.train_vocabulary --mixture=books_code_math --output=32k.model [--size=32000] [--megabytes=200]

It keeps text as it is: no normalization, every space and line end, bytes for characters outside it, single digits. Ids are
seqio's: padding 0, end of text 1, unknown 2. Use it by T5X_SSM_VOCABULARY=32k.model.
"""

import argparse
import io
import os
import pathlib
import sys
from collections.abc import Iterator

from tasks import cache

SIZE = 32_000
MEGABYTES = 200
# SentencePiece leaves out longer sentences without a word.
_LONGEST_SENTENCE = 4096
# Layout that code is full of; SentencePiece learns no pieces across it.
_LAYOUT = ["\n", "\t", "  ", "    ", "        "]


def texts(name: str, split: str, modules: tuple[str, ...] = ("tasks",)) -> Iterator[str]:
    """The documents of a mixture, its tasks taking turns until each is at its end."""
    provider = cache.registered(name, modules)
    readers = [_texts_of(task, split) for task in getattr(provider, "tasks", [provider])]
    while readers:
        for reader in list(readers):
            try:
                yield next(reader)
            except StopIteration:
                readers.remove(reader)


def train(documents: Iterator[str], *, size: int, num_bytes: int) -> bytes:
    """Trains on the first `num_bytes` of the documents and returns the SentencePiece model.

    Raises:
      CacheError: if there is too little text for the size, as SentencePiece says.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(documents, num_bytes),
            model_writer=model,
            vocab_size=size,
            model_type="unigram",
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            user_defined_symbols=_LAYOUT,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            max_sentence_length=_LONGEST_SENTENCE,
            num_threads=os.cpu_count() or 1,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise cache.CacheError(f"A vocabulary of --size={size} could not be trained: {error}") from error
    return model.getvalue()


def _texts_of(task, split: str) -> Iterator[str]:
    if split not in task.splits:
        raise cache.CacheError(f"{task.name!r} has no split {split!r}; it has {', '.join(sorted(task.splits))}.")
    dataset = task.source.get_dataset(split=split, shuffle=False)
    for example in dataset.as_numpy_iterator():
        text = example.get(cache.FEATURE)
        if not isinstance(text, bytes):
            raise cache.CacheError(f"The source of {task.name!r} has no text {cache.FEATURE!r} to train on.")
        yield text.decode("utf-8", "replace")


def _sentences(documents: Iterator[str], num_bytes: int) -> Iterator[str]:
    left = num_bytes
    for document in documents:
        for line in document.splitlines():
            # At most 4 bytes a character.
            for start in range(0, len(line), _LONGEST_SENTENCE // 4):
                piece = line[start : start + _LONGEST_SENTENCE // 4]
                left -= len(piece.encode("utf-8"))
                if left < 0:
                    return
                yield piece


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tasks.train_vocabulary", description=__doc__.split("\n")[0])
    parser.add_argument("--mixture", required=True, help="a registered seqio task or mixture")
    parser.add_argument("--output", required=True, help="the model's path, ending in .model")
    parser.add_argument("--size", type=int, default=SIZE, help=f"number of ids (default: {SIZE})")
    parser.add_argument("--split", default="train")
    parser.add_argument("--megabytes", type=float, default=MEGABYTES, help=f"of text (default: {MEGABYTES})")
    cache.add_registration_flags(parser)
    flags = cache.parse_flags(parser, arguments)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    output = pathlib.Path(flags.output)
    if output.suffix != ".model":
        sys.exit(f"tasks.train_vocabulary: --output={output} must end in .model.")
    try:
        modules = ("tasks", *flags.module)
        cache.prepare(modules, flags.gin_file, flags.gin_bindings)
        documents = texts(flags.mixture, flags.split, modules)
        model = train(documents, size=flags.size, num_bytes=int(flags.megabytes * 1e6))
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary = output.with_name(f".{output.name}.{os.getpid()}")
        temporary.write_bytes(model)
        temporary.replace(output)
    except (ValueError, OSError) as error:
        sys.exit(f"tasks.train_vocabulary: {error}")
    print(output)


if __name__ == "__main__":
    main()
