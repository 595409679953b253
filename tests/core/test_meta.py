"""Meta's own downloads: what is refused. That they load is tested with the other layouts."""
import pytest

from llama import Llama
from tests.core.helpers import fails, meta, write

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("change, words", [
    ({"rope_theta": 1e6}, ("params.json", "rope_theta")),
    ({"dim": None}, ("params.json", "dim")),
    ({"norm_eps": 0}, ("params.json", "norm_eps")),
    ({"use_scaled_rope": True}, ("params.json", "rope_theta")),
    ({"n_kv_heads": 2}, ("wk", "misshapen"))])
def test_other_metas_are_refused(tmp_path, change, words):
    files, jsons = meta(1, 2)
    params = {**jsons["params.json"], **change}
    with fails(*words):
        Llama.from_pretrained(write(tmp_path, files, {"params.json": params}))


@pytest.mark.parametrize("missing", (0, 1))
def test_all_files_are_needed(tmp_path, missing):
    folder = write(tmp_path, *meta(2, 3.1))
    (folder / f"consolidated.{missing:02d}.pth").unlink()
    with fails(f"consolidated.{missing:02d}.pth", "missing"):
        Llama.from_pretrained(folder)
