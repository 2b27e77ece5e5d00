"""From ids to text as they come, and the command's manners."""

import os
import subprocess
import sys

import pytest

from t5x_ssm import generate
from tasks import vocabularies


def streamed(decode, ids):
    return [decode([i]) for i in ids]


def test_bytes_appear_when_their_character_is_complete():
    ids = vocabularies.encode_bytes("aé€")
    assert streamed(generate.byte_codec().decoder(), ids) == ["a", "", "é", "", "", "€"]
    # Special ids are no text, and a byte that starts nothing is replaced.
    broken = [1, ids[0], vocabularies.FIRST_BYTE_ID + 0xFF, 258 + 900, ids[0]]
    assert streamed(generate.byte_codec().decoder(), broken) == ["", "a", "\ufffd", "", "a"]


def test_a_prompt_of_any_bytes_is_kept():
    text = b"caf\xe9".decode("utf-8", errors="surrogateescape")
    assert generate.byte_codec().encode(text) == vocabularies.encode_bytes(b"caf\xe9")


class Pieces:
    """A vocabulary of words whose leading space vanishes at the start of a text, and of single UTF-8 bytes."""

    words = (b" alpha", b" be", b"ta", b"\xe2", b"\x82", b"\xac", b"!")

    def __init__(self):
        self.longest = 0

    def decode(self, ids):
        self.longest = max(self.longest, len(ids))
        return b"".join(self.words[i] for i in ids).decode("utf-8", errors="replace").removeprefix(" ")


def test_pieces_join_as_in_the_whole_text_with_bounded_memory():
    pieces = Pieces()
    ids = [0, 1, 2, 3, 4, 5, 6, 0] * 60
    shown = streamed(generate.piecewise_decoder(pieces.decode), ids)
    assert shown[:8] == ["alpha", " be", "ta", "", "", "€", "!", " alpha"]
    bounded = pieces.longest
    assert "".join(shown) == pieces.decode(ids)
    assert bounded < 100 < len(ids)


@pytest.mark.slow
def test_a_mistake_ends_with_a_message_and_status_2(tmp_path):
    (tmp_path / "config.gin").write_text("include 'quickstart.gin'\nMODEL_DIR = 'nowhere'\n")
    command = [sys.executable, "-m", "t5x_ssm.generate", f"--model_dir={tmp_path}", "--prompt="]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    assert done.returncode == 2
    assert "prompt is empty" in done.stderr and "--unconditional" in done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""
