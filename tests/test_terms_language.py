"""The language of terms: what its file may hold, what is refused, and what makes its identity."""

from __future__ import annotations

import re

import pytest

from cratescope.errors import UserError
from cratescope.explain.terms.language import PACKAGED, load_language, shape

SMALL = """
name = "small"
version = 3
[lists]
"colours" = "red green"
[spellings]
"commas" = ','
[shapes]
"numbers" = '0+'
[parts]
endings = "ing"
[places]
"after" = { back = 1 }
"two words after" = { back = 2 }
[joints]
places = ["after"]
"""


@pytest.fixture
def written(tmp_path):
    def write(text, name="mine.toml", encoding="utf-8"):
        path = tmp_path / name
        path.write_text(text, encoding=encoding)
        return path

    return write


def test_a_file_of_the_users_replaces_the_packaged_language(written):
    language = load_language(written(SMALL))
    assert language.classes == ("colours", "commas", "numbers")
    assert language.classes_of("Red") == ["colours"]
    assert language.classes_of("17") == ["numbers"]
    assert language.endings == ("ing",) and language.beginnings == ()
    assert language.joints == {"after"}
    assert (language.name, language.version) == ("small", 3)


def test_a_file_that_extends_adds_to_the_packaged_language_and_replaces_entries_of_the_same_name(written):
    more = (
        'name = "chemistry"\nversion = 1\nextends = "english"\n[lists]\n"elements" = "iron zinc"\n"articles" = "der"\n'
    )
    language, packaged = load_language(written(more)), load_language()
    assert {*language.classes} == {*packaged.classes, "elements"}
    assert language.classes_of("zinc")[0] == "elements"
    assert "articles" in language.classes_of("der") and "articles" not in language.classes_of("the")
    assert language.places == packaged.places and language.endings == packaged.endings


def test_any_change_of_a_file_changes_the_identity(written):
    identities = [
        load_language(path).identity
        for path in (
            PACKAGED,
            written(SMALL, "a.toml"),
            written(SMALL.replace("version = 3", "version = 4"), "b.toml"),
            written(SMALL.replace("red green", "red  green"), "c.toml"),
            written('name = "x"\nversion = 1\nextends = "english"\n', "d.toml"),
        )
    ]
    assert len({str(identity) for identity in identities}) == len(identities)
    assert load_language(written(SMALL, "again.toml")).identity == identities[1]


def test_a_file_with_a_byte_order_mark_is_read(written):
    for number, encoding in enumerate(("utf-8-sig", "utf-16")):
        assert load_language(written(SMALL, f"{number}.toml", encoding)).classes == ("colours", "commas", "numbers")


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ("[lists]", "[list]", "list"),
        ('name = "small"', "name = 3", "name"),
        ('name = "small"', 'name = ""', "name"),
        ('name = "small"', "", "name"),
        ("version = 3", 'version = "3"', "version"),
        ("version = 3", "version = true", "version"),
        ("version = 3", 'version = 3\nextends = "klingon"', "extends"),
        ("version = 3", "version = 3\nextends = 1", "extends"),
        ('"red green"', '""', "lists.colours"),
        ('"red green"', "[]", "lists.colours"),
        ('"red green"', '["red", ""]', "lists.colours"),
        ('"red green"', "[1, 2]", "lists.colours"),
        ('"red green"', "7", "lists.colours"),
        ("','", "'('", "spellings.commas"),
        ("','", "''", "spellings.commas"),
        ("','", "5", "spellings.commas"),
        ("'0+'", "'0{2,1}'", "shapes.numbers"),
        ("'0+'", "'0{99999999999999999999}'", "shapes.numbers"),
        ("'0+'", "'(?L)0'", "shapes.numbers"),
        ("'0+'", f"'{'(' * 3000}0{')' * 3000}'", "shapes.numbers"),
        ('"numbers"', '"colours"', "shapes.colours"),
        ('"numbers"', '"numbers (+3)"', "shapes.numbers"),
        ('"numbers"', '"big, numbers"', "shapes.big, numbers"),
        ('"numbers"', '"the \\"x\\""', "shapes.the"),
        ('"numbers"', '" numbers"', "shapes. numbers"),
        ('"numbers"', '"numbers after all"', "shapes.numbers after all"),
        ('"numbers"', '"some two words"', "shapes.some two words"),
        ("endings", "ending", "parts.ending"),
        ('endings = "ing"', "endings = []", "parts.endings"),
        ("{ back = 1 }", "{ back = 0 }", "places.after.back"),
        ("{ back = 1 }", '{ back = "1" }', "back"),
        ("{ back = 1 }", "{ forth = 1 }", "places.after"),
        ("{ back = 1 }", "1", "places.after"),
        ("{ back = 1 }", '{ after = "nouns" }', "places.after"),
        ('places = ["after"]', 'places = ["before"]', "joints.places"),
        ('places = ["after"]', "places = [1]", "joints.places"),
        ('places = ["after"]', 'places = ["after"]\nmore = 1', "joints.more"),
        ("[places]", "[places", "not valid TOML"),
        ('"colours" =', '"colours" = "a"\n"colours" =', "not valid TOML"),
    ],
)
def test_what_is_wrong_in_a_file_is_told_in_one_line_that_names_the_file_and_the_key(written, old, new, key):
    assert old in SMALL
    path = written(SMALL.replace(old, new))
    with pytest.raises(UserError) as caught:
        load_language(path)
    said = str(caught.value)
    assert "\n" not in said
    assert str(path) in said and key in said


