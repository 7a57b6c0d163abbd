"""How varied stories are: the diversity figures of arXiv 2604.11510, and how many stories begin alike.

All figures lie between 0 and 1, and higher is more diverse. They are of answers alone: cut a reasoning block off first.
What the paper's definitions leave open is decided here:

- The words of bigrams and openings are runs of letters and digits, case folded: neither punctuation nor capitals make
  two phrases differ. Texts in a script without spaces between words need cutting into words first.
- BLEU-4 is sacrebleu's for one sentence: 13a tokens, which keep case and punctuation, exponential smoothing, and
  effective order (a text of fewer than four tokens is judged by the n-grams that it has).
- A sample that a figure cannot judge counts nowhere: one without a word or, for bigrams, with fewer than two.
  Div-2-gram needs one sample that counts, the others two; a prompt with fewer is NaN, and left out of the mean.
"""

import math
import re
from itertools import pairwise
from statistics import fmean
from typing import Any

import numpy as np

from policy_split_jax.errors import UserError
from policy_split_jax.evaluation.metrics import mean_over_questions

# Long enough to tell stories apart, short enough that a stock phrase ("Once upon a time there") is seen.
OPENING_WORDS = 5
_WORD = re.compile(r"[^\W_]+")


def diversity(samples: list[list[str]]) -> dict[str, float]:
    """The three figures of one prompt's samples, each a mean over the prompts that count (NaN where none does).

    `samples` holds a list of texts for each prompt. The least possible share of distinct openings is one over the
    number of samples, and Div-BLEU tends to fall as samples are added: compare equal numbers of samples only.
    Raises UserError where sacrebleu is not installed.
    """
    figures = {"div_2_gram": div_2_gram, "div_bleu": div_bleu, "distinct_openings": distinct_openings}
    return {
        name: mean_over_questions(np.array([figure(texts) for texts in samples], dtype=np.float64))
        for name, figure in figures.items()
    }


def div_2_gram(texts: list[str]) -> float:
    """Different bigrams over all bigrams of a text (distinct-2, Li et al. 2016, arXiv 1510.03055), mean over texts.

    It sees repetition within a text only: equal texts do not lower it.
    """
    bigrams = [list(pairwise(_words(text))) for text in texts]
    shares = [len(set(found)) / len(found) for found in bigrams if found]
    return fmean(shares) if shares else math.nan


def div_bleu(texts: list[str]) -> float:
    """1 − mean BLEU-4 of each text against all others (Self-BLEU, Zhu et al. 2018, arXiv 1802.01886).

    The others are references together: an n-gram matches where any of them has it. Raises UserError where sacrebleu
    is not installed.
    """
    bleu = _sentence_bleu()
    texts = _with_words(texts)
    if len(texts) < 2:
        return math.nan
    scores = [bleu.sentence_score(text, texts[:i] + texts[i + 1 :]).score for i, text in enumerate(texts)]
    # In percent; rounding puts a perfect score a hair above 100.
    return 1.0 - min(fmean(scores) / 100.0, 1.0)


def distinct_openings(texts: list[str], words: int = OPENING_WORDS) -> float:
    """Number of different openings over the number of texts; an opening is the first `words` words of a text.

    A shorter text is its own opening. A title above the story counts as its beginning.
    """
    if words < 1:
        raise ValueError(f"words = {words} is no opening; give words ≥ 1")
    openings = [tuple(_words(text)[:words]) for text in _with_words(texts)]
    return len(set(openings)) / len(openings) if len(openings) > 1 else math.nan


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def _with_words(texts: list[str]) -> list[str]:
    return [text for text in texts if _WORD.search(text)]


def _sentence_bleu() -> Any:
    try:
        from sacrebleu import BLEU
    except ImportError:
        raise UserError("Div-BLEU needs sacrebleu: pip install 'policy-split-jax[writing]'") from None
    return BLEU(effective_order=True)
