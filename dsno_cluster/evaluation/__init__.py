"""Evaluation: features, mergeable moments, metrics and pictures."""
