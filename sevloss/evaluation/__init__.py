"""Scores of answers, comparison of settings, the report."""
