"""The severity classifier at work: annotating tables, baselines, its report."""
