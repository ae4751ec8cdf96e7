import pytest

from adapterhub.errors import ExpressionError
from adapterhub.spec.expression import Mix, Ref, Scale, Stack, references
from adapterhub.spec.names import Reference
from adapterhub.spec.parser import parse


def ref(text):
    return Ref(Reference.parse(text))


@pytest.mark.parametrize(
    ("text", "tree"),
    [
        ("a", ref("a")),
        ("me/a@0.1.0", ref("me/a@0.1.0")),
        ("me/a@stable", ref("me/a@stable")),
        ("a + b", Stack((ref("a"), ref("b")))),
        ("a - b", Stack((ref("a"), Scale(-1.0, ref("b"))))),
        ("a - 0.5*b", Stack((ref("a"), Scale(-0.5, ref("b"))))),
        ("0.7*me/a + me/b", Stack((Scale(0.7, ref("me/a")), ref("me/b")))),
        ("2*(a + b)", Scale(2.0, Stack((ref("a"), ref("b"))))),
        ("-1*a", Scale(-1.0, ref("a"))),
        ("0.5 * a-b.c", Scale(0.5, ref("a-b.c"))),
        ("mix(0.3*a, 0.7*b + c)", Mix((Scale(0.3, ref("a")), Stack((Scale(0.7, ref("b")), ref("c")))))),
        ("2bit + 0.5b", Stack((ref("2bit"), ref("0.5b")))),
        ("mix-of-two", ref("mix-of-two")),
    ],
)
def test_parses(text, tree):
    assert parse(text) == tree
    assert parse(str(tree)) == tree  # what is printed (and stored) means the same


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("", 0),
        ("a +", 3),
        ("a +b", 2),
        ("a+ b", 1),
        ("a b", 2),
        ("A", 0),
        ("0.5*", 4),
        ("a*0.5", 1),
        ("(a + b", 6),
        ("mix(a, b", 8),
        ("gate(a)", 6),
        ("gate(0.5*a, b)", 5),
        ("fate(a, b)", 0),
        ("a + logits(b)", 4),
        ("logits(a", 8),
        ("logits()", 7),
        ("a@1.0", 0),
        ("a/b/c", 3),
        ("a..b", 0),
        ("base", 0),
        ("a@0.1.0rc1", 0),
        ("a )", 2),
        ("a + 1e999*b", 4),
    ],
)
def test_a_caret_under_the_place(text, place):
    with pytest.raises(ExpressionError) as caught:
        parse(text)
    assert caught.value.position == place, str(caught.value)
    assert str(caught.value).splitlines()[-1] == "  " + " " * place + "^"
    assert caught.value.hint


@pytest.mark.parametrize(
    ("before", "after", "levels"),
    [("(", ")", 100), ("mix(", ")", 100), ("1*", "", 100), ("1*(", ")", 50), ("b + (", ")", 100), ("b - (", ")", 50)],
)
def test_how_deep(before, after, levels):
    tree = parse(before * levels + "a" + after * levels)
    assert [str(r) for r in references(tree)][-1] == "a" and parse(str(tree)) == tree
    for many in (levels + 1, 50_000):
        with pytest.raises(ExpressionError, match="100 deep") as caught:
            parse(before * many + "a" + after * many)
        assert 0 < caught.value.position <= 101 * len(before) and caught.value.hint


def test_references_in_order():
    assert [str(r) for r in references(parse("mix(0.3*a@0.1.0, b) + a"))] == ["a@0.1.0", "b", "a"]
