"""A world of coloured shapes, small enough for a small model to learn.

:mod:`.scene` says what a scene is and which are kept for tests, :mod:`.render` draws it, :mod:`.examples` makes
examples of the three tasks (their words are in :mod:`.language`, :mod:`.edits` and :mod:`.questions`), and
:mod:`.judge` tells whether a picture or an answer is right, by what :mod:`.sight` sees and what the text claims
(:mod:`.claims`).
"""
