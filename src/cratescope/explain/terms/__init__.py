"""Explanations by terms: a small language, chosen by a fit and read by a program, without a language model.

language.toml names the words, spellings and places that a term may speak of; `language` reads it. `texts` finds the
words of windows of tokens, `features` says what each term's value is on them. `selection` chooses the windows to fit
on, `fit` the terms. `phrases` writes an explanation down and reads it back, `predict` simulates it.
"""
