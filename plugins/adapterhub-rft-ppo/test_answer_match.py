"""answer_match: what is read out of a text, how it is compared, and expressions that would take for ever."""

import time

import pytest
from adapterhub_answer_match import AnswerMatch

from adapterhub import plugins
from adapterhub.errors import UsageError


def verifier(**options):
    return AnswerMatch(plugins.options(AnswerMatch.Config, options))


@pytest.mark.parametrize(
    ("text", "read"),
    [("a=7+5=12; b=a-4=8; ans=8", "8"), ("The answer is 3.5.", "3.5"), ("Answer: yes", "yes"), ("so 4, then 5", "5"),
     ("it costs $1,250 in all", "1,250"), ("7-5", "5"), ("= -5 degrees, not 3", "-5"), ("yes or no", "no"),
     ("low b40 b43", "b43"), ("answered 3 of 4", "4"), ("x = ", ""), ("?!", ""), ("", ""), ("ärger", "ärger")],
)  # fmt: skip
def test_what_is_read(text, read):
    assert verifier().read([text]) == [read]


@pytest.mark.parametrize(
    ("reference", "answer", "reward"),
    [("42", "= 42.0", 1), ("1,000", "1000", 1), ("1000", "1000.0005", 1), ("1000", "1001", 0.1), ("yes", "YES", 1),
     ("yes", "no", 0.1), ("yes", "...", 0), ("7", "seven", 0.1), ("0", "0.0000001", 1), ("nan", "nan", 1), ("inf", "1", 0.1),
     ("...", "7", 0)],
)  # fmt: skip
def test_how_it_is_compared(reference, answer, reward):
    found = verifier().verify("p", reference, answer)
    assert found.reward == reward and found.message


def test_a_tolerance_is_of_the_larger_or_absolute():
    assert verifier(tolerance="0.01").verify("", "200", "201.9").reward == 1
    assert verifier(tolerance=0.01).verify("", "200", "202.1").reward == 0.1
    assert verifier(tolerance=0).verify("", "0.1", "0.10").reward == 1


def test_a_pattern_finds_its_last_match_on_any_line():
    found = verifier(pattern=r"#### (?P<answer>-?\d+)")
    assert found.read(["2\n#### 3\n#### -4 and 9", "#### x", "3"]) == ["-4", "", ""]
    assert found.verify("", "#### 4", "so #### 4").reward == 1
    assert found.verify("", "#### 4", "so 4").reward == 0


@pytest.mark.parametrize("pattern", [r"(?P<answer>(a|aa)+)$", r"(?P<answer>(aa|a)+)$"])
def test_a_pattern_that_takes_too_long_is_no_answer_and_soon(pattern):
    began = time.monotonic()
    found = verifier(pattern=pattern).verify("", "a", "a" * 60 + "b")
    assert found.reward == 0 and "more than 2 s" in found.message and "\n" not in found.message
    assert time.monotonic() - began < 10


def test_the_default_reads_long_hostile_texts_in_time():
    began = time.monotonic()
    for text in ("1" * 200_000 + "x", "1," * 100_000, "=" * 100_000, "-" * 200_000, "1.1" * 70_000):
        assert verifier().verify("", "7", text).reward < 1
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    "options",
    [{"pattern": r"is (\d+)"}, {"pattern": r"(?P<answer>\d+"}, {"pattern": "(?P<answer>a)(?P<answer>b)"},
     {"pattern": "(?P<answer>a)(?i)"}, {"tolerance": -1}, {"tolerance": 1}, {"paterm": "x"}],
)  # fmt: skip
def test_wrong_options_are_refused(options):
    with pytest.raises(UsageError) as caught:
        verifier(**options)
    assert caught.value.hint