@pytest.mark.parametrize(
    "pattern",
    [
        *("(,+)+!", "(?:,|,)*!", "(,?){30}!", "(?:a|ab|b)*!", r"(?:\w+-)+", "(?:,*?)*?!", "((,+))+", "(?i:,+)+"),
        *("(?=(,+)+!)x", "(?>(,+)+!)", "(,(a+)?)+", "(?:,{1,3}){50}"),
    ],
)
def test_a_pattern_that_may_take_for_ever_is_refused_by_name(written, pattern):
    with pytest.raises(UserError, match=r"spellings.commas: .* \(it may take for ever: .*; write X\+\+ or") as caught:
        load_language(written(SMALL.replace("','", f"'{pattern}'")))
    assert repr(pattern) in str(caught.value)


@pytest.mark.parametrize("pattern", [r"\w+(?:-\w++)*!", "(?>ab|b|a)+!", "(?:a?+){60}!", "(?:ab|ac)*!", r"\w*\w*\w*!"])
def test_a_pattern_whose_rounds_match_in_one_way_is_taken_and_soon_done(written, pattern):
    language = load_language(written(SMALL.replace("','", f"'{pattern}'")))
    for word in ("a" * 200, "ab" * 100, "a-" * 100):
        assert "commas" not in language.classes_of(word)


def test_a_folder_is_called_one(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path}: is a folder or device, not a file; `cratescope terms --toml`"):
        load_language(tmp_path)


def test_a_file_that_is_missing_or_no_text_is_told_in_one_line(tmp_path):
    noise = tmp_path / "noise.toml"
    noise.write_bytes(b"name = '\xff\xfe\x00'")
    for path in (noise, tmp_path / "none.toml", tmp_path):
        with pytest.raises(UserError, match=re.escape(str(path))) as caught:
            load_language(path)
        assert "\n" not in str(caught.value)


def test_every_class_of_the_packaged_language_is_of_some_word():
    language = load_language()
    words = [word for words in language.lists.values() for word in words]
    more = "1995 , . ?! ; ' 's ( ] \" -- ... // + $ \n \n\n <|endoftext|> ==== IV 3 17 365 b2b , ); foo Foo FOO"
    words += more.split(" ")
    words += ["    ", "McCall", "x", "X", "internationalisation", "of", "\u6f22"]
    assert {name for word in words for name in language.classes_of(word)} == {*language.classes}


def test_lists_do_not_mind_capitals_and_shapes_do():
    language = load_language()
    assert "articles" in language.classes_of("THE")
    assert "words in capitals" in language.classes_of("THE") and "words in capitals" not in language.classes_of("The")


def test_the_shape_of_a_word_tells_letters_and_digits_of_any_script_apart():
    assert shape("McÉa-7٣漢_") == "AaAa-00x_"


def test_an_ending_and_a_beginning_leave_letters_to_spare():
    language = load_language()
    assert "ing" in language.endings_of("Going") and "ing" not in language.endings_of("ring")
    assert "un" in language.beginnings_of("Unable") and "un" not in language.beginnings_of("unit")
    assert not language.endings_of("x.ing")


def test_the_listing_names_every_class_and_place():
    language = load_language()
    lines = "\n".join(language.listing())
    for name in (*language.classes, *language.places, *language.endings):
        assert name in lines
    assert language.sha256[:12] in lines
