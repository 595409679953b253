"""The toy world's tokenizer."""
from core.tokenizer import Tokenizer
from toy import questions
from toy import world as toy
from toy.vocabulary import train_tokenizer


def test_names_are_single_tokens():
    """In a plural, too: the token that a question asks with is the one that the answer is found
    by."""
    tokenizer = Tokenizer.from_pretrained(toy.MODEL)
    for name in toy.KINDS + list(toy.CATEGORIES):
        [token] = tokenizer.encode(name)
        assert tokenizer.encode(questions.plural(name))[0] == token
    for name in toy.SHAPES + list(toy.COLORS) + toy.WORDS:
        assert len(tokenizer.encode(name)) == 1


def test_it_is_the_bundled_models(tmp_path):
    """Trained again from its sentences, it comes out as the one in assets/toy."""
    train_tokenizer(tmp_path)
    new, old = map(Tokenizer.from_pretrained, (tmp_path, toy.MODEL))
    assert new.vocab_size == old.vocab_size
    for i in range(300):
        scene = toy.make_scene(f"pieces/{i}")
        texts = [questions.grid(scene), *sum(questions.conversation(scene), ())]
        assert all(new.encode(text) == old.encode(text) for text in texts)
