"""The decoding engine and its plug-ins: extent policies, strategies, cache policies."""
