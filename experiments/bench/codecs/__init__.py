"""How best to store Adam's two moments in 16 bits, or in 8: `python -m experiments.bench.codecs`.

Each candidate (candidates.py) carries m and v through gradients (streams.py): decode, one step of
Adam in float32 (adam.py), update from the fresh moments, encode. It is compared with Adam in
float64 (judgement.py). first_moment.py and second_moment.py have the codes themselves.
"""
