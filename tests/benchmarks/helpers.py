"""Files that tests write, and the errors that they expect."""
import json
import re

import pytest

from core.common import UserError


def write_lines(path, rows):
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def line(id, text, prompt=None):
    """Of an answers file."""
    return dict(question_id=id, text=text) | ({} if prompt is None else dict(prompt=prompt))


def fails(*words):
    """One line that holds all these words."""
    ahead = "".join(f"(?=.*{re.escape(word)})" for word in words)
    return pytest.raises(UserError, match=ahead + "^[^\n]*$")
