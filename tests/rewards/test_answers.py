from hypothesis import given, settings
from hypothesis import strategies as st

from policy_split_jax.rewards.answers import after_hashes, after_think, last_boxed, last_line, marked, reference


def test_the_last_box_counts_and_its_braces_balance():
    assert last_boxed(r"\boxed{1} then \boxed{ \frac{1}{2} } done}") == r"\frac{1}{2}"
    assert last_boxed(r"\boxed{a \boxed{b} c}") == "b"
    assert last_boxed(r"\boxed{\{1, 2\}}") == r"\{1, 2\}"
    assert last_boxed(r"\boxed{\left\{ x \right.} is {it}") == r"\left\{ x \right."
    assert last_boxed(r"\boxed {7}") == "7"
    assert last_boxed("\\\\boxed{8}") == "8"
    assert last_boxed(r"\boxed{}") == ""


def test_an_open_box_is_none_and_hides_no_closed_one():
    assert last_boxed(r"\boxed{12") is None
    assert last_boxed("42") is None
    assert last_boxed(r"\boxed{5} and \boxed{6") == "5"
    assert last_boxed(r"\boxed{so { \boxed{6}") == "6"


def test_many_open_boxes_take_linear_time():
    # A search that rescans the text for each box would need 2.5e9 steps here, minutes beyond any test.
    assert last_boxed("\\boxed{" * 50_000) is None


def test_thinking_ends_at_its_last_mark():
    assert after_think("<think>a</think>b</think> c") == " c"
    assert after_think("no thought") == "no thought"
    assert after_think(r"<think>never ended \boxed{3}") == ""
    assert after_think("<think>a</think>b<think>c") == "b"


def test_a_box_goes_before_hashes_and_a_bare_reference_is_its_own_answer():
    assert marked(r"\boxed{1} and #### 2") == "1"
    assert marked("work\n#### 2") == "2"
    assert marked("2") is None
    assert reference(r"so \boxed{1}") == reference("so\n#### 1") == reference(" 1 ") == reference(1) == "1"
    assert reference(r"\boxed{}") == reference("") == ""


def test_hashes_and_last_line():
    assert after_hashes("work #### 1\nmore\n#### 42 \nbye") == "42"
    assert after_hashes("42") is None
    assert after_hashes("####") == ""
    assert last_line("a\n b \n\n  \n") == "b"
    assert last_line(" \n ") == ""


@settings(deadline=None)
@given(st.text(alphabet="ab \n#"))
def test_a_box_around_any_text_without_braces_gives_it_back(text: str):
    assert last_boxed("x{y" + r"\boxed{" + text + "} z") == text.strip()
