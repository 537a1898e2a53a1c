from efftrain.measure.quality.token_classes import CLASSES, token_classes

TEXTS = {
    "special": [""],
    "space": ["\n    ", " "],
    "word": ["return", " self", "_x", "é", "a."],
    "number": [" 42", "x2"],
    "punctuation": ["):", " (", "\n#"],
}


def test_a_token_has_the_class_of_what_it_says():
    for name, texts in TEXTS.items():
        assert [CLASSES[c] for c in token_classes(texts)] == [name] * len(texts)
