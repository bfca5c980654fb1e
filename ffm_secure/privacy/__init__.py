"""From a run file to a mechanism, and from events to statements.

Noise at the client level is added in `mechanism.py`, in `ClientNoise`; at the record level in
`defenses/dp/mechanism.py`, inside every local step.
"""
