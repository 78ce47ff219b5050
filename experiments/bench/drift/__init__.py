"""What stored moments do over 200,000 steps, beside float64's: `python -m experiments.bench.drift`.

Gradients whose moments are known (gradients.py) go through each storage (storages.py), jadam's own
and others' by formula. The stored m and √v and the way that the updates lead are compared with
float64's over time (measure.py). Small tasks then search for what is lost (tasks.py).
"""
