"""Who may do what: the operator's own authority, certificates and tokens, and what they allow."""
