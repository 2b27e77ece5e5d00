"""Documents and token caches for the tests of this folder."""

import pytest
from token_caches import write_mixture


@pytest.fixture
def make_cache(tmp_path):
    """make_cache(tasks, rates=…, name=…, root=…): see `token_caches.write_mixture`."""

    def make(tasks, rates=None, name="mixture", root=tmp_path):
        return write_mixture(root, name, tasks, rates)

    return make


@pytest.fixture
def counting_documents():
    """counting_documents(n, first): documents of uneven lengths whose n tokens are first, first + 1, …: every token
    says where it stands. With EOS at their ends where there is room."""

    def make(count, first=3):
        tokens, documents, length = list(range(first, first + count)), [], 1
        while tokens:
            documents.append(tokens[:length])
            tokens = tokens[length:]
            length = length * 3 % 17 + 1
        return documents

    return make
