"""Sequences cut over ranks: attention over all of a sequence's positions, of which each rank holds a part."""
