"""Methods whose code is there and tested, but whose card, demo, recipe, example or benchmark is still to come.

They have no row in the registry yet, so `lightning-methods list` does not show them.
"""

UNFINISHED = {"proreg", "stillmix", "umil"}
