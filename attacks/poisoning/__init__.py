"""What malicious clients do to a model: poisoned updates, poisoned rows, and how long a backdoor lives.
 Pure functions of tensors. A simulation can play them (`ffm_secure.auditing.adversaries`); nothing at a real
site can.
"""
