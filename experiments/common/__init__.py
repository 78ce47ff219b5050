"""What several experiments use: reports, pictures, MNIST, a small GPT, text, functions to descend.

An experiment imports this room and jadam, and never another experiment (tests/test_layout.py).
"""
