"""Trainings long enough for a slow drift to show, and fine-tuning, where small updates get lost."""
