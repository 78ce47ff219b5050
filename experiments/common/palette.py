"""Okabe and Ito's palette, safe for the colour-blind, with a grey and a purple for peers."""

BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, RED, PINK = "#0072B2", "#D55E00", "#CC79A7"
GREY, PURPLE = "#777777", "#7A1FA2"

SIX = (BLUE, SKY, GREEN, RED, PINK, BLACK)
"""For six curves of one kind; another six are told from them by their dashes."""
