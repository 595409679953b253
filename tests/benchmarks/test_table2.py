"""Table 2's metrics against loops in float64, and against cases whose values are known."""
import json
import math

import pytest
import torch

import eval as evaluation
from benchmarks import table2
from ccra import CCRA, VLM, CCRAConfig
from core.common import UserError
from toy import world as toy

B, T, L, grid, d, D = 3, 5, 4, 3, 8, 6
N = grid * grid


# --------------------------------------------------------------------------------------------------
# By loops, of lists of numbers

def entropy(p):
    return -sum(x * math.log(x) for x in p if x > 0)


def kl(p, q):
    return sum(x * math.log(x / y) for x, y in zip(p, q) if x > 0)


def js(p, q):
    middle = [(x + y) / 2 for x, y in zip(p, q)]
    return (kl(p, middle) + kl(q, middle)) / 2


def dot(p, q):
    return sum(x * y for x, y in zip(p, q))


def product(W, x):
    return [dot(row, x) for row in W]


def cosine(p, q):
    return dot(p, q) / math.sqrt(dot(p, p) * dot(q, q))


def softmax(s):
    e = [math.exp(x - max(s)) for x in s]
    return [x / sum(e) for x in e]


def mean(those):
    those = list(those)
    return sum(those) / len(those)


def number(x):
    return x.detach().double().tolist()


