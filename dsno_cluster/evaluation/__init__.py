"""Evaluation of students and images: features, moments, metrics and pictures."""
