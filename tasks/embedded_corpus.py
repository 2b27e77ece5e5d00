"""The embedded corpus: real text that every Python installation with SciPy carries, in three domains.

    books   prose: the Python language reference, as `pydoc_data.topics` ships it. It stands where a corpus of
            books stands in the larger mixtures: running English text, though of one author team and one subject.
    code    the standard library's Python sources.
    math    docstrings of the installed SciPy and NumPy that contain LaTeX.

Documents are named, and everything here is a function of names and contents alone, so one installation always
gives the same documents, order and split. Another version of Python or SciPy has other documents; `environment`
says what the corpus depends on. Nothing is read before `documents` is called.
"""

import ast
import collections
import functools
import hashlib
import importlib.util
import inspect
import pathlib
import sysconfig
import warnings

from tasks.cache import version

DOMAINS = ("books", "code", "math")
SPLITS = ("train", "validation")

# Folders of the standard library that are not in the corpus: `pydoc_data` is the books domain, tests and translation
# tables are no prose of programmers, and distributions leave out or add the others.
_CODE_EXCLUDED = {"pydoc_data", "test", "tests", "idlelib", "lib2to3", "encodings", "site-packages", "dist-packages"}
_LATEX_MARKS = (":math:`", ".. math::")
_ADD_DOC_FUNCTIONS = {"add_newdoc", "_add_newdoc", "add_newdoc_for_scalar_type"}

# Two documents that share a line of this many characters are near-duplicates and stay on one side of the split.
_SHARED_LINE_LENGTH = 50
_VALIDATION_BYTES = 96 * 1024
_VALIDATION_FRACTION = 0.1
# A cluster larger than this part of the validation set would make it a sample of one subject.
_LARGEST_CLUSTER_FRACTION = 1 / 3


def documents(domain: str, split: str) -> list[bytes]:
    """The documents of one domain and split, in the order of their names.

    Args:
      domain: one of `DOMAINS`.
      split: one of `SPLITS`.

    Returns:
      UTF-8 texts, none empty.

    Raises:
      ValueError: for an unknown domain or split.
      FileNotFoundError: if this installation lacks the sources of the domain.
    """
    if domain not in DOMAINS:
        raise ValueError(f"Unknown domain {domain!r} of the embedded corpus; it has {', '.join(DOMAINS)}.")
    if split not in SPLITS:
        raise ValueError(f"Unknown split {split!r} of the embedded corpus; it has {', '.join(SPLITS)}.")
    texts, validation = _corpus(domain)
    return [texts[name].encode("utf-8") for name in sorted(texts) if (name in validation) == (split == "validation")]


def environment(domain: str) -> dict[str, str | None]:
    """What a domain's documents depend on, as `tasks.cache.version` names it: this module's rules, and versions."""
    names = [f"module {__name__}", *(("numpy", "scipy") if domain == "math" else ("python",))]
    return {name: version(name) for name in names}


@functools.cache
def _corpus(domain: str) -> tuple[dict[str, str], frozenset[str]]:
    """All documents of a domain by name, and the names of those held out."""
    texts = {"books": _books, "code": _code, "math": _math}[domain]()
    texts = {name: text for name, text in texts.items() if text.strip()}
    if not texts:
        raise FileNotFoundError(
            f"This Python installation has no sources for the domain {domain!r} of the embedded corpus "
            f"(standard library at {sysconfig.get_path('stdlib')}); install a complete Python with SciPy."
        )
    return texts, frozenset(_held_out(texts))


def _books() -> dict[str, str]:
    from pydoc_data.topics import topics

    return dict(topics)


def _code() -> dict[str, str]:
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    texts = {}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        folders = relative.parts[:-1]
        # Build settings of this machine (compiler flags, absolute paths) are not part of the library.
        machine = relative.name.startswith("_sysconfigdata") or any(part.startswith("config-") for part in folders)
        if not machine and _CODE_EXCLUDED.isdisjoint(folders):
            texts[relative.as_posix()] = path.read_text(encoding="utf-8", errors="replace")
    return texts


def _math() -> dict[str, str]:
    texts = {}
    for package in ("numpy", "scipy"):
        spec = importlib.util.find_spec(package)
        for location in (spec.submodule_search_locations or []) if spec else []:
            root = pathlib.Path(location)
            for path in sorted(root.rglob("*.py")):
                relative = path.relative_to(root.parent).with_suffix("")
                source = path.read_text(encoding="utf-8", errors="replace")
                if "tests" not in relative.parts and any(mark in source for mark in _LATEX_MARKS):
                    texts.update(_docstrings(source, ".".join(relative.parts)))
    return {name: text for name, text in texts.items() if any(mark in text for mark in _LATEX_MARKS)}


def _docstrings(source: str, module: str) -> dict[str, str]:
    """Docstrings of a module by qualified name, read from the source: importing all of SciPy takes long and depends
    on what the machine can load, and `__doc__` is indented differently from Python 3.13 on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        tree = ast.parse(source)
    found: dict[str, str] = {}

    def visit(node: ast.AST, name: str) -> None:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                found.setdefault(name, text)
        # Compiled functions get their documentation by calls such as add_newdoc("scipy.special", "name", "text").
        if isinstance(node, ast.Call) and _called_name(node) in _ADD_DOC_FUNCTIONS:
            strings = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            if len(strings) > 1:
                found.setdefault(".".join([name, *strings[:-1]]), inspect.cleandoc(strings[-1]))
        for child in ast.iter_child_nodes(node):
            visit(child, f"{name}.{child.name}" if hasattr(child, "name") and hasattr(child, "body") else name)

    visit(tree, module)
    return found


def _called_name(call: ast.Call) -> str | None:
    return getattr(call.func, "id", getattr(call.func, "attr", None))


def _held_out(texts: dict[str, str]) -> set[str]:
    """Chooses the validation documents: whole clusters of near-duplicates, in an order given by a hash of a name.

    The order does not depend on contents, so most choices survive a new version of the sources.
    """
    sizes = {name: len(text.encode("utf-8")) for name, text in texts.items()}
    limit = min(_VALIDATION_BYTES, int(_VALIDATION_FRACTION * sum(sizes.values())))
    chosen: set[str] = set()
    total = 0
    clusters = _near_duplicates(texts)
    for cluster in sorted(clusters, key=lambda names: hashlib.sha256(min(names).encode("utf-8")).digest()):
        size = sum(sizes[name] for name in cluster)
        if size <= limit * _LARGEST_CLUSTER_FRACTION and total + size <= limit:
            chosen.update(cluster)
            total += size
    return chosen


def _near_duplicates(texts: dict[str, str]) -> list[list[str]]:
    """Connected components of the documents under 'shares a long line, or is the same'."""
    parent = {name: name for name in texts}

    def root(name: str) -> str:
        while parent[name] != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    first_owner: dict[str, str] = {}
    for name in sorted(texts):
        lines = {line for line in map(str.strip, texts[name].splitlines()) if len(line) >= _SHARED_LINE_LENGTH}
        for passage in {*lines, texts[name]}:
            parent[root(name)] = root(first_owner.setdefault(passage, name))
    clusters = collections.defaultdict(list)
    for name in sorted(texts):
        clusters[root(name)].append(name)
    return list(clusters.values())