def by_loops(X, Q, K, F_q, final, w_l, w_hat):
    """Appendix C.1 for one question, word by word. X [L][N] of d numbers, Q (h, D), K (h, d),
    F_q (D)."""
    q = product(Q, F_q)
    p = [softmax([dot(q, product(K, x)) / math.sqrt(len(q)) for x in layer]) for layer in X]
    pairs = [(p[a], p[b]) for a in range(len(p)) for b in range(a + 1, len(p))]
    u = [((n // grid + 0.5) / grid, (n % grid + 0.5) / grid) for n in range(N)]
    mu = [[dot(layer, [place[axis] for place in u]) for axis in (0, 1)] for layer in p]
    centre = [mean(m[axis] for m in mu) for axis in (0, 1)]
    spreads = [math.sqrt(mean((x - mean(own)) ** 2 for x in own)) for own in zip(*p)]
    values = dict(js=mean(js(a, b) for a, b in pairs), cos=mean(cosine(a, b) for a, b in pairs),
                  drift=mean(math.dist(m, centre) for m in mu), std=mean(spreads),
                  js_final=mean(js(layer, final) for layer in p),
                  cos_final=mean(cosine(layer, final) for layer in p))
    for name, w in (("", w_hat), ("_raw", softmax(w_l))):
        values["tv" + name] = sum(abs(w[l + 1] - w[l]) for l in range(len(w) - 1)) / (len(w) - 1)
        values["entropy" + name] = entropy(w)
    return values


def layer_norm(X, c, weight, bias):
    """Eq. 5 with norm "joint" for one question: each layer over its patches and channels."""
    out = []
    for layer, factors in zip(X, c):
        scaled = [[x * f for x in token] for token, f in zip(layer, factors)]
        flat = [x for token in scaled for x in token]
        mu, sd = mean(flat), math.sqrt(mean((x - mean(flat)) ** 2 for x in flat) + 1e-5)
        out.append([[(x - mu) / sd * w + b for x, w, b in zip(token, weight, bias)]
                    for token in scaled])
    return out


def smoothed(w):
    """Over the layers, with the Gaussian of 5 layers and sigma 1, the ends repeated."""
    gauss = [math.exp(-(j - 2) ** 2 / 2) for j in range(5)]
    return [sum(g * w[min(max(l + j - 2, 0), L - 1)] for j, g in enumerate(gauss)) / sum(gauss)
            for l in range(L)]


@pytest.fixture(scope="module")
def case():
    torch.manual_seed(0)
    fuser = CCRA(CCRAConfig(text_dim=D, vision_dim=d, n_layers=L, d_hidden=4))
    for p in fuser.parameters():
        torch.nn.init.normal_(p)
    mask = torch.arange(T)[None] < torch.tensor([T, 2, 1])[:, None]
    return fuser, torch.randn(B, L, N, d) * 2, torch.randn(B, T, D), mask


def test_against_loops(case):
    """All three rows; what LWCA makes of X by loops over the smoothing, too."""
    fuser, F_stack, F_t, mask = case
    result = table2.compare(fuser, F_stack, F_t, mask)
    _, maps = fuser(F_stack, F_t, mask)
    Q, K = number(fuser.lpwca.q.weight), number(fuser.lpwca.k.weight)
    affine = number(fuser.lpwca.norm.weight), number(fuser.lpwca.norm.bias)
    for b in range(B):
        F_q, stack = number(F_t[b, mask[b].sum() - 1]), number(F_stack[b])
        W = [[1 + w for w in layer] for layer in number(maps["W_lp"][b])]
        rows = {"F_stack": stack, "norm alone": layer_norm(stack, [[1.0] * N] * L, *affine),
                "F_lp": layer_norm(stack, W, *affine)}
        text = product(zip(*number(F_t[b])), number(maps["alpha"][b]))                      # D
        query = fuser.lwca.q.weight.double() @ torch.tensor(text, dtype=torch.float64)      # (h)
        key = number(fuser.lwca.k.weight.double().T @ query)                                # d
        for name, X in rows.items():
            w_l = [dot(key, [mean(channel) for channel in zip(*layer)]) / 2 for layer in X]
            want = by_loops(X, Q, K, F_q, softmax(number(maps["w_p"][b])), w_l,
                            softmax(smoothed(w_l)))
            got = {metric: value[b].item() for metric, value in result[name].items()}
            assert got.keys() == want.keys() == table2.NAMES.keys()
            assert got == pytest.approx(want, rel=2e-4, abs=1e-6), name


# --------------------------------------------------------------------------------------------------
# Known values

def test_F_lp_is_the_models_own(case):
    """The layers' weights from the F_lp that is written out are those of the model, which never
    writes it out."""
    fuser, F_stack, F_t, mask = case
    _, maps = fuser(F_stack, F_t, mask)
    got = table2.compare(fuser, F_stack, F_t, mask)["F_lp"]
    tv, h = table2.smoothness(maps["w_hat"].double())
    assert torch.allclose(got["tv"], tv, rtol=1e-4, atol=1e-6)
    assert torch.allclose(got["entropy"], h, rtol=1e-4)


def test_known_values():
    even = torch.full((1, L, N), 1 / N, dtype=torch.float64)
    same = table2.agreement(even, even[:, 0])
    zeros = [same[name].item() for name in ("js", "drift", "std", "js_final")]
    assert [round(x, 12) for x in zeros] == [0] * 4
    assert same["cos"].item() == pytest.approx(1) and same["cos_final"].item() == pytest.approx(1)
    one = torch.zeros(1, L, N, dtype=torch.float64)
    one[0, :, 0] = 1                                  # all layers look at the first corner ...
    one[0, 0] = one[0, 0].roll(N - 1)                 # ... but one, which looks at the last
    far = table2.agreement(one, one[:, 1])
    assert far["js"].item() == pytest.approx(math.log(2) / 2)      # 3 of 6 pairs share nothing
    assert far["cos"].item() == pytest.approx(0.5)
    assert far["js_final"].item() == pytest.approx(math.log(2) / 4)
    assert far["drift"].item() == pytest.approx(2 / 3 * math.sqrt(2) * (3 / 4 + 3 * 1 / 4) / 4)
    assert far["std"].item() == pytest.approx(2 * math.sqrt(3) / 4 / N)
    tv, h = table2.smoothness(torch.tensor([[1.0, 0, 0, 0], [0.25] * 4], dtype=torch.float64))
    assert tv.tolist() == pytest.approx([1 / 3, 0])
    assert h.tolist() == pytest.approx([0, math.log(4)])


def test_the_bound_that_the_papers_figures_exceed():
    """Std_patch is at most sqrt(L - 1) / N: reached where every patch has its share from one layer
    alone."""
    torch.manual_seed(1)
    for _ in range(20):
        p = (torch.randn(1, 24, 576, dtype=torch.float64) * 8).softmax(-1)
        assert table2.agreement(p, p[:, 0])["std"].item() <= math.sqrt(23) / 576
    p = torch.zeros(1, L, N, dtype=torch.float64)
    for l in range(L):
        p[0, l, l] = 1
    assert table2.agreement(p, p[:, 0])["std"].item() == pytest.approx(math.sqrt(L - 1) / N)
    assert min(values[3] for values in table2.PAPER.values()) > math.sqrt(23) / 576


def test_only_where_there_is_a_before_and_after(case):
    _, F_stack, F_t, mask = case
    for change in (dict(order="decoupled"), dict(order="shuffled"), dict(lpwca=False),
                   dict(lwca=False), dict(pwca=False)):
        with pytest.raises(UserError, match="Table 2 needs"):
            table2.compare(CCRA(CCRAConfig(D, d, L, 4, **change)), F_stack, F_t, mask)


# --------------------------------------------------------------------------------------------------
# Of a model

def test_the_command(capsys, one_thread):
    """On the toy world; the means don't depend on the batches."""
    def table(*words):
        evaluation.main(["--table2", "--n", "12", "--device", "cpu", *words])
        return capsys.readouterr().out

    one, other = (json.loads(table("--json", "--batch", batch)) for batch in ("12", "5"))
    for row in ("F_stack", "norm alone", "F_lp"):
        assert one[row] == pytest.approx(other[row], rel=1e-4)
        assert one[row].keys() == table2.NAMES.keys()
    shown = table().splitlines()
    assert [row[:20].strip() for row in shown[1:6]] == [
        "paper, F_stack", "paper, F_lp", "here, F_stack", "here, norm alone", "here, F_lp"]
    assert float(shown[3].split()[-10]) == pytest.approx(one["F_stack"]["js"], abs=1e-4)


def test_it_measures_what_the_model_reads():
    """The same features, words and mask that VLM.look gives CCRA: layers 1 to L, without CLS."""
    model, seen = VLM.from_pretrained(toy.MODEL, dtype=torch.float32), []
    model.fuser.register_forward_hook(lambda fuser, given, out: seen.append(given[:3]))
    query = torch.tensor([[5, 6, 7], [8, 9, 0]])
    batch = torch.randn(2, 3, 96, 96), query, query > 0
    model.look(*batch)
    table2.measure(model, [batch])
    assert len(seen) == 2 and all(map(torch.equal, *seen))
