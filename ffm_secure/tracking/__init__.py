"""Rounds in the experiment tracker an operator already uses: CSV, TensorBoard, MLflow; on this disk alone.

Only what a `RoundRecord` holds goes out, and everything in one may be published: no loss of a client, no
row, no ledger. A library's reporting of its own use is off before it is imported.
"""
