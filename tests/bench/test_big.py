"""bench/big.py: LLaVA's json, invented."""
import data
from bench import big
from core.tokenizer import Tokenizer
from tests.training.records import LLM


def test_the_mix_is_llavas():
    counts = [count for _, count, *_ in big.MIX.values()]
    assert sum(counts) == 665_298                        # as its authors list them
    without = sum(count for folder, count, *_ in big.MIX.values() if folder is None)
    assert without == 40_688


def test_what_is_invented_can_be_trained_on(tmp_path):
    big.invent(tmp_path, 60)
    tokenizer = Tokenizer.from_pretrained(LLM)
    loaded = data.load(tmp_path / "data.json", tmp_path / "images", tokenizer)
    assert len(loaded) == 60 and loaded[0]["pixels"].shape == (3, 336, 336)
