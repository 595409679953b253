"""fast/cache.py and fast/graph.py: how a new token is decoded, on a CPU and on a GPU, against the
plain ways."""
import pytest
import torch

import fast
from fast import cache as caches
from fast.cache import Decoding, TurnedCache, sums
from fast.graph import Recorded, Replay, unrecorded
from llama import Decoder, KVCache
from tests.fast.helpers import HALF, close, draw, needs_fbgemm
from tests.llamas import SHAPES, left_padded, longer, random_llama


@needs_fbgemm
@pytest.mark.parametrize("n, room, g, m, W", [
    (1, 5, 1, 5, 64), (3, 70, 1, 66, 32), (2, 16, 4, 16, 131), (4, 9, 2, 1, 7)])
@pytest.mark.parametrize("dtype", HALF)
def test_sums(n, room, g, m, W, dtype):
    """What lies behind the first m lines is never looked at: there is NaN."""
    tables, weights = draw(n, room, W, dtype=dtype), draw(n, g, m, dtype=dtype, seed=1)
    tables[:, m:] = torch.nan
    close(sums(tables, weights), weights.double() @ tables[:, :m].double(), dtype)
    if m % 2 == 0:
        turns = torch.stack([tables[:, :m // 2], tables[:, m // 2:m]], 2)   # (n, m/2, 2, W)
        right = weights.double() @ turns.flatten(1, 2).double()
        close(sums(tables, weights, halves=True), right, dtype)


@needs_fbgemm
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", SHAPES)
def test_a_new_token_attends_by_sums(kind, padded, dtype):
    """A turned cache against the equation in float64, keys shared by heads or not; what isn't
    filled yet is NaN."""
    config, B = SHAPES[kind], 2
    n_kv, hd = config.num_key_value_heads, config.head_dim
    cache = TurnedCache(config, B, 9, dtype)
    assert cache.keys[1].shape == cache.values[1].shape == (B, n_kv, 9, hd)
    for tensor in (*cache.keys, *cache.values):
        tensor.fill_(torch.nan)
    torch.manual_seed(0)
    k, v = (torch.randn(B, n_kv, 6, hd, dtype=dtype) for _ in range(2))
    q = torch.randn(B, config.num_attention_heads, 1, hd, dtype=dtype)
    cache.append(1, k[:, :, :5], v[:, :, :5])
    cache.length = 5
    seen = cache.append(1, k[:, :, 5:], v[:, :, 5:])
    assert torch.equal(seen[0], k) and torch.equal(seen[1], v)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]).bool()[:, None, None]
    group = config.num_attention_heads // n_kv
    wide_k, wide_v = (x.double().repeat_interleave(group, dim=1) for x in (k, v))
    scores = q.double() @ wide_k.mT / hd ** 0.5
    if padded:
        scores = scores.masked_fill(~mask, -torch.inf)
    want = scores.softmax(-1) @ wide_v
    got = cache.attend(1, q, mask if padded else None)
    assert got.dtype == dtype
    assert (got - want).abs().max() < 4 * torch.finfo(dtype).eps * v.abs().max()


@needs_fbgemm
@pytest.mark.parametrize("kind", SHAPES)
def test_a_turned_cache_decodes_as_one_that_is_not(kind):
    """In pieces, padded on the left, in bfloat16, beside the same model in float32 without a cache.
    """
    net = random_llama(SHAPES[kind])
    ids, mask = left_padded([12, 7])
    whole, half = net(ids, mask=mask)[mask], fast.prepare(net.bfloat16())
    off = []
    for cache_kind in (TurnedCache, KVCache):
        cache = cache_kind(net.config, 2, 12, torch.bfloat16)
        steps = [half(ids[:, a:b], mask=mask[:, :b], cache=cache)
                 for a, b in ((0, 4), (4, 9), (9, 10), (10, 11), (11, 12))]
        off.append((torch.cat(steps, 1)[mask].float() - whole).norm() / whole.norm())
    assert off[0] < 1.3 * off[1] and off[1] < 0.1


@needs_fbgemm
def test_only_large_caches_in_half_precision_are_turned(monkeypatch):
    net, kinds = fast.prepare(random_llama()), []
    embeds = net.embed(left_padded([12, 7])[0])
    for dtype in (torch.bfloat16, torch.float32):
        for many in (0, 2 * 4 * (12 + 3) * 12 - 1, 2 * 4 * (12 + 3) * 12):
            monkeypatch.setattr(caches, "MANY", many)
            cache = net.decoder(net, embeds.to(dtype), None, 3).cache
            assert cache.room == 15 and cache.values[0].dtype == dtype
            kinds.append(type(cache))
    assert kinds == 2 * [TurnedCache] + 4 * [KVCache]


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("padded", [False, True])
def test_what_a_gpu_replays(kind, padded):
    """The same work at shapes that never change, up to the last place of the cache: the logits of
    `hidden` as it is, in a cache that is filled with NaN to begin with. (tests/test_gpu.py
    replays recordings of it.)"""
    net = fast.prepare(random_llama(SHAPES[kind]).double())
    ids, mask = left_padded([12, 7])
    cache = KVCache(net.config, 2, 24, torch.float64)
    for memory in (*cache.keys, *cache.values):
        memory.fill_(torch.nan)
    mask = mask if padded else torch.ones_like(mask)
    net(ids, mask=mask, cache=cache)
    step = Replay(net, cache, mask if padded else None)
    for _ in range(12):
        new = torch.randint(97, (2, 1))
        ids, mask = longer(ids, mask, new)
        assert torch.allclose(step(net.embed(new)), net(ids, mask=mask)[:, -1], rtol=1e-10)
    assert cache.length == cache.room == 24


def test_a_recording_takes_over_after_some_tokens(monkeypatch):
    """As on a GPU, where decoders record: the same answers, of rows of unequal length, too."""
    net = fast.prepare(random_llama())
    ids, mask = left_padded([12, 7])
    embeds, used = net.embed(ids), []

    class Watched(Replay):
        def __call__(self, embeds):
            used.append(self.cache.length)
            return super().__call__(embeds)

    monkeypatch.setattr("fast.graph.Replay", Watched)
    monkeypatch.setattr(Recorded, "records", property(lambda self: True, lambda self, value: None),
                        raising=False)
    for real in (None, mask):
        recorded = torch.stack(list(net.generate(embeds, real, max_new_tokens=20)))
        assert used == list(range(12 + 5, 12 + 19))
        used.clear()
        with unrecorded(net):
            plain = torch.stack(list(net.generate(embeds, real, max_new_tokens=20)))
        assert not used and torch.equal(recorded, plain)


def test_nothing_is_recorded_while_hooks_watch():
    plain, net = random_llama(), fast.prepare(random_llama())
    for llm, inside, after in ((plain, Decoder, Decoder), (net, Decoding, Recorded)):
        with pytest.raises(ZeroDivisionError), unrecorded(llm):
            assert llm.decoder is inside
            1 / 0
        assert llm.decoder is after
