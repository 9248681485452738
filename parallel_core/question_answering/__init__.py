"""Answers to questions on paragraphs: an encoder with a head for where they begin and end."""
