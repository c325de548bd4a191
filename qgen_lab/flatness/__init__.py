"""Flatness of a trained model: how its loss answers to noise on its weights."""
