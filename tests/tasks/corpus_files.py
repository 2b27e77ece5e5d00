"""Small corpora in the formats that the real ones have on disk, with the documents that have to come out."""

import gzip
import io
import json
import pathlib
import tarfile
from collections.abc import Callable

PROSE = ["It was a dark night.\n\nThe rain fell — in torrents.\n", "Chapter 1\n\nLoomings. Call me.\n", "Third book.\n"]
SOURCE = ["def f(x):\n\treturn x\n", "int main() { return 0; }\n", "fn main() {}\n"]
LATEX = ["\\begin{equation} x^2 \\end{equation}\n", "Let $n \\in \\mathbb{N}$.\n", "Proof. \\qed\n"]
ARTICLES = [
    " \n = First Article = \n \n Some text , with a formula \n = 5 = \n in it . \n \n = = A section = = \n \n More . \n \n",
    " = Second = \n \n Its text . \n",
]


def _write(path: pathlib.Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def _json_lines(texts, field="text", **rest) -> bytes:
    return "".join(json.dumps({field: text, **rest}) + "\n" for text in texts).encode()


def _zst(data: bytes) -> bytes:
    import zstandard

    # Two frames, as files put together from parts have them.
    half = len(data) // 2
    return b"".join(zstandard.ZstdCompressor().compress(part) for part in (data[:half], data[half:]))


def _tar_xz(texts) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:xz") as archive:
        for number, text in enumerate(texts):
            info = tarfile.TarInfo(f"openwebtext/{number}.txt")
            info.size = len(text.encode())
            archive.addfile(info, io.BytesIO(text.encode()))
    return packed.getvalue()


def _parquet(path: pathlib.Path, texts, field="content") -> None:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table({field: texts, "lang": ["x"] * len(texts)}), path)


def books(root):
    for split in ("train", "validation", "test"):
        for number, text in enumerate(PROSE):
            _write(root / split / f"{number}.txt", text)
    return PROSE


def code_jsonl_gz(root):
    _write(root / "a.jsonl.gz", gzip.compress(_json_lines(SOURCE, "content", path="a.py")))
    return SOURCE


def code_jsonl_zst(root):
    _write(root / "train" / "a.jsonl.zst", _zst(_json_lines(SOURCE, "code")))
    return SOURCE


def code_parquet(root):
    _parquet(root / "data" / "train-0.parquet", SOURCE)
    return SOURCE


def code_tree(root):
    for name, text in zip(("p/a.py", "p/b/c.c", "q/d.rs"), SOURCE, strict=True):
        _write(root / name, text)
    _write(root / "p" / "README.bin", b"\x00")
    return SOURCE


def mathematics_latex(root):
    for number, text in enumerate(LATEX):
        _write(root / "1203" / f"{number}.tex", text)
    return LATEX


def mathematics_jsonl(root):
    _write(root / "proofpile_train.jsonl.gz", gzip.compress(_json_lines(LATEX, meta={})))
    _write(root / "proofpile_validation.jsonl.gz", gzip.compress(_json_lines(LATEX[:1])))
    return LATEX


def lm1b(root):
    top = root / "1-billion-word-language-modeling-benchmark-r13output"
    sentences = ["The first sentence .", "The second one ."]
    _write(top / "training-monolingual.tokenized.shuffled" / "news.en-00001-of-00100", "\n".join(sentences) + "\n")
    _write(top / "heldout-monolingual.tokenized.shuffled" / "news.en.heldout-00000-of-00050", "Held out .\n")
    return sentences


def wikitext103(root):
    for split in ("train", "valid", "test"):
        _write(root / f"wiki.{split}.tokens", "".join(ARTICLES))
    return ARTICLES


def wiki40b(root):
    _parquet(root / "en" / "train-00000-of-00001.parquet", PROSE, "text")
    _parquet(root / "en" / "validation-00000-of-00001.parquet", PROSE[:1], "text")
    return PROSE


def openwebtext(root):
    _write(root / "openwebtext" / "urlsf_subset00-1_data.xz", _tar_xz(PROSE))
    return PROSE


def texts(root):
    for number, text in enumerate(PROSE):
        _write(root / f"{number}.txt", text)
    return PROSE


def c4(root):
    _write(root / "c4-train.00000-of-01024.json.gz", gzip.compress(_json_lines(PROSE[:2], url="u")))
    _write(root / "c4-train.00001-of-01024.json.gz", gzip.compress(_json_lines(PROSE[2:], url="u")))
    _write(root / "c4-validation.00000-of-00008.json.gz", gzip.compress(_json_lines(PROSE)))
    return PROSE


def pile(root):
    records = [(PROSE[0], "Books3"), (LATEX[0], "ArXiv"), (SOURCE[0], "Github"), (LATEX[1], "ArXiv")]
    data = b"".join(_json_lines([text], meta={"pile_set_name": name}) for text, name in records)
    for name in ("train/00.jsonl.zst", "val.jsonl.zst", "test.jsonl.zst"):
        _write(root / name, _zst(data))
    return [text for text, _ in records]


def pile_arxiv(root):
    pile(root)
    return LATEX[:2]


def texts_gz(root):
    for number, text in enumerate(PROSE):
        _write(root / f"{number}.txt.gz", gzip.compress(text.encode()))
    return PROSE


# (task, the corpus whose location it reads, what writes it)
FORMATS: list[tuple[str, str, Callable]] = [
    ("books", "books", books),
    ("code", "code", code_jsonl_gz),
    ("code", "code", code_jsonl_zst),
    ("code", "code", code_parquet),
    ("code", "code", code_tree),
    ("mathematics", "mathematics", mathematics_latex),
    ("mathematics", "mathematics", mathematics_jsonl),
    ("lm1b", "lm1b", lm1b),
    ("wikitext103", "wikitext103", wikitext103),
    ("wiki40b", "wiki40b", wiki40b),
    ("openwebtext", "openwebtext", openwebtext),
    ("texts", "texts", texts),
    ("texts", "texts", texts_gz),
    ("c4", "c4", c4),
    ("pile", "pile", pile),
    ("pile_arxiv", "pile", pile_arxiv),
]
