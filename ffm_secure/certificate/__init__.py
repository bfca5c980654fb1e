"""What a run can be held to, years later, by somebody who trusts neither its operator nor this software.

`collect` reads a run directory, `envelope` signs, `verify` checks. `verify` needs no model
library, so that a certificate is verified where no model can be loaded.
"""
