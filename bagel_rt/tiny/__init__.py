"""A synthetic world of colored shapes, and the small model trained on it.

:mod:`.scene` defines scenes and the train/test split, and :mod:`.render` draws them. :mod:`.examples` makes examples of
the three tasks, with the texts of :mod:`.language`, :mod:`.edits` and :mod:`.questions`. :mod:`.judge` decides whether
an image or an answer is correct: it compares what :mod:`.detector` finds in the image with what the text claims
(:mod:`.claims`).
"""
