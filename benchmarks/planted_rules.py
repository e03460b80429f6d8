"""Planted rules taken from what published neurons and features are said to do.

They were written by someone who had not read the lists of the language `terms`, so for it they are blind. A source says
where such a neuron or feature is described (from memory), not that it is the same one: patterns and explanations are
ours.
"""

from __future__ import annotations

BILLS = "Bills et al. 2023, Language models can explain neurons in language models"
HAYSTACK = "Gurnee et al. 2023, Finding neurons in a haystack"
BRICKEN = "Bricken et al. 2023, Towards monosemanticity"
CUNNINGHAM = "Cunningham et al. 2023, Sparse autoencoders find highly interpretable features"
TEMPLETON = "Templeton et al. 2024, Scaling monosemanticity"
GEVA_KEYS = "Geva et al. 2021, Transformer feed-forward layers are key-value memories"
GEVA_CONCEPTS = "Geva et al. 2022, Transformer feed-forward layers build predictions by promoting concepts"
VOITA = "Voita et al. 2023, Neurons in large language models: dead, n-gram, positional"
UNIVERSAL = "Gurnee et al. 2024, Universal neurons in GPT2 language models"
SOLU = "Elhage et al. 2022, Softmax linear units"
INDUCTION = "Olsson et al. 2022, In-context learning and induction heads"
KARPATHY = "Karpathy et al. 2015, Visualizing and understanding recurrent networks"
DALVI = "Dalvi et al. 2019, What is one grain of sand in the desert?"
BAU = "Bau et al. 2019, Identifying and controlling important neurons in neural machine translation"


def words(text: str) -> str:
    """A pattern for any of these words, also at the start of a sentence."""
    return rf"(?<![\w'])(?i:{'|'.join(text.split())})(?![\w'])"


Rule = tuple[str, str, str, str]
"""Name, right explanation, pattern (the neuron fires on the tokens of the group `x`, or of the whole match), source."""

LEXICAL: tuple[Rule, ...] = (
    ("capitals", "words written in capital letters", r"\b[A-Z]{2,}\b", HAYSTACK),
    (
        "comparison",
        "words that compare, such as like",
        words("like unlike similar similarly than compared comparison resembles equivalent analogous"),
        BILLS,
    ),
    (
        "certainty",
        "words of certainty",
        words("certainly certain clearly definitely surely sure undoubtedly obviously indeed absolutely always truly"),
        BILLS,
    ),
    (
        "codes",
        "strings of letters and digits mixed",
        r"\b(?=[A-Za-z]*\d)(?=\d*[A-Za-z])[A-Za-z0-9]{3,}\b",
        BRICKEN,
    ),
    ("apostrophe", "apostrophes", r"['’]", CUNNINGHAM),
    ("relative", "relative pronouns such as which and who", words("which who whose whom"), GEVA_CONCEPTS),
    (
        "earlier",
        "words for an earlier time",
        words("previously previous earlier formerly former before originally prior ago initially"),
        GEVA_CONCEPTS,
    ),
    (
        "people",
        "groups of people and professions",
        words(
            "scientists officials soldiers students workers players members authors writers artists engineers doctors "
            "politicians teachers actors musicians farmers residents voters historians critics citizens settlers "
            "people persons users contributors"
        ),
        GEVA_CONCEPTS,
    ),
    (
        "television",
        "words about films and television",
        words(
            "film films movie movies television tv series episode episodes season actor actress director show drama "
            "comedy broadcast cast starring premiere studio"
        ),
        GEVA_KEYS,
    ),
    (
        "body",
        "parts of the body",
        words("head hand hands eye eyes heart brain blood skin face body foot arm arms leg legs hair bone bones mouth"),
        TEMPLETON,
    ),
    (
        "transport",
        "words about transport, such as trains and roads",
        words(
            "road roads station stations railway train trains bridge airport highway street route routes bus tunnel "
            "ship ships aircraft vehicle vehicles car cars passengers"
        ),
        TEMPLETON,
    ),
    ("letter b", "words that begin with the letter b", r"\b[Bb][a-z]+", UNIVERSAL),
    ("tion", 'words that end in "tion"', r"\b\w+tions?\b", DALVI),
    ("ly", 'words that end in "ly"', r"\b\w{2,}ly\b", DALVI),
    (
        "feminine",
        "words for women and girls",
        words("she her hers herself woman women girl girls female lady queen"),
        BAU,
    ),
    (
        "joined names",
        "names in program code, such as maxItems or max_items",
        r"\b[A-Za-z]+[a-z](?:[A-Z][a-z]+)+\b|\b[A-Za-z]+(?:_[A-Za-z]+)+\b",
        HAYSTACK,
    ),
    (
        "medicine",
        "words about medicine and disease",
        words(
            "disease diseases patients patient treatment medical hospital symptoms infection cancer health clinical "
            "drug drugs virus vaccine surgery doctor medicine"
        ),
        HAYSTACK,
    ),
)
CONTEXTUAL: tuple[Rule, ...] = (
    ("part of", 'the word after "part of"', r"\bpart of (?P<x>\w+)", GEVA_KEYS),
    ("range", "the second of two numbers joined by a dash", r"\b\d+ ?[-–—] ?(?P<x>\d+)\b", GEVA_KEYS),
    ("after the", 'the word after "the"', r"\b[Tt]he (?P<x>\w+)", UNIVERSAL),
    ("after number", "the word after a number", r"\b\d+ (?P<x>[a-z]+)\b", UNIVERSAL),
    ("after not", 'the word after "not"', r"\b[Nn]ot (?P<x>\w+)", UNIVERSAL),
    (
        "day",
        "a number after the name of a month",
        r"\b(?:January|February|March|April|May|June|July|August|September|October|November|December) (?P<x>\d+)\b",
        UNIVERSAL,
    ),
    ("before of", 'the word before "of"', r"\b(?P<x>\w+) of\b", VOITA),
    ("such as", 'the word "as" after "such"', r"\bsuch (?P<x>as)\b", VOITA),
    ("year comma", "a comma after a year", r"\b(?:1[5-9]|20)\d\d(?P<x>,)", BRICKEN),
    ("beginning", "the first three words of a text", r"<\|endoftext\|>(?P<x>(?:\s*\S+){1,3})", VOITA),
    ("line end", "the last word of a line", r"(?P<x>\b\w+)[^\w\n]*\n", KARPATHY),
    ("indented", "the first word of an indented line", r"^(?: {2,}|\t+)[^\w\n]*(?P<x>\w+)", KARPATHY),
    ("slash", "the word after a slash", r"\w/(?P<x>\w+)", KARPATHY),
    ("again", "a word that stood shortly before", r"\b(\w{5,})\b[^\n]{1,80}?\b(?P<x>\1)\b", INDUCTION),
    ("long word", "the end of a long word", r"\b[A-Za-z]{7}(?P<x>[a-z]+)\b", SOLU),
    ("angles", "words in angle brackets", r"<(?P<x>[^<>|\n]{2,60})>", BRICKEN),
    ("call", "a name right before an opening bracket", r"\b(?P<x>\w+)\(", TEMPLETON),
    ("name inside", "a capitalised word in the middle of a sentence", r"(?<=[a-z,] )(?P<x>[A-Z][a-z]+)\b", HAYSTACK),
    ("passive", 'the word "by" after a verb that ends in "ed"', r"\b\w+ed (?P<x>by)\b", BAU),
    ("colon", "the word before a colon", r"\b(?P<x>\w+) ?:", BRICKEN),
)
