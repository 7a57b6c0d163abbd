"""Oracles: cases worked by hand, BLEU written from its definition, and invariances."""

import math
import sys
from collections import Counter

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from policy_split_jax.errors import UserError
from policy_split_jax.evaluation.diversity import distinct_openings, div_2_gram, div_bleu, diversity

# Both sides are a few float64 operations on ratios of small integers, in another order.
TOLERANCE = 1e-12

# A shared machine may pause any example for longer than the default deadline.
unhurried = settings(deadline=None)

# Few different words, so that n-grams of every order match now and then.
stories = st.lists(st.sampled_from("abc"), min_size=1, max_size=9).map(" ".join)
samples_of_a_prompt = st.lists(stories, min_size=2, max_size=5)


def close(value: float):
    return pytest.approx(value, abs=TOLERANCE, nan_ok=True)


def ngrams(words: list[str], n: int) -> Counter:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def naive_bleu(text: str, references: list[str]) -> float:
    """Papineni et al. 2002 with NIST's smoothing: the k-th order without a match counts 2^-k matches."""
    words, others = text.split(), [reference.split() for reference in references]
    orders = min(4, len(words))
    precisions, misses = [], 0
    for n in range(1, orders + 1):
        matches = 0.0
        for ngram, count in ngrams(words, n).items():
            matches += min(count, max(ngrams(other, n)[ngram] for other in others))
        if n == 1 and matches == 0:
            return 0.0
        if matches == 0:
            misses += 1
            matches = 0.5**misses
        precisions.append(matches / (len(words) - n + 1))
    nearest = min((len(other) for other in others), key=lambda length: (abs(length - len(words)), length))
    return min(1.0, math.exp(1 - nearest / len(words))) * math.prod(precisions) ** (1 / orders)


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["a b c d"], 1.0),
        (["a a a a a"], 1 / 4),
        (["to be or not to be"], 4 / 5),
        (["to be or not to be", "a a a a a"], (4 / 5 + 1 / 4) / 2),
        (["a b c", "a b c"], 1.0),  # equal texts, but neither repeats itself
        (["The cat. THE CAT! The, (cat)"], 2 / 5),  # the cat · cat the · the cat · cat the · the cat
        (["it's its"], 1.0),  # it s its
        (["a\n\nb _a_ b"], 2 / 3),
        (["alone", "a a a a a", "", "?!"], 1 / 4),
        (["alone", ""], math.nan),
        ([], math.nan),
    ],
)
def test_div_2_gram_by_hand(texts, expected):
    assert div_2_gram(texts) == close(expected)


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        # 5/6 · 3/5 · 2/4 · 1/3 in both directions, equal lengths
        (["the cat sat on the mat", "the cat sat on a mat"], 1 - (1 / 12) ** 0.25),
        # the shorter is all found, with brevity penalty e^(1 − 5/4); the longer has 4/5 · 3/4 · 2/3 · 1/2
        (["a b c d", "a b c d e"], 1 - (math.exp(-1 / 4) + (1 / 5) ** 0.25) / 2),
        # two orders only: 1/2 of the words, and half a match of one bigram
        (["a b", "a c"], 1 - 1 / 2),
        # the others are references together: the first has 1 · 2/3, half a match of 2, a quarter of one of 1, and is
        # longer than both; each of theirs is found whole, beside a text of its own length
        (["a b c d", "a b", "c d"], 1 - ((2 / 3 / 4 / 4) ** 0.25 + 2) / 3),
        (["a b c d", "e f g h"], 1.0),
        (["Hello, world.", "Hello , world ."], 0.0),  # 13a cuts punctuation off
        (["ONE", "one"], 1.0),  # and keeps capitals
        (["a b c d", "e f g h", "", " \n", "..."], 1.0),
        (["a b c d", ""], math.nan),
        (["a b c d"], math.nan),
        ([], math.nan),
    ],
)
def test_div_bleu_by_hand(texts, expected):
    assert div_bleu(texts) == close(expected)


@given(samples_of_a_prompt)
@unhurried
def test_div_bleu_is_that_of_a_naive_bleu(texts):
    scores = [naive_bleu(text, texts[:i] + texts[i + 1 :]) for i, text in enumerate(texts)]
    assert div_bleu(texts) == close(1 - sum(scores) / len(scores))


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["One two three four five six", "One two three four five seven"], 1 / 2),
        (["One two three four five", "One two three four six"], 1.0),
        (["Once upon a time, there", "once upon a time -- there was", "In the beginning was the word"], 2 / 3),
        (["Rain.", "Rain", "Rain fell"], 2 / 3),
        (["Rain", "Sun", "", "***"], 1.0),
        (["Rain", ""], math.nan),
        ([], math.nan),
    ],
)
def test_distinct_openings_by_hand(texts, expected):
    assert distinct_openings(texts) == close(expected)


def test_an_opening_has_as_many_words_as_asked_for():
    texts = ["a b c", "a b d", "a e f"]
    assert [distinct_openings(texts, words) for words in (1, 2, 3)] == [1 / 3, 2 / 3, 1.0]
    with pytest.raises(ValueError, match="give words ≥ 1"):
        distinct_openings(texts, words=0)


def test_diversity_is_the_mean_over_the_prompts_that_count():
    first, second = ["a b", "a c"], ["the cat sat on the mat"] * 4
    assert diversity([first, ["a a a a a"], second, []]) == {
        "div_2_gram": close((1 + 1 / 4 + 1) / 3),
        "div_bleu": close((1 / 2 + 0) / 2),
        "distinct_openings": close((1 + 1 / 4) / 2),
    }
    assert diversity([]) == {
        "div_2_gram": close(math.nan),
        "div_bleu": close(math.nan),
        "distinct_openings": close(math.nan),
    }


@given(samples_of_a_prompt, st.randoms(use_true_random=False))
@unhurried
def test_the_order_of_samples_does_not_matter(texts, random):
    shuffled = random.sample(texts, len(texts))
    assert diversity([shuffled]) == close(diversity([texts]))


@given(samples_of_a_prompt)
@unhurried
def test_a_duplicate_lowers_what_compares_samples(texts):
    before, after = diversity([texts]), diversity([[*texts, texts[0]]])
    assert after["distinct_openings"] < before["distinct_openings"]
    assert after["div_bleu"] <= before["div_bleu"] + TOLERANCE
    assume(naive_bleu(texts[0], texts[1:]) < 0.99)
    assert after["div_bleu"] < before["div_bleu"]


@given(stories.filter(lambda text: len(text.split()) > 1))
@unhurried
def test_a_text_told_twice_repeats_its_bigrams(text):
    assert div_2_gram([f"{text} {text}"]) < div_2_gram([text])


@given(st.text(min_size=1), st.integers(2, 5))
@unhurried
def test_equal_samples_have_no_div_bleu_and_one_opening(text, n):
    assume(any(character.isalnum() for character in text))
    assert div_bleu([text] * n) == 0.0
    assert distinct_openings([text] * n) == 1 / n


@given(st.lists(st.text()))
@unhurried
def test_every_figure_lies_between_0_and_1_or_is_nan(texts):
    assert all(math.isnan(value) or 0 <= value <= 1 for value in diversity([texts]).values())


def test_without_sacrebleu_the_user_is_told_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(UserError, match=r"^Div-BLEU needs sacrebleu: pip install 'policy-split-jax\[writing\]'$"):
        div_bleu(["a b", "a c"])
    assert div_2_gram(["a b"]) == 1.0
