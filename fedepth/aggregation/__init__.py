"""From checked updates to new global weights, tensor by tensor from files.

`rules` names what can be done (types only, no numpy), `aggregate` does it; `norms` says how far an update goes and how
far is too far; `privacy` accounts for what central differential privacy has spent.
"""
