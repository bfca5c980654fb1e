"""One data owner: the only room that holds private rows.

`site.py` decides, `trainer.py` hands the rows to a gradient rule of `ffm_secure/lifecycle/finetune.py`, where
they are first read; `site_ledger.py` has paid before that.
"""
