"""What is measured of the page is its answers."""
import re

import pytest

from bench import serve
from core.common import UserError


def test_what_maps_add(monkeypatch, capsys):
    """By turns, after some that don't count; answers of that many tokens."""
    made = []
    answered = serve.answered

    def noted(question):
        for line in answered(question):
            made.append(line)
            yield line

    monkeypatch.setattr(serve, "answered", noted)
    monkeypatch.setattr(serve, "first_words", lambda args: [[0.030, 0.032, 0.9], [0.028] * 3])
    serve.main(["--runs", "2", "--tokens", "3", "--device", "cpu"])
    done = [line for line in made if "done" in line]
    assert len(done) == serve.WARM + 2
    assert all(len(line["sight"]["tokens"]) == 3 for line in done)
    out = capsys.readouterr().out
    assert out.startswith("first word: page 32.0 ms, sample.py 28.0 ms: +4.0 ms\n")
    assert re.search(r"3 tokens: with maps [\d.]+ ms, without [\d.]+ ms: [+-][\d.]+ ms \(", out)


@pytest.mark.slow
def test_the_first_words():
    args = serve.arguments(["--runs", "2", "--device", "cpu"])
    page, chat = serve.first_words(args)
    assert len(page) == len(chat) == 2 and 0 < min(page + chat) < max(page + chat) < 20


def test_no_picture(tmp_path):
    with pytest.raises(UserError, match="no such image"):
        serve.main(["--image", str(tmp_path / "x.png")])
