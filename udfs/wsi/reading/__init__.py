"""Slides read: which blocks hold the tiles asked for, and their pixels."""
